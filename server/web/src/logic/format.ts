/** Figures as people read them. */

export const DASH = "–";
const MINUS = "\u2212";

export function fixed(value: number | null | undefined, digits = 2): string {
  if (value === null || value === undefined || !Number.isFinite(value)) return DASH;
  const text = Math.abs(value).toFixed(digits);
  return value < 0 && Number(text) !== 0 ? MINUS + text : text;
}

export function signed(value: number | null | undefined, digits = 1): string {
  const text = fixed(value, digits);
  return value && value > 0 && Number(text) !== 0 ? `+${text}` : text;
}

export function percent(value: number | null | undefined, digits = 0): string {
  return value === null || value === undefined || !Number.isFinite(value)
    ? DASH
    : `${fixed(100 * value, digits)} %`;
}

/** A strength, as short as it can be said. */
export function strengthText(value: number): string {
  return String(Number(value.toPrecision(3))).replace("-", MINUS);
}

export function seconds(value: number | null | undefined): string {
  if (value === null || value === undefined || !Number.isFinite(value)) return DASH;
  if (value < 0.001) return `${Number((1e6 * value).toPrecision(2))} µs`;
  if (value < 1) return `${Number((1000 * value).toPrecision(value < 0.1 ? 2 : 3))} ms`;
  return `${value < 10 ? value.toFixed(2) : value.toFixed(0)} s`;
}

export function count(value: number): string {
  return value.toLocaleString("en", { maximumFractionDigits: 0 });
}

export function interval(low: number | null, high: number | null, digits = 2): string {
  return low === null || high === null ? "" : `[${fixed(low, digits)}, ${fixed(high, digits)}]`;
}

/** A moment given in seconds since 1970. */
export function moment(time: number): string {
  return new Date(time * 1000).toISOString().slice(0, 16).replace("T", " ") + " UTC";
}

/** The next number up of one significant digit: 0.6 of 0.52. */
export function roundUp(value: number): number {
  if (!(value > 0)) return 0;
  const digit = 10 ** Math.floor(Math.log10(value));
  return Number((Math.ceil(value / digit - 1e-9) * digit).toPrecision(1));
}
