/** A comparison as an address. It stands behind the `#`, which browsers send to no server. */

export const MOST_ARMS = 4;
export const LEAST_ARMS = 2;
/** Of a link: whoever follows one asks for all its replies, with a key of theirs. */
export const MOST_TURNS = 50;
/** As the API has it. */
const MOST_STRENGTH = 10_000;
export const TINTS = ["answer", "benign", "edit", "none"] as const;
export type Tint = (typeof TINTS)[number];

export interface ArmState {
  profile: string;
  /** Null: the profile's own. */
  strength: number | null;
}

export interface TurnState {
  text: string;
  seed: number;
}

export interface Settings {
  temperature: number;
  /** Null: as many as the server allows by itself. */
  maxTokens: number | null;
  seed: number;
  system: string;
  trace: boolean;
}

export interface Comparison {
  arms: ArmState[];
  turns: TurnState[];
  settings: Settings;
  tint: Tint;
  marks: boolean;
}

export const DEFAULTS: Settings = {
  temperature: 0,
  maxTokens: null,
  seed: 1,
  system: "",
  trace: true,
};

export function toLink(comparison: Comparison): string {
  const { arms, turns, settings, tint, marks } = comparison;
  const query = new URLSearchParams();
  for (const arm of arms) {
    query.append("arm", arm.strength === null ? arm.profile : `${arm.profile}~${arm.strength}`);
  }
  for (const turn of turns) query.append("turn", turn.text);
  if (turns.some((turn) => turn.seed !== settings.seed)) {
    for (const turn of turns) query.append("turn-seed", String(turn.seed));
  }
  if (settings.temperature !== DEFAULTS.temperature)
    query.set("temperature", String(settings.temperature));
  if (settings.maxTokens !== DEFAULTS.maxTokens)
    query.set("max-tokens", String(settings.maxTokens));
  if (settings.seed !== DEFAULTS.seed) query.set("seed", String(settings.seed));
  if (settings.system) query.set("system", settings.system);
  if (!settings.trace) query.set("trace", "0");
  if (tint !== "answer") query.set("tint", tint);
  if (!marks) query.set("marks", "0");
  const text = query.toString();
  return text ? `#/compare?${text}` : "#/compare";
}

/** The comparison of a link's query; whatever makes no sense in it is as if it were not there. */
export function fromLink(search: string): Comparison {
  const query = new URLSearchParams(search);
  const number = <T>(name: string, low: number, high: number, fallback: T, whole = false) => {
    const value = toNumber(query.get(name));
    return value >= low && value <= high && (!whole || Number.isInteger(value)) ? value : fallback;
  };
  const settings: Settings = {
    temperature: number("temperature", 0, 2, DEFAULTS.temperature),
    maxTokens: number("max-tokens", 1, 1e6, DEFAULTS.maxTokens, true),
    seed: number("seed", 0, Number.MAX_SAFE_INTEGER, DEFAULTS.seed, true),
    system: query.get("system") ?? "",
    trace: query.get("trace") !== "0",
  };
  const seeds = query.getAll("turn-seed").map(toNumber);
  const tint = query.get("tint");
  return {
    arms: query.getAll("arm").slice(0, MOST_ARMS).map(toArm),
    turns: query
      .getAll("turn")
      .slice(0, MOST_TURNS)
      .map((text, i) => ({
        text,
        seed: Number.isSafeInteger(seeds[i]) && seeds[i]! >= 0 ? seeds[i]! : settings.seed,
      }))
      .filter(({ text }) => text.trim()),
    settings,
    tint: TINTS.find((known) => known === tint) ?? "answer",
    marks: query.get("marks") !== "0",
  };
}

/** NaN of nothing; 0 of -0, which no text tells from it. */
const toNumber = (text: string | null) => Number(text?.trim() || NaN) + 0;

function toArm(text: string): ArmState {
  const at = text.lastIndexOf("~");
  const strength = at < 0 ? NaN : toNumber(text.slice(at + 1));
  return Math.abs(strength) <= MOST_STRENGTH
    ? { profile: text.slice(0, at), strength }
    : { profile: text, strength: null };
}
