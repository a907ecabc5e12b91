import { expect, test } from "vitest";
import { difference } from "../src/logic/difference";
import { waiting, type Reply } from "../src/logic/reply";
import type { Outcome } from "../src/types";

const reply = (
  text: string,
  outcome: Outcome | null = "answer",
  state: Reply["state"] = "done",
) => ({
  ...waiting("some", null, 0),
  text,
  outcome,
  state,
});

test("the same words are the same", () => {
  expect(difference(reply("Sure."), reply("Sure."))).toEqual({
    kind: "same",
    summary: "Same words as raw",
    ranges: [],
  });
});

test("another outcome is said first, and words that raw has not are marked without the blank", () => {
  const text = "I can't help you bake.";
  const found = difference(reply(text, "refusal"), reply("Sure, help you bake."))!;
  expect(found.kind).toBe("outcome");
  expect(found.summary).toBe("Refuses where raw answers");
  expect(found.ranges.map(([start, end]) => text.slice(start, end))).toEqual(["I can't"]);
});

test("with the same outcome the share of other words is said", () => {
  const text = "Here is one way to bake";
  const found = difference(reply(text), reply("Here is a way to bake"))!;
  expect(found.kind).toBe("words");
  expect(found.summary).toBe("Same outcome as raw, 13 % other words");
  expect(found.ranges.map(([start, end]) => text.slice(start, end))).toEqual(["one"]);
});

test("a reply that is only shorter has nothing to mark", () => {
  expect(difference(reply("Here is"), reply("Here is a way"))).toMatchObject({
    summary: "Same outcome as raw, shorter",
    ranges: [],
  });
});

test("there is nothing to say while one of them is under way, or has failed", () => {
  expect(difference(reply("Su", null, "streaming"), reply("Sure."))).toBeNull();
  expect(difference(reply("Sure."), reply("Su", null, "waiting"))).toBeNull();
  expect(difference(reply("Sure."), reply("Su", null, "failed"))).toBeNull();
});
