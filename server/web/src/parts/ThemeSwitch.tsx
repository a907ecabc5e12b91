import { theme, THEMES } from "../theme";

const SIGNS = { system: "◐", light: "○", dark: "●" };

export function ThemeSwitch() {
  const next = THEMES[(THEMES.indexOf(theme.value) + 1) % THEMES.length]!;
  return (
    <button
      type="button"
      class="plain theme"
      aria-label={`Colours: ${theme.value}. Switch to ${next}.`}
      title={`Colours: ${theme.value}`}
      onClick={() => (theme.value = next)}
    >
      <span aria-hidden="true">{SIGNS[theme.value]}</span>
      <span class="word">{theme.value}</span>
    </button>
  );
}
