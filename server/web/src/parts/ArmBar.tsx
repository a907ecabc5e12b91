import { useRef } from "preact/hooks";
import { arms, changeArm, removeArm, type Arm } from "../comparison";
import { strengthText } from "../logic/format";
import { LEAST_ARMS } from "../logic/link";
import { profilesByName } from "../session";

/** The columns: which profile each has, and how strong it is. */
export function ArmBar() {
  return (
    <section class="arms" aria-label="Columns">
      <div class="columns" data-columns={arms.value.length}>
        {arms.value.map((arm, i) => (
          <ArmControl key={arm.id} arm={arm} position={i + 1} />
        ))}
      </div>
    </section>
  );
}

function ArmControl({ arm, position }: { arm: Arm; position: number }) {
  const profiles = profilesByName.value;
  const card = profiles.get(arm.profile);
  return (
    <fieldset class="arm">
      <legend class="hidden">Column {position}</legend>
      <div class="row">
        <select
          aria-label={`Profile of column ${position}`}
          value={arm.profile}
          onChange={(event) =>
            changeArm(arm.id, { profile: event.currentTarget.value, strength: null })
          }
        >
          {!card && <option value={arm.profile}>{arm.profile} (not here)</option>}
          {[...profiles.keys()].map((name) => (
            <option key={name} value={name}>
              {name}
            </option>
          ))}
        </select>
        {card?.red_team && (
          <span class="mark red" title="This profile removes refusals">
            red team
          </span>
        )}
        {arms.value.length > LEAST_ARMS && (
          <button
            type="button"
            class="plain close"
            aria-label={`Remove column ${position}, ${arm.profile}`}
            title="Remove this column"
            onClick={() => removeArm(arm.id)}
          >
            <span aria-hidden="true">×</span>
          </button>
        )}
      </div>
      {card && !card.identity && !card.folded ? (
        <Strength key={arm.profile} arm={arm} own={card.strength} position={position} />
      ) : (
        <p class="quiet strength">
          {card?.folded ? "Folded into the weights" : card?.identity ? "No edits" : "\u00a0"}
        </p>
      )}
    </fieldset>
  );
}

function Strength({ arm, own, position }: { arm: Arm; own: number; position: number }) {
  const value = arm.strength ?? own;
  // It keeps what it has reached: a slider that shrank under its thumb could not go back.
  const reach = useRef({ low: 0, high: 0 });
  reach.current = {
    low: Math.min(reach.current.low, value),
    high: Math.max(reach.current.high, 2 * Math.abs(own), Math.abs(value)),
  };
  const { low, high } = reach.current;
  const most = high || 1;
  const set = (strength: number) =>
    changeArm(arm.id, { strength: strength === own ? null : strength });
  return (
    <label class="strength">
      <span class="hidden">Strength of column {position}</span>
      <input
        type="range"
        min={low}
        max={most}
        step={most / 40}
        value={value}
        aria-valuetext={`${strengthText(value)}${value === own ? ", the profile's own" : ""}`}
        onInput={(event) => set(near(Number(event.currentTarget.value), own))}
      />
      <output>{strengthText(value)}</output>
    </label>
  );
}

/** The profile's own strength where a slider's step is off it by rounding only. */
function near(value: number, own: number): number {
  const rounded = Number(value.toPrecision(4));
  return Math.abs(rounded - own) < 1e-3 * Math.abs(own) ? own : rounded;
}
