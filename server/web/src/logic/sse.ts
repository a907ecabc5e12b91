/** Server-sent events, as far as this API uses them: `data:` lines, ended by a blank one. */

/** Makes a function that takes pieces of a stream and returns the data of the events completed. */
export function eventParser(): (piece: string) => string[] {
  let rest = "";
  let data: string[] = [];
  return (piece) => {
    const lines = (rest + piece).split("\n");
    rest = lines.pop() ?? "";
    const events: string[] = [];
    for (const raw of lines) {
      const line = raw.endsWith("\r") ? raw.slice(0, -1) : raw;
      if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
      else if (line === "" && data.length) {
        events.push(data.join("\n"));
        data = [];
      }
    }
    return events;
  };
}

/** The data of a response's events, until `[DONE]` or the stream's end; returns whether it was
 * ended properly, by `[DONE]`. */
export async function* events(body: ReadableStream<Uint8Array>): AsyncGenerator<string, boolean> {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  const parse = eventParser();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return false;
      for (const event of parse(decoder.decode(value, { stream: true }))) {
        if (event === "[DONE]") return true;
        yield event;
      }
    }
  } finally {
    await reader.cancel().catch(() => undefined);
  }
}
