import { getJson } from "../api";
import type { ExperimentCard, Report } from "../logic/experiments";
import { ExperimentReport } from "../parts/ExperimentReport";
import { Notice } from "../parts/Notice";
import { useLive } from "../parts/useLive";
import { route } from "../session";

const EVERY = 5000;

/** What A/B tests are under way, and what they have shown so far. */
export function Experiments() {
  const list = useLive(
    (signal) => getJson<{ data: ExperimentCard[] }>("/v1/experiments", signal),
    EVERY,
  );
  const { value, error } = list.value;
  const experiments = value?.data ?? [];
  const asked = route.value.rest;
  const shown = asked ? experiments.find((each) => each.name === asked) : experiments[0];
  return (
    <div class="experiments">
      <header class="head">
        <h1>Experiments</h1>
        {experiments.length > (shown ? 1 : 0) && (
          <nav class="tabs" aria-label="Experiments">
            {experiments.map((each) => (
              <a
                key={each.name}
                href={`#/experiments/${encodeURIComponent(each.name)}`}
                aria-current={each === shown ? "page" : undefined}
              >
                {each.name}
              </a>
            ))}
          </nav>
        )}
      </header>
      {error && <Notice tone="bad">{error}</Notice>}
      {value && experiments.length === 0 && <Nothing />}
      {experiments.length > 0 && !shown && (
        <p class="pad">There is no experiment {asked} here, or none that this key may see.</p>
      )}
      {!value && !error && <p class="quiet pad">Loading …</p>}
      {shown && <Shown key={`${shown.name} ${shown.version}`} experiment={shown} />}
    </div>
  );
}

function Shown({ experiment }: { experiment: ExperimentCard }) {
  const path = `/v1/experiments/${encodeURIComponent(experiment.name)}/report`;
  const report = useLive((signal) => getJson<Report>(path, signal), EVERY, path);
  const { value, error } = report.value;
  return (
    <>
      {error && <Notice tone="bad">{error}</Notice>}
      {value ? (
        <ExperimentReport experiment={experiment} report={value} />
      ) : (
        !error && <p class="quiet pad">Loading …</p>
      )}
    </>
  );
}

function Nothing() {
  return (
    <div class="nothing">
      <p>No experiment is defined here, or none that this key may see.</p>
      <p class="quiet">
        An experiment sends each user to one of several profiles and compares what becomes of their
        requests. It is defined in the settings file, or with <code>POST /v1/experiments</code>:
      </p>
      <pre tabIndex={0} role="region" aria-label="Example of a definition">{`[[experiments]]
name = "trial"
metric = "over_refusal"
arms = [
  {name = "control", profile = "raw"},
  {name = "treated", profile = "llm-va"},
]`}</pre>
    </div>
  );
}
