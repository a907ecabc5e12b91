/** Axes that all charts over time share. */

import type uPlot from "uplot";

const FONT = "12px Inter Variable, system-ui, sans-serif";

export function timeAxis(colour: (name: string) => string): uPlot.Axis {
  return {
    stroke: colour("--muted"),
    font: FONT,
    grid: { show: false },
    ticks: { stroke: colour("--line"), size: 4 },
    space: 80,
    size: 28,
    values: (_, splits, _axis, _space, step) => splits.map((time) => clock(time, step)),
  };
}

export function valueAxis(
  colour: (name: string) => string,
  values?: (value: number) => string,
): uPlot.Axis {
  return {
    stroke: colour("--muted"),
    font: FONT,
    size: 54,
    grid: { stroke: colour("--line"), width: 1 },
    ticks: { show: false },
    ...(values && { values: (_: uPlot, splits: number[]) => splits.map(values) }),
  };
}

/** A moment as exactly as ticks `step` seconds apart need it, in the reader's time zone. */
function clock(time: number, step: number): string {
  const date = new Date(time * 1000);
  const two = (value: number) => String(value).padStart(2, "0");
  if (step >= 86400)
    return `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`;
  const minute = `${two(date.getHours())}:${two(date.getMinutes())}`;
  return step >= 60 ? minute : `${minute}:${two(date.getSeconds())}`;
}
