import { Component } from "preact";
import { useMemo } from "preact/hooks";
import { mostEdit } from "../comparison";
import { touches } from "../logic/difference";
import type { Tint } from "../logic/link";
import { segments, type Reply, type Segment } from "../logic/reply";
import type { TokenTrace } from "../types";

const STEPS = 10;
const PER_CHUNK = 48;

interface Props {
  reply: Reply;
  tint: Tint;
  /** Ranges of the text to mark as new against raw's. */
  ranges: readonly [number, number][];
  at: number | null;
  onAt: (index: number | null) => void;
}

/** A reply's text, token by token: one stop for the keyboard, with arrow keys from token to token. */
export function Tokens({ reply, tint, ranges, at, onAt }: Props) {
  const { text, trace } = reply;
  const chunks = useMemo(() => {
    const found = segments(text, trace);
    return Array.from({ length: Math.ceil(found.length / PER_CHUNK) }, (_, i) =>
      found.slice(i * PER_CHUNK, (i + 1) * PER_CHUNK),
    );
  }, [text, trace]);
  const most = tint === "edit" ? mostEdit.value : 1;
  const point = (event: Event) => {
    const index = (event.target as HTMLElement).dataset.i;
    if (index !== undefined) onAt(Number(index));
  };
  const move = (event: KeyboardEvent) => {
    const last = trace.length - 1;
    const to = {
      ArrowRight: at === null ? 0 : Math.min(at + 1, last),
      ArrowLeft: at === null ? last : Math.max(at - 1, 0),
      Home: 0,
      End: last,
      Escape: null,
    }[event.key];
    if (to === undefined || last < 0) return;
    event.preventDefault();
    onAt(to);
  };
  return (
    <div
      class={`tokens tint-${tint}`}
      tabIndex={trace.length ? 0 : undefined}
      role="group"
      aria-label={`Reply of ${reply.profile}${trace.length ? "; arrow keys go through its tokens" : ""}`}
      onPointerOver={point}
      onPointerLeave={() => onAt(null)}
      onKeyDown={move}
      onBlur={() => onAt(null)}
    >
      {chunks.map((chunk, i) => {
        const inside = at !== null && chunk.some((segment) => segment.index === at);
        return (
          <Chunk
            key={i}
            chunk={chunk}
            trace={trace}
            tint={tint}
            most={most}
            ranges={ranges}
            at={inside ? at : null}
          />
        );
      })}
      {reply.state === "streaming" && <span class="caret" aria-hidden="true" />}
    </div>
  );
}

interface ChunkProps {
  chunk: readonly Segment[];
  trace: readonly TokenTrace[];
  tint: Tint;
  most: number;
  ranges: readonly [number, number][];
  at: number | null;
}

/** Some tokens that are drawn again only when something about them changes. */
class Chunk extends Component<ChunkProps> {
  override shouldComponentUpdate(next: ChunkProps): boolean {
    const { chunk, tint, most, ranges, at } = this.props;
    if (next.tint !== tint || next.most !== most || next.ranges !== ranges || next.at !== at)
      return true;
    return (
      next.chunk.length !== chunk.length ||
      next.chunk.some(
        (segment, i) => segment.text !== chunk[i]!.text || segment.index !== chunk[i]!.index,
      )
    );
  }

  override render({ chunk, trace, tint, most, ranges, at }: ChunkProps) {
    return chunk.map((segment) => {
      const value = segment.index === null ? null : valueOf(trace[segment.index], tint);
      const names = [
        value === null ? "" : `q${step(value, most)}`,
        at !== null && segment.index === at ? "at" : "",
      ];
      return (
        <span
          key={segment.start}
          class={names.filter(Boolean).join(" ") || undefined}
          data-i={segment.index ?? undefined}
        >
          {marked(segment, ranges)}
        </span>
      );
    });
  }
}

/** The segment's text, with the words that raw has not marked. */
function marked({ text, start }: Segment, ranges: readonly [number, number][]) {
  if (!touches(start, start + text.length, ranges)) return text;
  return text
    .split(/(\s+)/u)
    .map((part, i) => (i % 2 || !part ? part : <span class="new">{part}</span>));
}

export function valueOf(token: TokenTrace | undefined, tint: Tint): number | null {
  if (!token || tint === "none") return null;
  if (tint === "edit") return token.edit_norm;
  return tint === "answer" ? token.answer_probability : token.benign_probability;
}

function step(value: number, most: number): number {
  return Math.round(STEPS * Math.min(1, Math.max(0, value / (most || 1))));
}
