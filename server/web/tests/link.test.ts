import { expect, test } from "vitest";
import { DEFAULTS, fromLink, MOST_ARMS, toLink, type Comparison } from "../src/logic/link";

const query = (link: string) => link.split("?").slice(1).join("?");

const FULL: Comparison = {
  arms: [
    { profile: "raw", strength: null },
    { profile: "a~b", strength: 0 },
    { profile: "llm-va", strength: 1.25 },
  ],
  turns: [
    { text: "What is 1+1 & why?\n#no %20 tricks", seed: 3 },
    { text: "Ω 🙂", seed: 4 },
  ],
  settings: { temperature: 0.7, maxTokens: 32, seed: 3, system: "Be brief.", trace: false },
  tint: "edit",
  marks: false,
};

test("a link brings back the whole comparison", () => {
  expect(fromLink(query(toLink(FULL)))).toEqual(FULL);
});

test("what is as usual is not in the link", () => {
  const usual = { arms: [], turns: [], settings: DEFAULTS, tint: "answer", marks: true } as const;
  expect(toLink({ ...usual, arms: [], turns: [] })).toBe("#/compare");
  const one = { ...usual, arms: [], turns: [{ text: "Hi", seed: 1 }] };
  expect(toLink(one)).toBe("#/compare?turn=Hi");
  expect(fromLink("turn=Hi")).toEqual(one);
});

test("nonsense in a link is as if it were not there", () => {
  const found = fromLink(
    "temperature=hot&max-tokens=-3&seed=1.5&tint=pink&turn=Hi&turn-seed=x&arm=a&arm=b~&arm=c~NaN",
  );
  expect(found.settings).toEqual(DEFAULTS);
  expect(found.tint).toBe("answer");
  expect(found.turns).toEqual([{ text: "Hi", seed: 1 }]);
  expect(found.arms.map((arm) => arm.strength)).toEqual([null, null, null]);
});

test("a link cannot ask for more columns than the page has", () => {
  expect(fromLink("arm=a&".repeat(20)).arms).toHaveLength(MOST_ARMS);
});
