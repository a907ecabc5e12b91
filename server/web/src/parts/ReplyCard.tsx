import { useComputed } from "@preact/signals";
import { useMemo, useState } from "preact/hooks";
import { keyOf, marks, mostEdit, rawArm, replies, tint, type Arm, type Turn } from "../comparison";
import { difference } from "../logic/difference";
import { fixed, seconds, strengthText } from "../logic/format";
import type { Reply } from "../logic/reply";
import { profilesByName } from "../session";
import { OutcomeChip } from "./OutcomeChip";
import { Scores } from "./Scores";
import { Tokens } from "./Tokens";
import { TraceChart } from "./TraceChart";

const NOTHING: [number, number][] = [];

/** One column's reply to one turn. */
export function ReplyCard({ turn, arm }: { turn: Turn; arm: Arm }) {
  const mine = useComputed(() => replies.value.get(keyOf(turn, arm)));
  const raw = useComputed(() => rawArm.value && replies.value.get(keyOf(turn, rawArm.value)));
  const reply = mine.value;
  const base = raw.value;
  const isRaw = rawArm.value?.id === arm.id;
  const [at, setAt] = useState<number | null>(null);
  const found = useMemo(
    () => (reply && base && !isRaw ? difference(reply, base) : null),
    [reply, base, isRaw],
  );
  if (!reply) return <article class="reply blank" aria-label={`${arm.profile}: not asked yet`} />;
  return (
    <article
      class={`reply ${reply.state} ${found?.kind ?? ""}`}
      aria-label={`Reply of ${arm.profile}`}
    >
      <header>
        <h3>
          {arm.profile}
          {!profilesByName.value.get(reply.profile)?.identity && reply.strength !== null && (
            <span class="strength" title="Strength">
              {" "}
              × {strengthText(reply.strength)}
            </span>
          )}
        </h3>
        <Outcome reply={reply} />
      </header>
      <Scores scores={reply.prompt} raw={isRaw ? null : (base?.prompt ?? null)} />
      <p class={`against ${found?.kind ?? ""}`}>
        {isRaw
          ? "The unedited model"
          : (found?.summary ?? (rawArm.value ? "\u00a0" : "No raw column to compare with"))}
      </p>
      {reply.text || reply.state !== "done" ? (
        <Tokens
          reply={reply}
          tint={tint.value}
          ranges={marks.value && found ? found.ranges : NOTHING}
          at={at}
          onAt={setAt}
        />
      ) : (
        <p class="quiet">The reply is empty.</p>
      )}
      {reply.error && <p class="failure">{reply.error}</p>}
      {reply.trace.length > 0 && (
        <>
          <Readout reply={reply} at={at} />
          <TraceChart profile={arm.profile} trace={reply.trace} at={at} onAt={setAt} />
        </>
      )}
      <footer>{summary(reply)}</footer>
    </article>
  );
}

function Outcome({ reply }: { reply: Reply }) {
  if (reply.state === "done") return reply.outcome && <OutcomeChip outcome={reply.outcome} />;
  if (reply.state === "failed") return <span class="chip error">! Failed</span>;
  if (reply.state === "stopped") return <span class="chip plain">Stopped</span>;
  return <span class="chip plain">{reply.state === "waiting" ? "Waiting" : "Writing"} …</span>;
}

/** The legend of the chart, and the figures of the token under pointer or arrow keys. */
function Readout({ reply, at }: { reply: Reply; at: number | null }) {
  const token = at === null ? undefined : reply.trace[at];
  return (
    <div class="readout" aria-live="polite">
      <span class="token">{token ? <q>{visible(token.token)}</q> : "Trace"}</span>
      <span class="key answer">answer{token && <b> {fixed(token.answer_probability)}</b>}</span>
      <span class="key benign">benign{token && <b> {fixed(token.benign_probability)}</b>}</span>
      <span class="key edit" title="The edits' change over the state">
        edit
        {token ? <b> {fixed(token.edit_norm)}</b> : mostEdit.value > 0 && ` to ${mostEdit.value}`}
      </span>
    </div>
  );
}

const visible = (token: string) => token.replaceAll("\n", "↵") || "∅";

function summary(reply: Reply): string {
  const parts = [];
  if (reply.usage) parts.push(`${reply.usage.completion_tokens} tokens`);
  if (reply.first !== null) parts.push(`first ${seconds(reply.first / 1000)}`);
  if (reply.took !== null && reply.state === "done")
    parts.push(`all ${seconds(reply.took / 1000)}`);
  if (reply.finish === "length") parts.push("cut at the limit");
  if (reply.prompt?.prompt_class === "unknown") parts.push("class of the prompt unknown");
  return parts.join(" · ");
}
