import { addressOf, apiKey } from "../api";
import {
  eventText,
  METRIC_WORDS,
  METRICS,
  type Comparison,
  type ExperimentCard,
  type Report,
} from "../logic/experiments";
import {
  count,
  fixed,
  interval,
  moment,
  percent,
  seconds,
  signed,
  strengthText,
} from "../logic/format";
import { IntervalPlot } from "./Interval";
import { Notice } from "./Notice";
import { SequenceChart } from "./SequenceChart";

interface Props {
  experiment: ExperimentCard;
  report: Report;
}

/** One experiment: what it is, what it has shown, and what keeps it safe. */
export function ExperimentReport({ experiment, report }: Props) {
  const control = report.arms.find((arm) => arm.control)?.name ?? "control";
  return (
    <div class="report">
      <section class="card about" aria-label={experiment.name}>
        <header>
          <h2>{experiment.name}</h2>
          <span class={`chip ${experiment.status === "running" ? "good" : "plain"}`}>
            {experiment.status}
          </span>
          {experiment.default && <span class="mark">takes in unnamed requests</span>}
        </header>
        <dl class="facts">
          <Fact name="Decides on">{METRIC_WORDS[experiment.metric]}</Fact>
          <Fact name="Version">{experiment.version}</Fact>
          <Fact name="Differences matter from">{percent(experiment.margin, 1)}</Fact>
          <Fact name="Wrong verdict at most">{percent(experiment.alpha)}</Fact>
          <Fact name="Users covered">{percent(experiment.coverage)}</Fact>
          {experiment.shadow > 0 && <Fact name="Shadowed">{percent(experiment.shadow)}</Fact>}
          {experiment.start && (
            <Fact name={experiment.status === "scheduled" ? "Starts" : "Started"}>
              {moment(Date.parse(experiment.start) / 1000)}
            </Fact>
          )}
          {experiment.end && (
            <Fact name={experiment.status === "ended" ? "Ended" : "Ends"}>
              {moment(Date.parse(experiment.end) / 1000)}
            </Fact>
          )}
        </dl>
        <p class="quiet">
          Intervals may be looked at as often as you like: each is right at every moment with{" "}
          {percent(1 - experiment.alpha)} confidence.
        </p>
      </section>
      {report.warnings.length > 0 && (
        <ul class="warnings" aria-label="Warnings">
          {report.warnings.map((warning) => (
            <li key={warning}>{warning}</li>
          ))}
        </ul>
      )}
      {entered(report) ? (
        <div class="verdicts">
          {report.comparisons.map((comparison) => (
            <Verdict key={comparison.arm} {...{ comparison, experiment, control }} />
          ))}
          {report.shadows.map((comparison) => (
            <Verdict
              key={`shadow ${comparison.arm}`}
              {...{ comparison, experiment, control }}
              paired
            />
          ))}
        </div>
      ) : (
        <Notice>{NOBODY[experiment.status]}</Notice>
      )}
      <Arms report={report} experiment={experiment} />
      <GuardRails report={report} experiment={experiment} />
      <p class="quiet">
        As of {moment(report.time)}. <WholeReport name={experiment.name} /> also has figures
        corrected for the judge's errors.
      </p>
    </div>
  );
}

const entered = ({ arms }: Report) => arms.some((arm) => arm.units > 0);

const NOBODY: Record<ExperimentCard["status"], string> = {
  scheduled: "It has not begun.",
  running: "Nobody has taken part so far.",
  ended: "Nobody took part in it.",
};

/** A link carries no key, so with one it is a command that gets the report. */
function WholeReport({ name }: { name: string }) {
  if (apiKey.value) {
    return (
      <>
        What <code>pilothouse experiments report {name}</code> prints
      </>
    );
  }
  return (
    <>
      The{" "}
      <a href={addressOf(`/v1/experiments/${encodeURIComponent(name)}/report?format=html`)}>
        whole report
      </a>
    </>
  );
}

function Fact({ name, children }: { name: string; children: preact.ComponentChildren }) {
  return (
    <div>
      <dt>{name}</dt>
      <dd>{children}</dd>
    </div>
  );
}

const TONES: Record<string, string> = {
  better: "good",
  worse: "error",
  blocked: "error",
  "no difference": "answer",
  inconclusive: "plain",
};

interface VerdictProps {
  comparison: Comparison;
  experiment: ExperimentCard;
  control: string;
  /** Of unseen answers to the same prompts. */
  paired?: boolean;
}

function Verdict({ comparison, experiment, control, paired = false }: VerdictProps) {
  const { arm, decision, differences, looks } = comparison;
  const found = differences[experiment.metric];
  return (
    <section class="card verdict" aria-label={`${arm} against ${control}`}>
      <header>
        <h3>
          {arm}{" "}
          <span class="quiet">
            against {control}
            {paired && ", on the same prompts"}
          </span>
        </h3>
        <span class={`chip ${TONES[decision.verdict] ?? "plain"}`}>{decision.verdict}</span>
      </header>
      <p class="figure">
        <b>{signed(found?.value, 3)}</b>{" "}
        <span class="quiet">
          {interval(found?.low ?? null, found?.high ?? null, 3)} difference in “
          {METRIC_WORDS[experiment.metric].toLowerCase()}”, of {count(found?.units ?? 0)} users
        </span>
      </p>
      <p>
        {capital(decision.why)}.
        {decision.more_units !== null &&
          ` About ${count(decision.more_units)} more users may be needed.`}
      </p>
      {looks.length > 1 && (
        <>
          <SequenceChart looks={looks} margin={experiment.margin} arm={arm} />
          <details>
            <summary>As a table</summary>
            <Looks looks={looks} />
          </details>
        </>
      )}
    </section>
  );
}

const capital = (text: string) => text.charAt(0).toUpperCase() + text.slice(1);

const MOST_ROWS = 25;

function Looks({ looks }: { looks: Comparison["looks"] }) {
  const every = Math.ceil(looks.length / MOST_ROWS);
  const rows = looks.filter((_, i) => (looks.length - 1 - i) % every === 0);
  return (
    <div class="scroll" tabIndex={0} role="region" aria-label="The difference over time">
      <table>
        <thead>
          <tr>
            <th scope="col">Time</th>
            <th scope="col" class="num">
              Users
            </th>
            <th scope="col" class="num">
              Difference
            </th>
            <th scope="col" class="num">
              Interval
            </th>
          </tr>
        </thead>
        <tbody>
          {rows.map((look) => (
            <tr key={look.n}>
              <td>{moment(look.time)}</td>
              <td class="num">{count(look.units)}</td>
              <td class="num">{signed(look.value, 3)}</td>
              <td class="num">{interval(look.low, look.high, 3)}</td>
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}

function Arms({ report, experiment }: Props) {
  const control = report.arms.find((arm) => arm.control);
  return (
    <section class="card" aria-label="Arms">
      <h3>Arms</h3>
      <div class="scroll" tabIndex={0} role="region" aria-label="Arms and their rates">
        <table class="arms-table">
          <thead>
            <tr>
              <th scope="col">Arm</th>
              <th scope="col" class="num">
                Share
              </th>
              <th scope="col" class="num">
                Users
              </th>
              <th scope="col" class="num">
                Exposures
              </th>
              {METRICS.map((metric) => (
                <th
                  scope="col"
                  key={metric}
                  class={metric === experiment.metric ? "decisive" : undefined}
                >
                  {METRIC_WORDS[metric]}
                </th>
              ))}
              <th scope="col" class="num">
                First token
              </th>
            </tr>
          </thead>
          <tbody>
            {report.arms.map((arm) => (
              <tr key={arm.name}>
                <th scope="row">
                  {arm.name}
                  <small>
                    {arm.profile}
                    {arm.strength !== null && ` × ${strengthText(arm.strength)}`}
                    {arm.control && " · control"}
                  </small>
                  {arm.stopped !== null && <span class="chip error">stopped</span>}
                </th>
                <td class="num">{percent(arm.expected_share)}</td>
                <td class="num">{count(arm.units)}</td>
                <td class="num">
                  {count(arm.answers)}
                  {arm.unjudged > 0 && <small>{count(arm.unjudged)} not judged</small>}
                </td>
                {METRICS.map((metric) => {
                  const rate = arm.rates[metric];
                  return (
                    <td key={metric} class="plot">
                      {fixed(rate.value)} <small>{interval(rate.low, rate.high)}</small>
                      <IntervalPlot
                        label={`${METRIC_WORDS[metric]}, ${arm.name}`}
                        mine={rate}
                        base={arm.control ? null : (control?.rates[metric] ?? null)}
                        limit={
                          experiment.guard_rails.find((rail) => rail.metric === metric)?.limit ??
                          null
                        }
                      />
                    </td>
                  );
                })}
                <td class="num">{seconds(arm.latency.ttft_median)}</td>
              </tr>
            ))}
          </tbody>
        </table>
      </div>
      {report.sample_ratio.mismatch ? (
        <p class="failure">
          Users are not spread over the arms as the weights say: find out why first.
        </p>
      ) : (
        entered(report) && (
          <p class="quiet">
            Users are spread over the arms as the weights say (p = {fixed(report.sample_ratio.p)}).
          </p>
        )
      )}
    </section>
  );
}

function GuardRails({ report, experiment }: Props) {
  return (
    <section class="card" aria-label="Guard-rails">
      <h3>Guard-rails</h3>
      {experiment.guard_rails.length === 0 ? (
        <p class="quiet">None are set: no arm is stopped by itself.</p>
      ) : (
        <ul class="rails">
          {experiment.guard_rails.map((rail) => (
            <li key={rail.metric}>
              Stops an arm whose rate of “{METRIC_WORDS[rail.metric].toLowerCase()}” is surely above{" "}
              <b>{percent(rail.limit)}</b>, from {count(rail.minimum)} answers on.{" "}
              <span class="quiet">
                {report.arms
                  .filter((arm) => !arm.control)
                  .map(
                    ({ name, rates }) =>
                      `${name}: ${percent(rates[rail.metric].value)} of ${count(rates[rail.metric].n)}`,
                  )
                  .join("; ")}
              </span>
            </li>
          ))}
        </ul>
      )}
      {report.events.length > 0 && (
        <ol class="events">
          {report.events.map((event) => (
            <li key={event.id}>
              <time>{moment(event.time)}</time> {eventText(event)}
            </li>
          ))}
        </ol>
      )}
    </section>
  );
}
