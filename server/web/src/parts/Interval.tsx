import { fixed, interval } from "../logic/format";

export interface Estimate {
  value: number | null;
  low: number | null;
  high: number | null;
}

interface Props {
  /** What the figure is of, for those who do not see the drawing. */
  label: string;
  mine: Estimate;
  /** What it is compared with, drawn in grey. */
  base?: Estimate | null;
  /** Ends of the scale. */
  from?: number;
  to?: number;
  /** A limit, drawn across. */
  limit?: number | null;
}

/** A figure and its interval, on a scale. */
export function IntervalPlot({ label, mine, base = null, from = 0, to = 1, limit = null }: Props) {
  const x = (value: number) => 100 * Math.min(1, Math.max(0, (value - from) / (to - from)));
  const said = `${label}: ${fixed(mine.value)} ${interval(mine.low, mine.high)}`;
  const against = base ? `, against ${fixed(base.value)} ${interval(base.low, base.high)}` : "";
  return (
    <svg
      class="interval"
      viewBox="-2 0 104 20"
      preserveAspectRatio="none"
      role="img"
      aria-label={said + against}
    >
      <line class="axis" x1="0" x2="100" y1="10" y2="10" />
      {from < 0 && to > 0 && <line class="zero" x1={x(0)} x2={x(0)} y1="1" y2="19" />}
      {limit !== null && <line class="limit" x1={x(limit)} x2={x(limit)} y1="1" y2="19" />}
      {base && <Bar class="base" estimate={base} x={x} y={6.5} />}
      <Bar class="mine" estimate={mine} x={x} y={base ? 13.5 : 10} />
    </svg>
  );
}

interface BarProps {
  class: string;
  estimate: Estimate;
  x: (value: number) => number;
  y: number;
}

function Bar({ class: name, estimate: { value, low, high }, x, y }: BarProps) {
  return (
    <g class={name}>
      {low !== null && high !== null && (
        <line class="range" x1={x(low)} x2={x(high)} y1={y} y2={y} />
      )}
      {value !== null && (
        <line class="point" x1={x(value)} x2={x(value)} y1={y - 3.5} y2={y + 3.5} />
      )}
    </g>
  );
}
