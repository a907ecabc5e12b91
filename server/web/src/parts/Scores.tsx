import { fixed, signed } from "../logic/format";
import type { PromptScores } from "../types";

/** Log-odds beyond this look the same. */
const MOST_LOG_ODDS = 8;

interface Props {
  scores: PromptScores | null;
  /** Raw's, marked beside them. */
  raw: PromptScores | null;
}

/** What was read of the prompt: in figures, and as a bar each. */
export function Scores({ scores, raw }: Props) {
  const figure = (value: number | null | undefined, text: string) =>
    scores && (value ?? null) === null ? <span class="unread">not read</span> : text;
  return (
    <dl class="scores">
      <div title="Log-odds of a refusal's opening, from this profile's first logits">
        <dt>Refusal score</dt>
        <dd>{figure(scores?.refusal_score, signed(scores?.refusal_score))}</dd>
        <Meter
          class="refusal"
          middle
          at={place(scores?.refusal_score)}
          raw={place(raw?.refusal_score)}
        />
      </div>
      <div title="Probability that this profile will answer, by its own probe">
        <dt>Will answer</dt>
        <dd>{figure(scores?.answer_probability, fixed(scores?.answer_probability))}</dd>
        <Meter class="answer" at={scores?.answer_probability} raw={raw?.answer_probability} />
      </div>
      <div title="Probability that the prompt is benign, read from the unedited model">
        <dt>Benign</dt>
        <dd>{figure(scores?.benign_probability, fixed(scores?.benign_probability))}</dd>
        <Meter class="benign" at={scores?.benign_probability} raw={null} />
      </div>
    </dl>
  );
}

function place(logOdds: number | null | undefined): number | null {
  if (logOdds === null || logOdds === undefined) return null;
  return 0.5 + 0.5 * Math.min(1, Math.max(-1, logOdds / MOST_LOG_ODDS));
}

interface MeterProps {
  class: string;
  at: number | null | undefined;
  raw: number | null | undefined;
  /** The bar starts in the middle. */
  middle?: boolean;
}

function Meter({ class: name, at, raw, middle = false }: MeterProps) {
  const from = middle ? 0.5 : 0;
  const has = at !== null && at !== undefined;
  return (
    <svg class={`meter ${name}`} viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">
      <rect class="track" width="100" height="8" rx="1" />
      {has && (
        <rect
          class={`bar ${at < 0.5 ? "low" : "high"}`}
          x={100 * Math.min(from, at)}
          width={Math.max(1.5, 100 * Math.abs(at - from))}
          height="8"
          rx="1"
        />
      )}
      {middle && <line class="zero" x1="50" x2="50" y1="0" y2="8" />}
      {raw !== null && raw !== undefined && (
        <line class="raw" x1={clamp(100 * raw)} x2={clamp(100 * raw)} y1="0" y2="8" />
      )}
    </svg>
  );
}

const clamp = (x: number) => Math.min(99, Math.max(1, x));
