import { expect, test } from "vitest";
import { asCurl, asPython, toPython } from "../src/logic/snippets";
import type { CompareRequest } from "../src/types";

const REQUEST: CompareRequest = {
  messages: [{ role: "user", content: 'What\'s "up"?\n' }],
  arms: [{ profile: "raw" }, { profile: "llm-va", strength: 0 }],
  temperature: 0,
  max_tokens: 8,
  seed: 1,
  trace: true,
  stream: true,
};

test("a quote in a prompt does not end the shell's string", () => {
  expect(asCurl(REQUEST, "http://here", false)).toContain(`What'\\''s \\"up\\"?\\n`);
});

test("the key is named, never shown", () => {
  expect(asCurl(REQUEST, "http://here", true)).toContain("Bearer $PILOTHOUSE_KEY");
  expect(asPython(REQUEST, "http://here", true)).toContain('os.environ["PILOTHOUSE_KEY"]');
  expect(asPython(REQUEST, "http://here", false)).not.toContain("environ");
});

test("values become Python's", () => {
  expect(toPython({ a: true, b: null, c: undefined, d: "x'y" })).toBe(
    '{"a": True, "b": None, "d": "x\'y"}',
  );
  expect(asPython(REQUEST, "http://here", false)).toContain('"stream": False');
});
