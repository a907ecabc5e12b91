/** What is served here, and where in the page we are. */

import { computed, effect, signal } from "@preact/signals";
import { ApiError, apiKey, getJson, inWords } from "./api";
import type { ProfileCard } from "./types";

export const VIEWS = ["compare", "profiles", "experiments", "live"] as const;
export type View = (typeof VIEWS)[number];

export interface Route {
  view: View;
  /** What follows the view, e.g. an experiment's name. */
  rest: string;
  query: string;
}

function parse(hash: string): Route {
  const [path = "", ...query] = hash.replace(/^#\/?/, "").split("?");
  const [first, ...rest] = path.split("/");
  return {
    view: VIEWS.find((view) => view === first) ?? "compare",
    rest: rest.map(decoded).join("/"),
    query: query.join("?"),
  };
}

function decoded(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

export const route = signal(parse(location.hash));
addEventListener("hashchange", () => (route.value = parse(location.hash)));

/** Milliseconds. Some browsers refuse more than a hundred new addresses in half a minute. */
const BETWEEN_ADDRESSES = 350;
let addressed = -Infinity;
let timer = 0;

/** Say in the address what is shown, without a step in the history; at once or soon after. */
export function readdress(hash: string): void {
  const here = route.peek();
  const write = () => {
    if (route.peek() !== here) return; // the user has gone elsewhere
    addressed = performance.now();
    history.replaceState(null, "", hash);
    route.value = parse(hash);
  };
  clearTimeout(timer);
  const wait = addressed + BETWEEN_ADDRESSES - performance.now();
  if (wait > 0) timer = setTimeout(write, wait);
  else write();
}

export interface Served {
  profiles: ProfileCard[];
  model: string;
  /** Whether it is the model that comes with the program. */
  demo: boolean;
}

export const served = signal<Served | null>(null);
export const servedError = signal<string | null>(null);
export const version = signal("");

export const profilesByName = computed(
  () => new Map((served.value?.profiles ?? []).map((profile) => [profile.name, profile])),
);

async function load(): Promise<void> {
  const key = apiKey.value;
  try {
    const [{ data: profiles }, { data: models }] = await Promise.all([
      getJson<{ data: ProfileCard[] }>("/v1/steering/profiles"),
      getJson<{ data: { id: string; root: string; parent: string | null }[] }>("/v1/models"),
    ]);
    if (key !== apiKey.peek()) return;
    const model = models.find((each) => each.parent === null) ?? models[0];
    served.value = {
      profiles,
      model: model?.parent ?? model?.id ?? "",
      demo: profiles.some((profile) => profile.provenance.base_model === "demo"),
    };
    servedError.value = null;
  } catch (error) {
    if (key !== apiKey.peek()) return;
    if (error instanceof ApiError && error.status === 401) served.value = null;
    servedError.value = inWords(error);
  }
}

const view = computed(() => route.value.view);

// Profiles come and go while the page is open: each view begins with those of now.
effect(() => {
  void view.value;
  void load();
});

export const reload = load;

getJson<{ version: string }>("/version").then(
  (found) => (version.value = found.version),
  () => undefined,
);
