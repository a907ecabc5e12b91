import type { Outcome } from "../types";

const SIGNS: Record<Outcome, string> = {
  answer: "✓",
  refusal: "✕",
  degenerate: "≈",
  empty: "∅",
  error: "!",
};
const WORDS: Record<Outcome, string> = {
  answer: "Answer",
  refusal: "Refusal",
  degenerate: "Degenerate",
  empty: "Empty",
  error: "Error",
};

export function OutcomeChip({ outcome }: { outcome: Outcome }) {
  return (
    <span class={`chip ${outcome}`}>
      <span aria-hidden="true">{SIGNS[outcome]}</span> {WORDS[outcome]}
    </span>
  );
}
