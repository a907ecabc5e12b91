import { expect, test } from "vitest";
import { eventParser, events } from "../src/logic/sse";

test("events come out whole however the stream is cut", () => {
  const stream = 'data: {"a": 1}\n\ndata: zwei\r\n\r\n: a comment\n\ndata: [DONE]\n\n';
  for (let size = 1; size <= stream.length; size++) {
    const parse = eventParser();
    const found: string[] = [];
    for (let at = 0; at < stream.length; at += size)
      found.push(...parse(stream.slice(at, at + size)));
    expect(found).toEqual(['{"a": 1}', "zwei", "[DONE]"]);
  }
});

test("an event that has not ended is kept back, and one of several lines is joined", () => {
  const parse = eventParser();
  expect(parse("data: one\ndata: two\n")).toEqual([]);
  expect(parse("\n")).toEqual(["one\ntwo"]);
});

function body(...pieces: Uint8Array[]): ReadableStream<Uint8Array> {
  return new ReadableStream({
    start(controller) {
      pieces.forEach((piece) => controller.enqueue(piece));
      controller.close();
    },
  });
}

async function read(stream: ReadableStream<Uint8Array>): Promise<[string[], boolean]> {
  const found: string[] = [];
  const reading = events(stream);
  for (;;) {
    const step = await reading.next();
    if (step.done) return [found, step.value];
    found.push(step.value);
  }
}

test("a character may be cut between two pieces", async () => {
  const bytes = new TextEncoder().encode("data: wörld 🙂\n\ndata: [DONE]\n\n");
  for (let cut = 0; cut <= bytes.length; cut++) {
    expect(await read(body(bytes.slice(0, cut), bytes.slice(cut)))).toEqual([["wörld 🙂"], true]);
  }
});

test("a stream that ends early says so", async () => {
  const bytes = new TextEncoder().encode("data: one\n\ndata: tw");
  expect(await read(body(bytes))).toEqual([["one"], false]);
});
