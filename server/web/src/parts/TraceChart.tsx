import { useMemo } from "preact/hooks";
import type { TokenTrace } from "../types";
import { mostEdit } from "../comparison";
import { Chart, type Data } from "./Chart";

interface Props {
  profile: string;
  trace: readonly TokenTrace[];
  at: number | null;
  onAt: (index: number | null) => void;
}

/** Both probes and the size of the edit over a reply's tokens. */
export function TraceChart({ profile, trace, at, onAt }: Props) {
  const most = mostEdit.value;
  const data = useMemo<Data>(
    () => [
      trace.map((_, i) => i),
      trace.map((token) => token.edit_norm),
      trace.map((token) => token.benign_probability),
      trace.map((token) => token.answer_probability),
    ],
    [trace],
  );
  return (
    <Chart
      label={`Trace of ${profile}: ${trace.length} tokens, ${described(trace)}`}
      height={82}
      data={data}
      at={at}
      onAt={onAt}
      structure={`${most}`}
      make={(colour) => {
        const [ink, line] = [colour("--muted"), colour("--line")];
        const dots = { show: false };
        return {
          padding: [6, 4, 7, 0],
          cursor: { points: { size: 6 }, x: true },
          scales: {
            x: { time: false, range: (_, low, high) => [low, Math.max(high, low + 1)] },
            p: { range: [0, 1] },
            edit: { range: [0, most || 1] },
          },
          axes: [
            { show: false },
            {
              scale: "p",
              size: 26,
              gap: 4,
              splits: () => [0, 0.5, 1],
              values: () => ["0", "½", "1"],
              stroke: ink,
              font: "11px Inter Variable, system-ui, sans-serif",
              grid: { stroke: line, width: 1 },
              ticks: { show: false },
            },
          ],
          series: [
            {},
            {
              scale: "edit",
              stroke: colour("--edit-line"),
              fill: colour("--edit-fill"),
              width: 1,
              points: dots,
            },
            { scale: "p", stroke: colour("--benign"), width: 1.75, dash: [5, 3], points: dots },
            { scale: "p", stroke: colour("--answer"), width: 2, points: dots },
          ],
        };
      }}
    />
  );
}

function described(trace: readonly TokenTrace[]): string {
  const ends = (pick: (token: TokenTrace) => number | null) => {
    const values = trace.map(pick).filter((value): value is number => value !== null);
    if (!values.length) return "not read";
    return `from ${values[0]!.toFixed(2)} to ${values.at(-1)!.toFixed(2)}`;
  };
  return (
    `answer probability ${ends((t) => t.answer_probability)}, ` +
    `benign probability ${ends((t) => t.benign_probability)}, ` +
    `size of the edit ${ends((t) => t.edit_norm)}`
  );
}
