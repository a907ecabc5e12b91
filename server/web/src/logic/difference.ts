/** How a reply differs from raw's. */

import { diffArrays } from "diff";
import { ended, words, type Reply } from "./reply";

export interface Difference {
  kind: "same" | "words" | "outcome";
  /** In words, for the line above the reply. */
  summary: string;
  /** Ranges `[start, end)` of this reply's text that raw's has not, in UTF-16 code units. */
  ranges: [number, number][];
}

const DOES: Record<string, string> = {
  answer: "answers",
  refusal: "refuses",
  degenerate: "breaks down",
  empty: "says nothing",
};

/** The difference, or null while one of the two has not ended. */
export function difference(reply: Reply, raw: Reply): Difference | null {
  if (!ended(reply) || !ended(raw) || reply.state === "failed" || raw.state === "failed")
    return null;
  if (reply.text === raw.text) return { kind: "same", summary: "Same words as raw", ranges: [] };
  const ranges = newIn(reply.text, raw.text);
  const [mine, its] = [DOES[reply.outcome ?? ""], DOES[raw.outcome ?? ""]];
  if (mine && its && mine !== its) {
    return { kind: "outcome", summary: `${capital(mine)} where raw ${its}`, ranges };
  }
  const changed =
    ranges.reduce((sum, [start, end]) => sum + end - start, 0) / (reply.text.length || 1);
  const share = Math.max(1, Math.round(100 * changed));
  const same = mine && its ? "Same outcome as raw, " : "";
  const summary = ranges.length ? `${share} % other words` : "shorter";
  return { kind: "words", summary: same ? same + summary : `${capital(summary)} than raw`, ranges };
}

function newIn(text: string, base: string): [number, number][] {
  const [mine, its] = [words(text), words(base)];
  const changes = diffArrays(
    its.map((word) => word.text.trim()),
    mine.map((word) => word.text.trim()),
  );
  const ranges: [number, number][] = [];
  let at = 0;
  for (const change of changes) {
    if (change.removed) continue;
    const [first, last] = [mine[at], mine[at + change.value.length - 1]];
    at += change.value.length;
    if (change.added && first && last) {
      const blank = first.text.length - first.text.trimStart().length;
      ranges.push([first.start + blank, last.start + last.text.length]);
    }
  }
  return ranges;
}

/** True where a segment lies in one of the ranges, at least in part. */
export function touches(start: number, end: number, ranges: readonly [number, number][]): boolean {
  return ranges.some(([from, to]) => start < to && end > from);
}

const capital = (text: string) => text.charAt(0).toUpperCase() + text.slice(1);
