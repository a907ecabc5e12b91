/** Prometheus' text format, and what the Live view asks of it. */

export interface Sample {
  name: string;
  labels: Record<string, string>;
  value: number;
}

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?$/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;
const ESCAPES: Record<string, string> = { n: "\n", '"': '"', "\\": "\\" };

/** The samples of a page; lines that are none are left out. */
export function parse(page: string): Sample[] {
  const samples: Sample[] = [];
  for (const line of page.split("\n")) {
    if (!line || line.startsWith("#")) continue;
    const [, name, inner, number] = LINE.exec(line.trim()) ?? [];
    if (!name || !number) continue;
    const labels: Record<string, string> = {};
    for (const [, key, value] of (inner ?? "").matchAll(LABEL)) {
      labels[key!] = value!.replace(/\\(.)/g, (_, c: string) => ESCAPES[c] ?? c);
    }
    samples.push({ name, labels, value: toNumber(number) });
  }
  return samples;
}

const toNumber = (text: string) =>
  text === "+Inf" ? Infinity : text === "-Inf" ? -Infinity : Number(text);

/** Values of one moment, to be summed over labels. */
export class Snapshot {
  private readonly byName = new Map<string, Sample[]>();

  constructor(
    /** Milliseconds since 1970. */
    readonly time: number,
    samples: readonly Sample[],
  ) {
    for (const sample of samples) {
      const found = this.byName.get(sample.name);
      if (found) found.push(sample);
      else this.byName.set(sample.name, [sample]);
    }
  }

  private of(name: string, where: Record<string, string>): Sample[] {
    return (this.byName.get(name) ?? []).filter(({ labels }) =>
      Object.entries(where).every(([key, value]) => labels[key] === value),
    );
  }

  sum(name: string, where: Record<string, string> = {}): number {
    return this.of(name, where).reduce((sum, sample) => sum + sample.value, 0);
  }

  /** All values that a label has. */
  values(name: string, label: string): string[] {
    return [...new Set(this.of(name, {}).map(({ labels }) => labels[label] ?? ""))];
  }

  /** Cumulative counts of a histogram by their upper bounds, in order. */
  buckets(name: string, where: Record<string, string> = {}): [number, number][] {
    const counts = new Map<number, number>();
    for (const { labels, value } of this.of(`${name}_bucket`, where)) {
      const bound = toNumber(labels.le ?? "");
      counts.set(bound, (counts.get(bound) ?? 0) + value);
    }
    return [...counts].sort(([a], [b]) => a - b);
  }
}

/** What was added to cumulative counts since `before`; all of it after a restart, which sets them
 * back to 0. */
export function since(now: [number, number][], before: [number, number][]): [number, number][] {
  const base = new Map(before);
  if (now.some(([bound, count]) => count < (base.get(bound) ?? 0))) return now;
  return now.map(([bound, count]) => [bound, count - (base.get(bound) ?? 0)]);
}

/** A quantile, interpolated within its bucket as Prometheus' `histogram_quantile` does; null of
 * nothing. */
export function quantile(q: number, buckets: readonly [number, number][]): number | null {
  const total = buckets.at(-1)?.[1] ?? 0;
  if (!total) return null;
  const rank = q * total;
  let [low, below] = [0, 0];
  for (const [bound, count] of buckets) {
    if (count >= rank) {
      if (!Number.isFinite(bound)) return low;
      const inside = count - below;
      return inside ? low + ((bound - low) * (rank - below)) / inside : bound;
    }
    [low, below] = [bound, count];
  }
  return low;
}

/** Wilson's 95 % interval of a rate. */
export function wilson(hits: number, n: number): [number, number] {
  if (!n) return [0, 1];
  const z = 1.959964;
  const p = hits / n;
  const middle = (p + (z * z) / (2 * n)) / (1 + (z * z) / n);
  const half = (z / (1 + (z * z) / n)) * Math.sqrt((p * (1 - p)) / n + (z * z) / (4 * n * n));
  return [Math.max(0, middle - half), Math.min(1, middle + half)];
}
