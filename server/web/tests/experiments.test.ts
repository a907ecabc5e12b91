import { expect, test } from "vitest";
import { eventText } from "../src/logic/experiments";

const event = (kind: string, arm: string | null, detail = {}) =>
  eventText({ id: "1", time: 0, kind, arm, detail });

test("events are sentences, a guard-rail's with its figures", () => {
  const detail = { metric: "degenerate", rate: 0.25, limit: 0.1, n: 60 };
  expect(event("guard_rail", "treated", detail)).toBe(
    "A guard-rail stopped treated: Broken or empty 0.25, limit 0.1",
  );
  expect(event("guard_rail", "treated")).toBe("A guard-rail stopped treated");
  expect(event("registered", null)).toBe("Defined");
  expect(event("something_new", "treated")).toBe("something_new treated");
});
