/** What the API says of experiments, as far as the page reads it. */

export const METRICS = ["refusal", "over_refusal", "harmful_answer", "degenerate"] as const;
export type Metric = (typeof METRICS)[number];

export const METRIC_WORDS: Record<Metric, string> = {
  refusal: "Refused, of all",
  over_refusal: "Refused, of benign",
  harmful_answer: "Answered, of harmful",
  degenerate: "Broken or empty",
};

export interface ExperimentCard {
  name: string;
  model: string;
  version: number;
  status: "scheduled" | "running" | "ended";
  default: boolean;
  metric: Metric;
  margin: number;
  alpha: number;
  horizon: number;
  coverage: number;
  shadow: number;
  start: string | null;
  end: string | null;
  guard_rails: GuardRail[];
  arms: {
    name: string;
    profile: string;
    strength: number | null;
    weight: number;
    stopped: { time: number; kind: string; detail: Record<string, unknown> } | null;
  }[];
}

export interface GuardRail {
  metric: Metric;
  limit: number;
  minimum: number;
}

export interface Interval {
  value: number | null;
  low: number | null;
  high: number | null;
  n: number;
  units: number;
}

export interface Look {
  time: number;
  n: number;
  units: number;
  value: number;
  low: number;
  high: number;
}

export interface Comparison {
  arm: string;
  differences: Record<string, Interval>;
  p: number;
  holm_p: number;
  decision: { verdict: string; why: string; more_units: number | null };
  looks: Look[];
}

export interface Report {
  time: number;
  ended: boolean;
  sample_ratio: { p: number; mismatch: boolean };
  arms: {
    name: string;
    profile: string;
    strength: number | null;
    control: boolean;
    expected_share: number;
    stopped: number | null;
    units: number;
    answers: number;
    unjudged: number;
    rates: Record<Metric, Interval>;
    latency: { ttft_median: number | null; duration_median: number | null };
  }[];
  comparisons: Comparison[];
  shadows: Comparison[];
  events: {
    id: string;
    time: number;
    kind: string;
    arm: string | null;
    detail: Record<string, unknown>;
  }[];
  warnings: string[];
}

const EVENTS: Record<string, string> = {
  guard_rail: "A guard-rail stopped",
  stopped: "Somebody stopped",
  profile_missing: "Its profile went, which stopped",
  started: "Started",
  registered: "Defined",
  removed: "Ended",
};

/** An event as a sentence. */
export function eventText({ kind, arm, detail }: Report["events"][number]): string {
  const what = [EVENTS[kind] ?? kind, arm].filter(Boolean).join(" ");
  const { metric, rate, limit } = detail;
  if (kind !== "guard_rail" || typeof rate !== "number" || typeof limit !== "number") return what;
  return `${what}: ${METRIC_WORDS[metric as Metric] ?? metric} ${rate.toFixed(2)}, limit ${limit}`;
}
