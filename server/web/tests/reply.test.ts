import { expect, test } from "vitest";
import { add, cut, segments, waiting, words, type Reply } from "../src/logic/reply";
import type { CompareChoice, TokenTrace } from "../src/types";

const token = (text: string, offset: number): TokenTrace => ({
  token: text,
  offset,
  answer_probability: 0.5,
  benign_probability: null,
  edit_norm: 0,
});

const choice = (change: Partial<CompareChoice>): CompareChoice => ({
  index: 0,
  delta: {},
  finish_reason: null,
  ...change,
});

const RECEIPT = {
  profile: "llm-va",
  fingerprint: "f00d",
  strength: 0.5,
  refusal_score: 2,
  answer_probability: 0.1,
  benign_probability: 0.9,
  outcome: "refusal" as const,
};
const STREAM = [
  choice({ delta: { role: "assistant", content: "" }, steering: { profile: "llm-va" } }),
  choice({
    steering: {
      prompt: {
        refusal_score: 2,
        answer_probability: 0.1,
        benign_probability: 0.9,
        prompt_class: "benign",
      },
    },
  }),
  choice({ delta: { content: "No" }, steering: { trace: [token("No", 0)] } }),
  choice({ delta: { content: " way" }, steering: { trace: [token(" way", 2)] } }),
  choice({
    finish_reason: "stop",
    steering: RECEIPT,
    usage: { prompt_tokens: 9, completion_tokens: 3 },
  }),
];

test("the events of an arm add up to a reply, one by one or at once", () => {
  const start = waiting("llm-va", null, 100);
  const once = add(start, STREAM, 350);
  let bit: Reply = start;
  for (const each of STREAM) bit = add(bit, [each], 350);
  expect(bit).toEqual(once);
  expect(once).toMatchObject({
    state: "done",
    text: "No way",
    outcome: "refusal",
    finish: "stop",
    strength: 0.5,
    fingerprint: "f00d",
    first: 250,
    took: 250,
    prompt: { refusal_score: 2, prompt_class: "benign" },
    usage: { completion_tokens: 3 },
  });
  expect(once.trace.map((each) => each.token)).toEqual(["No", " way"]);
  expect(start.trace).toEqual([]);
});

test("an arm that fails says why and keeps its text", () => {
  const failed = add(
    waiting("raw", null, 0),
    [STREAM[2]!, choice({ finish_reason: "error", error: { message: "No room." } })],
    1,
  );
  expect(failed).toMatchObject({ state: "failed", error: "No room.", text: "No" });
  expect(add(failed, [STREAM[3]!], 2)).toBe(failed);
});

test("cutting leaves replies alone that have ended", () => {
  const done = add(waiting("raw", null, 0), STREAM, 1);
  expect(cut(done, "stopped", 2)).toBe(done);
  expect(cut(waiting("raw", null, 0), "failed", 2)).toMatchObject({
    state: "failed",
    took: 2,
  });
});

test("segments follow the tokens, whose offsets count characters and not code units", () => {
  const found = segments("🙂 añb", [token("🙂", 0), token(" a", 1), token("ñ", 3), token("b", 4)]);
  expect(found.map(({ text, index }) => [text, index])).toEqual([
    ["🙂", 0],
    [" a", 1],
    ["ñ", 2],
    ["b", 3],
  ]);
  expect(found.map(({ start }) => start)).toEqual([0, 2, 4, 5]);
});

test("tokens that are parts of one character show as one segment, the last of them", () => {
  const found = segments("🙂!", [token("\\xf0", 0), token("\\x9f", 0), token("!", 1)]);
  expect(found.map(({ text, index }) => [text, index])).toEqual([
    ["🙂", 1],
    ["!", 2],
  ]);
});

test("nothing of the text is lost, whatever the trace says", () => {
  for (const trace of [[], [token("x", 3)], [token("x", 0), token("y", 99)]]) {
    const text = "one  two\nthree ";
    expect(
      segments(text, trace)
        .map((each) => each.text)
        .join(""),
    ).toBe(text);
  }
});

test("words keep the white space before them", () => {
  expect(words(" a  bc\n")).toEqual([
    { text: " a", start: 0 },
    { text: "  bc", start: 2 },
    { text: "\n", start: 6 },
  ]);
});
