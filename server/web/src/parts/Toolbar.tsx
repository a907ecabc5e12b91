import { addArm, arms, marks, mostEdit, tint, unread } from "../comparison";
import { MOST_ARMS, TINTS, type Tint } from "../logic/link";
import { profilesByName } from "../session";
import { CopyMenu } from "./CopyMenu";

const NAMES: Record<Tint, string> = {
  answer: "Answer",
  benign: "Benign",
  edit: "Edit size",
  none: "None",
};

/** How replies are shown, and ways to take them elsewhere. */
export function Toolbar() {
  return (
    <section class="toolbar" aria-label="Display">
      <fieldset class="choice">
        <legend>Tint</legend>
        {TINTS.map((each) => (
          <label key={each}>
            <input
              type="radio"
              name="tint"
              value={each}
              checked={tint.value === each}
              onChange={() => (tint.value = each)}
            />
            <span>{NAMES[each]}</span>
          </label>
        ))}
      </fieldset>
      <Legend />
      <label class="check">
        <input
          type="checkbox"
          checked={marks.value}
          onChange={(event) => (marks.value = event.currentTarget.checked)}
        />
        <span>
          <span class="new sample">Mark</span> what differs from raw
        </span>
      </label>
      <div class="end">
        {arms.value.length < MOST_ARMS && profilesByName.value.size > 0 && (
          <button type="button" onClick={addArm}>
            <span aria-hidden="true">+</span> Column
          </button>
        )}
        <CopyMenu />
      </div>
    </section>
  );
}

function Legend() {
  const shown = tint.value;
  if (shown === "none") return null;
  if (unread.value && shown !== "edit") return <span class="legend">not read here</span>;
  const [low, high] =
    shown === "edit"
      ? ["0", `${mostEdit.value} of the state`]
      : shown === "answer"
        ? ["will refuse", "will answer"]
        : ["harmful", "benign"];
  return (
    <div class="legend" role="img" aria-label={`Tint from ${low} to ${high}`}>
      <span>{low}</span>
      <span class={`scale tint-${shown}`}>
        {Array.from({ length: 11 }, (_, i) => (
          <i key={i} class={`q${i}`} />
        ))}
      </span>
      <span>{high}</span>
    </div>
  );
}
