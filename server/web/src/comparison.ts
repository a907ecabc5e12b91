/** The comparison on the page: its columns, turns and replies, and the requests under way.
 *
 * Replies of a column always come from the column's present profile and strength: whatever changes
 * one of them asks for the column's replies again, all turns in order, since histories part.
 */

import { batch, computed, effect, signal } from "@preact/signals";
import { ApiError, compare, inWords, isAbort } from "./api";
import { DEMO, GENERAL } from "./logic/examples";
import { roundUp } from "./logic/format";
import {
  DEFAULTS,
  fromLink,
  LEAST_ARMS,
  MOST_ARMS,
  toLink,
  type ArmState,
  type Settings,
  type Tint,
  type TurnState,
} from "./logic/link";
import { add, cut, waiting, type Reply } from "./logic/reply";
import { profilesByName, readdress, reload, route, served } from "./session";
import type { CompareChoice, CompareRequest, Message } from "./types";

export interface Arm extends ArmState {
  id: number;
}

export interface Turn extends TurnState {
  id: number;
}

export const arms = signal<readonly Arm[]>([]);
export const turns = signal<readonly Turn[]>([]);
export const settings = signal<Settings>(DEFAULTS);
export const tint = signal<Tint>("answer");
export const marks = signal(true);
export const replies = signal<ReadonlyMap<string, Reply>>(new Map());
/** Why the last request failed as a whole. */
export const problem = signal<string | null>(null);
/** What a screen reader is told when replies have ended. */
export const announcement = signal("");

let ids = 0;
const runs = signal<readonly Run[]>([]);

export const busy = computed(() => runs.value.length > 0);

/** Settings have changed since the replies were asked for. */
export const stale = signal(false);

export const keyOf = (turn: Turn, arm: Arm): string => `${turn.id}/${arm.id}`;
export const replyOf = (turn: Turn, arm: Arm): Reply | undefined =>
  replies.value.get(keyOf(turn, arm));

export const rawArm = computed(() =>
  arms.value.find((arm) => profilesByName.value.get(arm.profile)?.identity),
);

/** The largest edit in sight, rounded up so that it seldom changes: tints and charts of edits go up
 * to it, the same in all columns. */
export const mostEdit = computed(() => {
  let most = 0;
  for (const turn of turns.value) {
    for (const arm of arms.value) {
      for (const token of replyOf(turn, arm)?.trace ?? [])
        most = Math.max(most, token.edit_norm ?? 0);
    }
  }
  return roundUp(most);
});

/** True where replies are there and nothing was read of them: the model has no monitor. */
export const unread = computed(() => {
  const prompts = [...replies.value.values()].flatMap(({ prompt }) => prompt ?? []);
  return (
    prompts.length > 0 &&
    prompts.every(
      ({ refusal_score, answer_probability, benign_probability }) =>
        (refusal_score ?? answer_probability ?? benign_probability) === null,
    )
  );
});

export const link = computed(() =>
  toLink({
    arms: arms.value.map(({ profile, strength }) => ({ profile, strength })),
    turns: turns.value.map(({ text, seed }) => ({ text, seed })),
    settings: settings.value,
    tint: tint.value,
    marks: marks.value,
  }),
);

export const examples = computed(() => (served.value?.demo ? DEMO : GENERAL));

// --- requests ---------------------------------------------------------------------------------

class Run {
  readonly controller = new AbortController();

  constructor(readonly arms: Set<number>) {}
}

/** Which run fills a column; what an older one still says of it is not wanted any more. */
const owners = new Map<number, Run>();

/** Ask for replies again, from a turn on, in some columns (all of them by default). */
export async function run(from = 0, only?: readonly number[]): Promise<void> {
  const mine = new Run(new Set(only ?? arms.value.map((arm) => arm.id)));
  if (!turns.value.length || !mine.arms.size) return;
  takeOver(mine);
  batch(() => {
    problem.value = null;
    if (!only) stale.value = false;
    runs.value = [...runs.value, mine];
    const left = new Map(replies.value);
    for (const turn of turns.value.slice(from)) {
      for (const arm of arms.value) {
        if (mine.arms.has(arm.id)) left.set(keyOf(turn, arm), blank(arm));
      }
    }
    replies.value = left;
  });
  try {
    for (const turn of turns.value.slice(from)) await ask(mine, turn);
    if (!mine.controller.signal.aborted) announce();
  } catch (error) {
    const stopped = isAbort(error);
    if (!stopped) problem.value = inWords(error);
    // The server may have been started again with other profiles.
    if (error instanceof ApiError && error.code === "model_not_found") void reload();
    endAll(mine, stopped ? "stopped" : "failed");
  } finally {
    runs.value = runs.value.filter((each) => each !== mine);
  }
}

const blank = (arm: Arm) => waiting(arm.profile, arm.strength, performance.now());

function takeOver(mine: Run): void {
  for (const id of mine.arms) {
    const before = owners.get(id);
    owners.set(id, mine);
    if (before && ![...before.arms].some((each) => owners.get(each) === before))
      before.controller.abort();
  }
}

async function ask(mine: Run, turn: Turn): Promise<void> {
  const { signal } = mine.controller;
  signal.throwIfAborted();
  const asked = arms.value.filter((arm) => owners.get(arm.id) === mine);
  if (!asked.length || !turns.value.includes(turn)) return;
  const request = requestFor(turn, asked);
  const now = performance.now();
  update((found) => {
    for (const arm of asked) found.set(keyOf(turn, arm), { ...blank(arm), asked: now });
  });
  let queue: CompareChoice[] = [];
  let frame = 0;
  const flush = () => {
    cancelAnimationFrame(frame);
    frame = 0;
    const choices = queue;
    queue = [];
    if (!choices.length) return;
    update((found) => {
      asked.forEach((arm, index) => {
        const key = keyOf(turn, arm);
        const reply = found.get(key);
        if (!reply || owners.get(arm.id) !== mine) return;
        const own = choices.filter((choice) => choice.index === index);
        found.set(key, add(reply, own, performance.now()));
      });
    });
  };
  try {
    for await (const chunk of compare(request, signal)) {
      queue.push(...(chunk.choices ?? []));
      frame ||= requestAnimationFrame(flush);
    }
  } finally {
    flush();
  }
}

function update(change: (found: Map<string, Reply>) => void): void {
  const found = new Map(replies.value);
  change(found);
  replies.value = found;
}

function endAll(mine: Run, state: "stopped" | "failed"): void {
  update((found) => {
    for (const turn of turns.value) {
      for (const arm of arms.value) {
        const reply = found.get(keyOf(turn, arm));
        if (reply && mine.arms.has(arm.id) && owners.get(arm.id) === mine) {
          found.set(keyOf(turn, arm), cut(reply, state, performance.now()));
        }
      }
    }
  });
}

/** End all requests under way; the server frees their slots. */
export function stop(): void {
  for (const each of runs.value) each.controller.abort();
}

function announce(): void {
  const turn = turns.value.at(-1);
  if (!turn) return;
  const said = arms.value.map(
    (arm) => `${arm.profile}: ${replyOf(turn, arm)?.outcome ?? "no outcome"}`,
  );
  announcement.value = `Replies are complete. ${said.join(", ")}.`;
}

/** The request for a turn; each column has its own conversation once there is a history. */
export function requestFor(turn: Turn, asked: readonly Arm[]): CompareRequest {
  const { temperature, maxTokens, trace } = settings.value;
  const first = turns.value[0] === turn;
  const conversation = asked.map((arm) => messagesFor(turn, arm));
  return {
    messages: conversation[0] ?? [],
    arms: asked.map(({ profile, strength }, i) => ({
      profile,
      ...(strength === null ? {} : { strength }),
      ...(first ? {} : { messages: conversation[i]! }),
    })),
    temperature,
    ...(maxTokens === null ? {} : { max_tokens: maxTokens }),
    seed: turn.seed,
    trace,
    stream: true,
  };
}

function messagesFor(turn: Turn, arm: Arm): Message[] {
  const messages: Message[] = [];
  if (settings.value.system) messages.push({ role: "system", content: settings.value.system });
  for (const before of turns.value.slice(0, turns.value.indexOf(turn))) {
    const text = replyOf(before, arm)?.text;
    // Without a reply the turn never was, for this column.
    if (text)
      messages.push({ role: "user", content: before.text }, { role: "assistant", content: text });
  }
  return [...messages, { role: "user", content: turn.text }];
}

// --- what users do ----------------------------------------------------------------------------

/** Add a turn to the conversation and ask for its replies. */
export function say(text: string): void {
  turns.value = [...turns.value, { id: ++ids, text, seed: settings.value.seed }];
  // A link has one set of settings, so all replies must come from the same ones.
  void run(stale.value ? 0 : turns.value.length - 1);
}

/** Begin a new conversation. */
export function startOver(text?: string): void {
  stop();
  batch(() => {
    turns.value = [];
    replies.value = new Map();
    problem.value = null;
    stale.value = false;
  });
  if (text) say(text);
}

/** Say something else in an earlier turn; what came after it goes. */
export function edit(turn: Turn, text: string): void {
  const at = turns.value.indexOf(turn);
  turns.value = [...turns.value.slice(0, at), { ...turn, id: ++ids, text }];
  void run(stale.value ? 0 : at);
}

/** Ask again for the last replies, with another seed where that changes anything; from the first
 * turn on that has not all of its replies. */
export function retry(): void {
  if (stale.value) return void run();
  const last = turns.value.length - 1;
  const broken = turns.value.findIndex((turn) =>
    arms.value.some((arm) => replyOf(turn, arm)?.state !== "done"),
  );
  const at = broken < 0 ? last : broken;
  const drawn = settings.value.temperature > 0;
  turns.value = turns.value.map((turn, i) =>
    i === at && drawn ? { ...turn, seed: turn.seed + 1 } : turn,
  );
  void run(at);
}

export function changeSettings(change: Partial<Settings>): void {
  settings.value = { ...settings.value, ...change };
  if (change.seed !== undefined) {
    turns.value = turns.value.map((turn) => ({ ...turn, seed: settings.value.seed }));
  }
  stale.value = turns.value.length > 0;
}

let timer = 0;
let changed = new Set<number>();

/** Change a column, and ask for its replies again once that has settled. */
export function changeArm(id: number, change: Partial<ArmState>): void {
  arms.value = arms.value.map((arm) => (arm.id === id ? { ...arm, ...change } : arm));
  changed.add(id);
  clearTimeout(timer);
  timer = setTimeout(() => {
    const again = [...changed].filter((each) => arms.value.some((arm) => arm.id === each));
    changed = new Set();
    void run(0, again);
  }, 250);
}

export function addArm(): void {
  const used = new Set(arms.value.map((arm) => arm.profile));
  const names = [...profilesByName.value.keys()];
  const profile = names.find((name) => !used.has(name)) ?? names.at(-1);
  if (!profile || arms.value.length >= MOST_ARMS) return;
  const arm = { id: ++ids, profile, strength: null };
  arms.value = [...arms.value, arm];
  void run(0, [arm.id]);
}

export function removeArm(id: number): void {
  if (arms.value.length <= LEAST_ARMS) return;
  const before = owners.get(id);
  arms.value = arms.value.filter((arm) => arm.id !== id);
  owners.delete(id);
  if (before && ![...before.arms].some((each) => owners.get(each) === before))
    before.controller.abort();
}

// --- the address ------------------------------------------------------------------------------

let shown = "";

function open(query: string): void {
  const found = fromLink(query);
  stop();
  owners.clear();
  const names = served.peek()?.profiles.map(({ name }) => name) ?? [];
  const columns = found.arms.length ? found.arms : names.slice(0, MOST_ARMS).map(own);
  while (names[0] && columns.length < LEAST_ARMS) columns.push(own(names[0]));
  batch(() => {
    arms.value = columns.map((arm) => ({ ...arm, id: ++ids }));
    turns.value = found.turns.map((turn) => ({ ...turn, id: ++ids }));
    settings.value = found.settings;
    tint.value = found.tint;
    marks.value = found.marks;
    replies.value = new Map();
    problem.value = null;
    stale.value = false;
  });
  // The model that comes with the program costs nothing, so it shows at once what this is about.
  if (!found.turns.length && served.peek()?.demo && !query) say(DEMO[0]!.text);
  else void run();
}

const own = (profile: string): ArmState => ({ profile, strength: null });

let ready = false;

effect(() => {
  const { view, query } = route.value;
  if (!served.value || view !== "compare") return;
  const wanted = `#/compare${query ? `?${query}` : ""}`;
  if (ready && (wanted === shown || !query)) return;
  ready = true;
  queueMicrotask(() => open(query));
});

effect(() => {
  const now = link.value;
  if (!arms.value.length || route.peek().view !== "compare") return;
  if (now === shown) return;
  shown = now;
  readdress(now);
});
