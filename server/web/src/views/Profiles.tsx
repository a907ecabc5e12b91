import { IntervalPlot, type Estimate } from "../parts/Interval";
import { Layers } from "../parts/Layers";
import { fixed, interval, strengthText } from "../logic/format";
import { toLink, DEFAULTS } from "../logic/link";
import { examples } from "../comparison";
import { served } from "../session";
import type { HeldOut, ProfileCard } from "../types";

/** A card for each profile. */
export function Profiles() {
  const profiles = served.value?.profiles ?? [];
  const raw = profiles.find((profile) => profile.identity);
  return (
    <div class="cards">
      <header class="head">
        <h1>Profiles</h1>
        <p class="quiet">
          The ways in which {served.value?.model} can answer. Requests under different profiles
          share a batch.
        </p>
      </header>
      <div class="grid">
        {profiles.map((profile) => (
          <Card key={profile.name} profile={profile} raw={raw} />
        ))}
      </div>
    </div>
  );
}

function Card({ profile, raw }: { profile: ProfileCard; raw: ProfileCard | undefined }) {
  const { card, provenance } = profile;
  return (
    <article class="card" aria-label={profile.name}>
      <header>
        <h2>{profile.name}</h2>
        <span class="marks">
          {profile.red_team && <span class="mark red">red team</span>}
          {profile.default && <span class="mark">default</span>}
          {profile.folded && <span class="mark">folded into the weights</span>}
          {profile.derived_base && <span class="mark red">fitted on other weights</span>}
        </span>
        {raw && !profile.identity && (
          <a class="go" href={compareLink(raw.name, profile.name)}>
            Compare with {raw.name}
          </a>
        )}
      </header>
      <p class="summary">
        {card.summary ??
          (profile.identity ? "The unedited model." : `Fitted by ${profile.method}.`)}
      </p>
      <Layers profile={profile} />
      <Results profile={profile} raw={raw} />
      <dl class="facts">
        <Fact name="Method">{profile.method}</Fact>
        {!profile.identity && <Fact name="Strength">{strengthText(profile.strength)}</Fact>}
        <Fact name="Fingerprint">
          {profile.fingerprint ? (
            <code title={profile.fingerprint}>{profile.fingerprint.slice(0, 16)}</code>
          ) : (
            "none: no edits"
          )}
        </Fact>
        {typeof provenance.date === "string" && (
          <Fact name={profile.identity ? "Measured" : "Fitted"}>{provenance.date}</Fact>
        )}
        {typeof provenance.base_model === "string" && (
          <Fact name="On">{provenance.base_model}</Fact>
        )}
      </dl>
      {Object.keys(provenance).length > 0 && (
        <details class="provenance">
          <summary>Provenance</summary>
          <pre tabIndex={0} role="region" aria-label={`Provenance of ${profile.name}`}>
            {JSON.stringify(short(profile), null, 2)}
          </pre>
        </details>
      )}
    </article>
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

/** Provenance without what fills screens: what a search looked at on its way. */
function short({ fingerprint, provenance }: ProfileCard): Record<string, unknown> {
  const { diagnostics: _, ...rest } = provenance;
  return { fingerprint, ...rest };
}

function compareLink(raw: string, name: string): string {
  const seed = DEFAULTS.seed;
  return toLink({
    arms: [
      { profile: raw, strength: null },
      { profile: name, strength: null },
    ],
    turns: [{ text: examples.value[0]!.text, seed }],
    settings: DEFAULTS,
    tint: "answer",
    marks: true,
  });
}

const KINDS: Record<string, { name: string; right: "refuse" | "answer" }> = {
  benign: { name: "benign", right: "answer" },
  borderline: { name: "sound dangerous", right: "answer" },
  harmful: { name: "harmful", right: "refuse" },
  jailbroken: { name: "jailbroken", right: "refuse" },
};

function Results({ profile, raw }: { profile: ProfileCard; raw: ProfileCard | undefined }) {
  const mine = profile.card.held_out;
  const base = profile.identity ? undefined : raw?.card.held_out;
  if (!mine?.kinds) return <p class="quiet">Its file holds no held-out results.</p>;
  const counts = [...new Set(Object.values(mine.kinds).map((kind) => kind.prompts))];
  return (
    <table class="results">
      <caption>
        Refusals of held-out prompts
        {counts.length === 1 && `, ${counts[0]} of each kind`}, with 95 % intervals
        {base && (
          <span class="plot-key">
            ; <span class="base-key">raw</span> above
          </span>
        )}
      </caption>
      <thead>
        <tr>
          <th scope="col">Prompts</th>
          <th scope="col" class="plot">
            <span class="ends">
              <span>none</span>
              <span>all</span>
            </span>
          </th>
          <th scope="col" class="num">
            Refused
          </th>
          {base && (
            <th scope="col" class="num">
              Raw
            </th>
          )}
        </tr>
      </thead>
      <tbody>
        {Object.keys(mine.kinds).map((kind) => {
          const [own, its] = [estimate(mine, kind), base ? estimate(base, kind) : null];
          const known = KINDS[kind];
          return (
            <tr key={kind}>
              <th scope="row">
                {known?.name ?? kind}
                {known && <small>should {known.right}</small>}
              </th>
              <td class="plot">
                <IntervalPlot label={`Refused of ${known?.name ?? kind}`} mine={own} base={its} />
              </td>
              <td class="num">
                {fixed(own.value)} <small>{interval(own.low, own.high)}</small>
              </td>
              {base && <td class="num">{its ? fixed(its.value) : ""}</td>}
            </tr>
          );
        })}
        {mine.f1 !== undefined && (
          <tr class="total">
            <th scope="row">
              F1
              <small>answers exactly what is benign</small>
            </th>
            <td class="plot" />
            <td class="num">{fixed(mine.f1, 3)}</td>
            {base && <td class="num">{base.f1 === undefined ? "" : fixed(base.f1, 3)}</td>}
          </tr>
        )}
      </tbody>
    </table>
  );
}

function estimate(results: HeldOut, kind: string): Estimate {
  const found = results.kinds?.[kind];
  return found
    ? { value: found.refusal_rate, low: found.refusal_rate_95[0], high: found.refusal_rate_95[1] }
    : { value: null, low: null, high: null };
}
