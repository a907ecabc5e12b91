import { useMemo } from "preact/hooks";
import type { Look } from "../logic/experiments";
import { interval, signed } from "../logic/format";
import { timeAxis, valueAxis } from "./axes";
import { Chart, type Data } from "./Chart";

interface Props {
  arm: string;
  looks: readonly Look[];
  margin: number;
}

/** A difference and its confidence sequence over time; grey where it would not matter. */
export function SequenceChart({ arm, looks, margin }: Props) {
  const data = useMemo<Data>(() => {
    // uPlot wants rising times; looks of one moment count as one.
    const shown = looks.filter((look, i) => look.time < (looks[i + 1]?.time ?? Infinity));
    return [
      shown.map((look) => look.time),
      shown.map((look) => look.high),
      shown.map((look) => look.low),
      shown.map((look) => look.value),
    ];
  }, [looks]);
  const last = looks.at(-1)!;
  const [low, high] = bounds(looks, margin);
  return (
    <Chart
      label={`Difference of ${arm} over time, now ${signed(last.value, 3)} ${interval(last.low, last.high, 3)}`}
      height={220}
      data={data}
      structure={`${margin} ${low} ${high}`}
      make={(colour) => {
        const accent = colour("--accent");
        return {
          padding: [8, 28, 0, 0],
          scales: { y: { range: [low, high] } },
          axes: [timeAxis(colour), valueAxis(colour, (value) => signed(value, 2))],
          series: [
            {},
            { stroke: accent, width: 1, points: { show: false } },
            { stroke: accent, width: 1, points: { show: false } },
            { stroke: accent, width: 2.5, points: { show: false } },
          ],
          bands: [{ series: [1, 2], fill: colour("--accent-soft") }],
          hooks: {
            drawAxes: [
              (u) => {
                const { left, width } = u.bbox;
                const [top, middle, bottom] = [margin, 0, -margin].map((y) =>
                  u.valToPos(y, "y", true),
                ) as [number, number, number];
                u.ctx.save();
                u.ctx.fillStyle = colour("--sunken");
                u.ctx.fillRect(left, top, width, bottom - top);
                u.ctx.fillStyle = colour("--strong-line");
                u.ctx.fillRect(left, middle - 0.5, width, 1);
                u.ctx.restore();
              },
            ],
          },
        };
      }}
    />
  );
}

/** Ends of the scale: all but the first, widest intervals, zero, and the margin around it. */
function bounds(looks: readonly Look[], margin: number): [number, number] {
  const settled = looks.slice(-Math.ceil(looks.length * 0.9));
  const low = Math.min(-2 * margin, ...settled.map((look) => look.low));
  const high = Math.max(2 * margin, ...settled.map((look) => look.high));
  const more = 0.06 * (high - low);
  return [Math.max(-1, low - more), Math.min(1, high + more)];
}
