import { useState } from "preact/hooks";
import {
  announcement,
  arms,
  busy,
  edit,
  problem,
  retry,
  turns,
  unread,
  type Turn,
} from "../comparison";
import { ArmBar } from "../parts/ArmBar";
import { Composer } from "../parts/Composer";
import { Notice } from "../parts/Notice";
import { ReplyCard } from "../parts/ReplyCard";
import { Toolbar } from "../parts/Toolbar";
import { profilesByName } from "../session";

/** The same conversation under several profiles, side by side. */
export function Compare() {
  return (
    <div class="compare">
      <h1 class="hidden">Compare profiles</h1>
      <ArmBar />
      <Toolbar />
      {turns.value.map((turn, i) => (
        <TurnRow key={turn.id} turn={turn} position={i + 1} />
      ))}
      {turns.value.length === 0 && (
        <p class="invite">
          Ask every column the same thing and see, token by token, what each profile does to the
          model's reply.
          {profilesByName.value.size === 1 && (
            <>
              {" "}
              So far it has only one: <code>pilothouse fit</code> makes more.
            </>
          )}
        </p>
      )}
      {problem.value && (
        <Notice tone="bad" action={{ label: "Try again", do: retry }}>
          {problem.value}
        </Notice>
      )}
      <Composer />
      {turns.value.length > 0 && <Note />}
      <p class="hidden" role="status">
        {announcement.value}
      </p>
    </div>
  );
}

function Note() {
  if (unread.value) {
    return (
      <p class="note">
        Nothing is read of prompts and replies here: this model is served without a monitor, which{" "}
        <code>pilothouse fit monitor</code> makes.
      </p>
    );
  }
  return (
    <p class="note">
      The thin line across a bar is raw’s value. Probes are calibrated for the moment before the
      reply, its first token; further on their course says more than their value.
    </p>
  );
}

function TurnRow({ turn, position }: { turn: Turn; position: number }) {
  return (
    <section class="turn" aria-label={`Turn ${position}`}>
      <Prompt turn={turn} />
      <div class="columns" data-columns={arms.value.length}>
        {arms.value.map((arm) => (
          <ReplyCard key={arm.id} turn={turn} arm={arm} />
        ))}
      </div>
    </section>
  );
}

function focus(field: HTMLTextAreaElement | null): void {
  field?.focus();
}

function Prompt({ turn }: { turn: Turn }) {
  const [draft, setDraft] = useState<string | null>(null);
  if (draft === null) {
    return (
      <div class="prompt">
        <h2>{turn.text}</h2>
        <button
          type="button"
          class="plain"
          disabled={busy.value}
          onClick={() => setDraft(turn.text)}
        >
          Edit
        </button>
      </div>
    );
  }
  const save = () => {
    if (!draft.trim()) return;
    setDraft(null);
    edit(turn, draft.trim());
  };
  return (
    <form
      class="prompt editing"
      onSubmit={(event) => {
        event.preventDefault();
        save();
      }}
    >
      <textarea
        aria-label="Edited prompt"
        rows={2}
        value={draft}
        ref={focus}
        onInput={(event) => setDraft(event.currentTarget.value)}
        onKeyDown={(event) => {
          if (event.key === "Escape") setDraft(null);
          if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
            event.preventDefault();
            save();
          }
        }}
      />
      <div class="actions">
        <button type="submit" class="main">
          Ask this
        </button>
        <button type="button" onClick={() => setDraft(null)}>
          Cancel
        </button>
      </div>
    </form>
  );
}
