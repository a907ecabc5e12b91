import { useEffect } from "preact/hooks";
import { addressOf, keyWanted } from "./api";
import { link } from "./comparison";
import { KeyForm } from "./parts/KeyForm";
import { Notice } from "./parts/Notice";
import { ThemeSwitch } from "./parts/ThemeSwitch";
import { reload, route, served, servedError, version, type View } from "./session";
import { Compare } from "./views/Compare";
import { Experiments } from "./views/Experiments";
import { Live } from "./views/Live";
import { Profiles } from "./views/Profiles";

const TITLES: Record<View, string> = {
  compare: "Compare",
  profiles: "Profiles",
  experiments: "Experiments",
  live: "Live",
};
const CONTENTS: Record<View, () => preact.JSX.Element> = {
  compare: Compare,
  profiles: Profiles,
  experiments: Experiments,
  live: Live,
};

export function App() {
  const { view } = route.value;
  useEffect(() => {
    document.title = `${TITLES[view]} · Pilothouse`;
  }, [view]);
  const Content = CONTENTS[view];
  const locked = keyWanted.value && !served.value;
  return (
    <>
      <a class="skip" href="#main" onClick={toMain}>
        Skip to content
      </a>
      <header class="top">
        <div class="brand">
          <Wheel />
          <span>Pilothouse</span>
          {served.value && <span class="model">{served.value.model}</span>}
        </div>
        <nav aria-label="Views">
          {(Object.keys(TITLES) as View[]).map((each) => (
            <a
              key={each}
              href={each === "compare" ? link.value : `#/${each}`}
              aria-current={each === view ? "page" : undefined}
            >
              {TITLES[each]}
            </a>
          ))}
        </nav>
        <div class="tools">
          <KeyForm />
          <ThemeSwitch />
        </div>
      </header>
      <main id="main" tabIndex={-1}>
        {locked ? (
          <Locked />
        ) : served.value ? (
          <Content />
        ) : servedError.value ? (
          <Notice tone="bad" action={{ label: "Try again", do: () => void reload() }}>
            {servedError.value}
          </Notice>
        ) : (
          <p class="quiet pad">Loading …</p>
        )}
      </main>
      <footer class="foot">
        <span>Pilothouse {version.value}</span>
        <a href={addressOf("/openapi.json")}>API description</a>
        <a href={addressOf("/licences.txt")}>Licences</a>
      </footer>
    </>
  );
}

function Locked() {
  return (
    <section class="locked">
      <h1>This server asks for a key</h1>
      <p>{servedError.value}</p>
      <KeyForm inline />
      <p class="quiet">It is kept in this tab only, and sent to this server only.</p>
    </section>
  );
}

function toMain(event: Event): void {
  event.preventDefault(); // the address is the comparison's
  document.getElementById("main")?.focus();
}

function Wheel() {
  return (
    <svg class="wheel" viewBox="0 0 32 32" aria-hidden="true">
      <circle cx="16" cy="16" r="7.5" />
      <path d="M16 3.5v25M3.5 16h25M7.2 7.2l17.6 17.6M24.8 7.2L7.2 24.8" />
      <circle class="hub" cx="16" cy="16" r="2.6" />
    </svg>
  );
}
