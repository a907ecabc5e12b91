import { useMemo, useRef, useState } from "preact/hooks";
import { getText } from "../api";
import { count, fixed, percent, seconds } from "../logic/format";
import { parse, quantile, since, Snapshot, wilson } from "../logic/prometheus";
import { timeAxis, valueAxis } from "../parts/axes";
import { Chart, type Data } from "../parts/Chart";
import { IntervalPlot } from "../parts/Interval";
import { Notice } from "../parts/Notice";
import { useLive } from "../parts/useLive";

const EVERY = 2000;
/** Snapshots kept: ten minutes. */
const KEPT = 300;
/** Seconds of the chart. */
const SHOWN = 120;

/** What the server's own metrics say. */
export function Live() {
  const history = useRef<Snapshot[]>([]);
  const live = useLive(async (signal) => {
    const now = new Snapshot(Date.now(), parse(await getText("/metrics", signal)));
    history.current = [...history.current, now].slice(-KEPT);
    return history.current;
  }, EVERY);
  const { value, error } = live.value;
  return (
    <div class="live">
      <header class="head">
        <h1>Live</h1>
        <p class="quiet">From the server's own metrics, every two seconds.</p>
      </header>
      {error && <Notice tone="bad">{error}</Notice>}
      {!value && !error && <p class="quiet pad">Loading …</p>}
      {value && <Figures history={value} />}
    </div>
  );
}

type Window = "start" | "page";

function Figures({ history }: { history: readonly Snapshot[] }) {
  const [window, setWindow] = useState<Window>("start");
  const now = history.at(-1)!;
  const before = window === "page" ? history[0]! : new Snapshot(0, []);
  return (
    <>
      <Now history={history} />
      <fieldset class="choice">
        <legend>Counted since</legend>
        {(
          [
            ["start", "the server started"],
            ["page", "this page was opened"],
          ] as const
        ).map(([each, words]) => (
          <label key={each}>
            <input
              type="radio"
              name="window"
              checked={window === each}
              onChange={() => setWindow(each)}
            />
            <span>{words}</span>
          </label>
        ))}
      </fieldset>
      <Refusals now={now} before={before} />
      <Latencies now={now} before={before} />
      <Rejections now={now} before={before} />
    </>
  );
}

/** What happens at this moment, and the rates of the last minutes. */
function Now({ history }: { history: readonly Snapshot[] }) {
  const now = history.at(-1)!;
  const earlier = history.at(-6) ?? history[0]!;
  const elapsed = (now.time - earlier.time) / 1000;
  const perSecond = (name: string) =>
    elapsed > 0 ? Math.max(0, now.sum(name) - earlier.sum(name)) / elapsed : null;
  const data = useMemo<Data>(() => {
    const rate = (name: string) =>
      history.map((each, i) => {
        const last = history[i - 1];
        if (!last) return null;
        return Math.max(0, each.sum(name) - last.sum(name)) / ((each.time - last.time) / 1000);
      });
    return [history.map((each) => each.time / 1000), rate("steering_completion_tokens_total")];
  }, [history]);
  return (
    <section class="card now" aria-label="Now">
      <dl class="tiles">
        <Tile name="Running" value={count(now.sum("steering_requests_running"))} />
        <Tile name="Waiting" value={count(now.sum("steering_requests_waiting"))} />
        <Tile name="Slots used" value={count(now.sum("steering_slots_used"))} />
        <Tile name="Requests per second" value={fixed(perSecond("steering_requests_total"), 1)} />
        <Tile
          name="Tokens per second"
          value={fixed(perSecond("steering_completion_tokens_total"), 0)}
        />
        <Tile name="Requests in all" value={count(now.sum("steering_requests_total"))} />
      </dl>
      <Chart
        label="Tokens generated per second, while this page is open"
        height={120}
        data={data}
        make={(colour) => ({
          padding: [8, 28, 0, 0],
          scales: {
            x: { range: (_u, _low, high) => [high - SHOWN, high] },
            y: { range: (_u, _low, high) => [0, Math.max(1, (high || 0) * 1.1)] },
          },
          axes: [timeAxis(colour), valueAxis(colour)],
          series: [
            {},
            {
              stroke: colour("--accent"),
              fill: colour("--accent-soft"),
              width: 2,
              points: { show: false },
            },
          ],
        })}
      />
      <p class="quiet">Tokens generated per second, while this page is open.</p>
    </section>
  );
}

function Tile({ name, value }: { name: string; value: string }) {
  return (
    <div>
      <dt>{name}</dt>
      <dd>{value}</dd>
    </div>
  );
}

interface Span {
  now: Snapshot;
  before: Snapshot;
}

const CLASSES = ["benign", "harmful", "unknown"] as const;

function added({ now, before }: Span, name: string, where: Record<string, string> = {}): number {
  const [after, base] = [now.sum(name, where), before.sum(name, where)];
  return after < base ? after : after - base; // it started anew
}

/** Profiles as metrics name them; that of requests for several only once there were any. */
function asked(span: Span): string[] {
  return span.now
    .values("steering_requests_total", "profile")
    .filter(
      (profile) =>
        profile !== "composed" || added(span, "steering_requests_total", { profile }) > 0,
    );
}

function Refusals(span: Span) {
  const profiles = asked(span);
  const seen = CLASSES.filter(
    (each) =>
      each !== "unknown" ||
      added(span, "steering_responses_judged_total", { prompt_class: each }) > 0,
  );
  return (
    <section class="card" aria-label="Refusals by profile">
      <h2>Refusals by profile</h2>
      <div class="scroll" tabIndex={0} role="region" aria-label="Refusals, as a table">
        <table>
          <thead>
            <tr>
              <th scope="col">Profile</th>
              <th scope="col" class="num">
                Requests
              </th>
              <th scope="col" class="num">
                Tokens
              </th>
              {seen.map((each) => (
                <th scope="col" key={each}>
                  Refused, of {each} prompts
                </th>
              ))}
            </tr>
          </thead>
          <tbody>
            {profiles.map((profile) => (
              <tr key={profile}>
                <th scope="row">{profile}</th>
                <td class="num">{count(added(span, "steering_requests_total", { profile }))}</td>
                <td class="num">
                  {count(added(span, "steering_completion_tokens_total", { profile }))}
                </td>
                {seen.map((prompt_class) => {
                  const where = { profile, prompt_class };
                  const judged = added(span, "steering_responses_judged_total", where);
                  const hits = added(span, "steering_refusals_total", where);
                  const [low, high] = judged ? wilson(hits, judged) : [null, null];
                  const rate = judged ? hits / judged : null;
                  return (
                    <td key={prompt_class} class="plot">
                      {percent(rate)} <small>{judged > 0 && `of ${count(judged)}`}</small>
                      <IntervalPlot
                        label={`Refused of ${prompt_class} prompts, ${profile}`}
                        mine={{ value: rate, low, high }}
                      />
                    </td>
                  );
                })}
              </tr>
            ))}
          </tbody>
        </table>
      </div>
      <p class="quiet">
        Bars are 95 % Wilson intervals. The class of a prompt is the benign probe's.
      </p>
    </section>
  );
}

const LATENCIES = [
  ["steering_time_to_first_token_seconds", "First token"],
  ["steering_inter_token_latency_seconds", "Between tokens"],
  ["steering_request_duration_seconds", "Whole request"],
] as const;

function Latencies({ now, before }: Span) {
  const profiles = asked({ now, before });
  return (
    <section class="card" aria-label="Latencies">
      <h2>Latencies</h2>
      <div class="scroll" tabIndex={0} role="region" aria-label="Latencies, as a table">
        <table>
          <thead>
            <tr>
              <th scope="col">Profile</th>
              {LATENCIES.map(([name, words]) => (
                <th scope="col" key={name} class="num">
                  {words}
                </th>
              ))}
            </tr>
          </thead>
          <tbody>
            {profiles.map((profile) => (
              <tr key={profile}>
                <th scope="row">{profile}</th>
                {LATENCIES.map(([name]) => {
                  const buckets = since(
                    now.buckets(name, { profile }),
                    before.buckets(name, { profile }),
                  );
                  return (
                    <td key={name} class="num">
                      {seconds(quantile(0.5, buckets))}{" "}
                      <small>95 %: {seconds(quantile(0.95, buckets))}</small>
                    </td>
                  );
                })}
              </tr>
            ))}
          </tbody>
        </table>
      </div>
      <p class="quiet">Median, and what 95 % stay below; estimated from histograms.</p>
    </section>
  );
}

function Rejections(span: Span) {
  const found = span.now
    .values("steering_rejections_total", "reason")
    .map((reason) => [reason, added(span, "steering_rejections_total", { reason })] as const)
    .filter(([, n]) => n > 0);
  return (
    <section class="card" aria-label="Rejections">
      <h2>Turned down</h2>
      {found.length ? (
        <ul class="rails">
          {found.map(([reason, n]) => (
            <li key={reason}>
              <b>{count(n)}</b> {reason.replaceAll("_", " ")}
            </li>
          ))}
        </ul>
      ) : (
        <p class="quiet">No request was turned down.</p>
      )}
    </section>
  );
}
