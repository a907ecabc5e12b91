/** One column's reply to one turn, and how the events of a comparison add to it. */

import type { CompareChoice, Outcome, PromptScores, TokenTrace, Usage } from "../types";

export type State = "waiting" | "streaming" | "done" | "stopped" | "failed";

export interface Reply {
  state: State;
  text: string;
  trace: TokenTrace[];
  prompt: PromptScores | null;
  outcome: Outcome | null;
  finish: "stop" | "length" | null;
  error: string | null;
  usage: Usage | null;
  profile: string;
  strength: number | null;
  fingerprint: string;
  /** Milliseconds: when it was asked for, until the first text, and in all. */
  asked: number;
  first: number | null;
  took: number | null;
}

export function waiting(profile: string, strength: number | null, asked: number): Reply {
  return {
    state: "waiting",
    text: "",
    trace: [],
    prompt: null,
    outcome: null,
    finish: null,
    error: null,
    usage: null,
    profile,
    strength,
    fingerprint: "",
    asked,
    first: null,
    took: null,
  };
}

export const ended = (reply: Reply): boolean =>
  reply.state !== "waiting" && reply.state !== "streaming";

/** The reply after some events of its arm. */
export function add(reply: Reply, choices: readonly CompareChoice[], now: number): Reply {
  if (ended(reply) || !choices.length) return reply;
  const next: Reply = { ...reply, state: "streaming" };
  let trace: TokenTrace[] | null = null;
  for (const { delta, steering, finish_reason, usage, error } of choices) {
    if (delta?.content) {
      next.text += delta.content;
      next.first ??= now - next.asked;
    }
    if (steering?.trace?.length) (trace ??= [...next.trace]).push(...steering.trace);
    if (steering?.prompt) next.prompt = steering.prompt;
    if (steering?.profile) {
      next.profile = steering.profile;
      next.fingerprint = steering.fingerprint ?? "";
      next.strength = steering.strength ?? null;
    }
    if (usage) next.usage = usage;
    if (finish_reason === null || finish_reason === undefined) continue;
    next.took = now - next.asked;
    if (finish_reason === "error") {
      next.state = "failed";
      next.error = error?.message ?? "The server could not finish this reply.";
      continue;
    }
    next.state = "done";
    next.finish = finish_reason;
    next.outcome = steering?.outcome ?? null;
    if (steering && "refusal_score" in steering) {
      next.prompt = {
        ...next.prompt,
        refusal_score: steering.refusal_score ?? null,
        answer_probability: steering.answer_probability ?? null,
        benign_probability: steering.benign_probability ?? null,
      };
    }
  }
  if (trace) next.trace = trace;
  return next;
}

/** The reply after its user, or its server, ended it early. */
export function cut(reply: Reply, state: "stopped" | "failed", now: number): Reply {
  return ended(reply) ? reply : { ...reply, state, took: now - reply.asked };
}

export interface Segment {
  text: string;
  /** Position in UTF-16 code units. */
  start: number;
  /** Index into the reply's trace; null for text that no traced token begins in. */
  index: number | null;
}

/** The text cut at its tokens; at its words where there is no trace. */
export function segments(text: string, trace: readonly TokenTrace[]): Segment[] {
  if (!trace.length) {
    return words(text).map(({ text, start }) => ({ text, start, index: null }));
  }
  const found: Segment[] = [];
  let [units, points] = [0, 0];
  const advance = (to: number) => {
    const start = units;
    for (; points < to && units < text.length; points++)
      units += text.codePointAt(units)! > 0xffff ? 2 : 1;
    return start;
  };
  if (trace[0]!.offset > 0) {
    const start = advance(trace[0]!.offset);
    found.push({ text: text.slice(start, units), start, index: null });
  }
  trace.forEach((_, index) => {
    const start = advance(trace[index + 1]?.offset ?? Infinity);
    // A token that is only a part of a character shows with the one that completes it.
    if (units > start) found.push({ text: text.slice(start, units), start, index });
  });
  return found;
}

/** Words with the white space before each. */
export function words(text: string): { text: string; start: number }[] {
  return [...text.matchAll(/\s*\S+|\s+$/gu)].map((match) => ({
    text: match[0],
    start: match.index,
  }));
}
