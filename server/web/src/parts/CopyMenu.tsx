import { useRef, useState } from "preact/hooks";
import { addressOf, apiKey } from "../api";
import { arms, link, replyOf, requestFor, settings, turns } from "../comparison";
import { asCurl, asPython } from "../logic/snippets";

/** Puts the comparison on the clipboard; where that is not allowed, into a field to copy from. */
export function CopyMenu() {
  const dialog = useRef<HTMLDialogElement>(null);
  const [text, setText] = useState("");
  const [done, setDone] = useState("");
  const copy = async (name: string, content: string) => {
    try {
      await navigator.clipboard.writeText(content);
      setDone(`${name} copied`);
      setTimeout(() => setDone(""), 2000);
    } catch {
      setText(content);
      dialog.current?.showModal();
    }
  };
  const turn = turns.value.at(-1);
  if (!turn) return null;
  const request = () => requestFor(turn, arms.value);
  const origin = addressOf("/").replace(/\/$/, "");
  const keyed = Boolean(apiKey.value);
  return (
    <div class="copy" role="group" aria-label="Copy this comparison">
      <span class="label">{done || "Copy"}</span>
      <button type="button" class="plain" onClick={() => copy("Link", address())}>
        Link
      </button>
      <button
        type="button"
        class="plain"
        onClick={() => copy("curl", asCurl(request(), origin, keyed))}
      >
        curl
      </button>
      <button
        type="button"
        class="plain"
        onClick={() => copy("Python", asPython(request(), origin, keyed))}
      >
        Python
      </button>
      <button type="button" class="plain" onClick={() => copy("JSON", asJson())}>
        JSON
      </button>
      <span class="hidden" role="status">
        {done}
      </span>
      <dialog ref={dialog} aria-label="Copy from here">
        <textarea
          readOnly
          value={text}
          rows={14}
          aria-label="Text to copy"
          onFocus={(e) => e.currentTarget.select()}
        />
        <form method="dialog">
          <button type="submit">Close</button>
        </form>
      </dialog>
    </div>
  );
}

/** Of this comparison, even where the browser's own is a moment behind. */
const address = () => addressOf("/") + link.value;

/** Everything that is on the page, replies and traces included. */
function asJson(): string {
  const shown = {
    address: address(),
    settings: settings.value,
    turns: turns.value.map((turn) => ({
      content: turn.text,
      seed: turn.seed,
      replies: arms.value.map((arm) => {
        const reply = replyOf(turn, arm);
        return {
          profile: arm.profile,
          strength: reply?.strength ?? arm.strength,
          fingerprint: reply?.fingerprint ?? null,
          state: reply?.state ?? "missing",
          content: reply?.text ?? "",
          finish_reason: reply?.finish ?? null,
          outcome: reply?.outcome ?? null,
          prompt: reply?.prompt ?? null,
          trace: reply?.trace ?? [],
        };
      }),
    })),
  };
  return JSON.stringify(shown, null, 2);
}
