/** Light or dark: as the system has it, unless the user says otherwise. */

import { effect, signal } from "@preact/signals";

export const THEMES = ["system", "light", "dark"] as const;
export type Theme = (typeof THEMES)[number];

const KEY = "pilothouse-theme";

function stored(): Theme {
  try {
    return THEMES.find((theme) => theme === localStorage.getItem(KEY)) ?? "system";
  } catch {
    return "system"; // storage is switched off
  }
}

export const theme = signal<Theme>(stored());

/** Counts up when colours change; canvases are drawn again then. */
export const repaint = signal(0);

effect(() => {
  const root = document.documentElement;
  if (theme.value === "system") delete root.dataset.theme;
  else root.dataset.theme = theme.value;
  try {
    localStorage.setItem(KEY, theme.value);
  } catch {
    // then it is kept as long as the page is open
  }
  repaint.value = repaint.peek() + 1;
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => repaint.value++);

/** What a colour of the style sheet is now, e.g. of `--answer`. */
export function colour(name: string): string {
  const probe = document.createElement("span");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}
