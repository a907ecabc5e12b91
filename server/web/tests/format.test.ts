import { expect, test } from "vitest";
import {
  fixed,
  interval,
  percent,
  roundUp,
  seconds,
  signed,
  strengthText,
} from "../src/logic/format";

test("what was not read is a dash", () => {
  for (const said of [fixed(null), signed(undefined), percent(NaN), seconds(null)]) {
    expect(said).toBe("\u2013");
  }
  expect(interval(null, 1)).toBe("");
});

test("figures have signs where they matter, and none at zero", () => {
  expect(signed(2.46)).toBe("+2.5");
  expect(signed(-2.46)).toBe("\u22122.5");
  expect([signed(0.01), signed(-0.01), fixed(-0.001)]).toEqual(["0.0", "0.0", "0.00"]);
  expect(strengthText(0.30000000000000004)).toBe("0.3");
  expect(percent(0.945)).toMatch(/^9[45] %$/);
});

test("times have the unit that suits them", () => {
  expect([seconds(0.0005), seconds(0.0123), seconds(0.5), seconds(2.346), seconds(75)]).toEqual([
    "500 µs",
    "12 ms",
    "500 ms",
    "2.35 s",
    "75 s",
  ]);
});

test("numbers are rounded up to one digit", () => {
  expect([0, 0.52, 0.6, 0.051, 1, 1.1, 37].map(roundUp)).toEqual([0, 0.6, 0.6, 0.06, 1, 2, 40]);
});
