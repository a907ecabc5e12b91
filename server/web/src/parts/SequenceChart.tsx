import { useMemo } from "preact/hooks";
import type { Look } from "../logic/experiments";
import { interval, signed } from "../logic/format";
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
  const most = Math.min(
    1,
    1.15 *
      Math.max(
        margin,
        ...looks
          .slice(-Math.ceil(looks.length * 0.8))
          .flatMap((l) => [Math.abs(l.low), Math.abs(l.high)]),
      ),
  );
  return (
    <Chart
      label={`Difference of ${arm} over time, now ${signed(last.value, 3)} ${interval(last.low, last.high, 3)}`}
      height={220}
      data={data}
      structure={`${margin} ${most}`}
      make={(colour) => {
        const [ink, line, accent] = [colour("--muted"), colour("--line"), colour("--accent")];
        const font = "12px Inter Variable, system-ui, sans-serif";
        return {
          padding: [8, 12, 0, 0],
          scales: { y: { range: [-most, most] } },
          axes: [
            { stroke: ink, font, grid: { show: false }, ticks: { stroke: line, size: 4 } },
            {
              stroke: ink,
              font,
              size: 54,
              grid: { stroke: line, width: 1 },
              ticks: { show: false },
              values: (_, splits) => splits.map((split) => signed(split, 2)),
            },
          ],
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
