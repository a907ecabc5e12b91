import { expect, test } from "vitest";
import {
  DEFAULTS,
  fromLink,
  MOST_ARMS,
  MOST_TURNS,
  toLink,
  type Comparison,
} from "../src/logic/link";

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

test("a link cannot ask for more columns than the page has, or for replies without end", () => {
  expect(fromLink("arm=a&".repeat(20)).arms).toHaveLength(MOST_ARMS);
  expect(fromLink("turn=Hi&".repeat(2000)).turns).toHaveLength(MOST_TURNS);
});

test("turns without words are left out, with their seeds", () => {
  const { turns } = fromLink("turn=One&turn=+&turn=Three&turn-seed=1&turn-seed=2&turn-seed=3");
  expect(turns).toEqual([
    { text: "One", seed: 1 },
    { text: "Three", seed: 3 },
  ]);
});

test("strengths that the API refuses are as if they were not there", () => {
  const strengths = (link: string) => fromLink(link).arms.map((arm) => arm.strength);
  expect(strengths("arm=a~1e308&arm=a~-20000&arm=a~Infinity&arm=a~-1.5")).toEqual([
    null,
    null,
    null,
    -1.5,
  ]);
});

test("any link is read, and says the same again when it is written anew", () => {
  const names = ["arm", "turn", "turn-seed", "seed", "temperature", "max-tokens", "tint", "x"];
  const values = [
    "~",
    "a~~1",
    "%",
    "%ff",
    "%00",
    "-0",
    "1e309",
    "0x10",
    " 7 ",
    "<b>",
    "\ud800",
    "=&",
  ];
  let state = 1;
  const draw = (n: number) => {
    state = (state * 48271) % 2147483647;
    return state % n;
  };
  for (let i = 0; i < 2000; i++) {
    const link = Array.from(
      { length: draw(9) },
      () => `${names[draw(names.length)]}=${values[draw(values.length)]}`,
    ).join("&");
    const once = fromLink(link);
    expect(fromLink(query(toLink(once)))).toEqual(once);
  }
});
