import { useRef, useState } from "preact/hooks";
import {
  arms,
  busy,
  changeSettings,
  examples,
  retry,
  say,
  settings,
  stale,
  startOver,
  stop,
  turns,
} from "../comparison";

/** Where prompts are written. */
export function Composer() {
  const [text, setText] = useState("");
  const field = useRef<HTMLTextAreaElement>(null);
  const begun = turns.value.length > 0;
  const send = () => {
    if (!text.trim() || busy.value || !arms.value.length) return;
    say(text.trim());
    setText("");
  };
  return (
    <section class="composer" aria-label="Prompt">
      <div class="examples">
        <span class="label" id="examples">
          Try
        </span>
        <ul aria-labelledby="examples">
          {examples.value.map((example) => (
            <li key={example.kind}>
              <button
                type="button"
                title={`${example.text} (${example.about})`}
                onClick={() => startOver(example.text)}
              >
                {example.kind}
              </button>
            </li>
          ))}
        </ul>
        {begun && (
          <button type="button" class="plain" onClick={() => (startOver(), field.current?.focus())}>
            New comparison
          </button>
        )}
      </div>
      <form
        onSubmit={(event) => {
          event.preventDefault();
          send();
        }}
      >
        <label class="hidden" for="prompt">
          {begun ? "Next message" : "Prompt"}
        </label>
        <textarea
          id="prompt"
          ref={field}
          rows={2}
          value={text}
          placeholder={begun ? "Go on with the conversation …" : "Ask all columns the same thing …"}
          onInput={(event) => setText(event.currentTarget.value)}
          onKeyDown={(event) => {
            if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
            event.preventDefault();
            send();
          }}
        />
        <div class="actions">
          {busy.value ? (
            <button type="button" class="main stop" onClick={stop}>
              <span aria-hidden="true">■</span> Stop
            </button>
          ) : (
            <>
              {begun && (
                <button type="button" onClick={retry}>
                  {stale.value ? "Run again" : "Retry"}
                </button>
              )}
              <button type="submit" class="main" disabled={!text.trim()}>
                Send
              </button>
            </>
          )}
        </div>
      </form>
      <Settings />
    </section>
  );
}

function Settings() {
  const { temperature, maxTokens, seed, system, trace } = settings.value;
  return (
    <details class="settings">
      <summary>
        Temperature {temperature} · seed {seed}
        {maxTokens !== null && ` · at most ${maxTokens} tokens`}
        {system && " · system prompt"}
      </summary>
      <div class="fields">
        <Field
          label="Temperature"
          value={temperature}
          min={0}
          max={2}
          step={0.1}
          set={(v) => ({ temperature: v })}
        />
        <Field
          label="Tokens at most"
          value={maxTokens}
          min={1}
          max={1e6}
          step={1}
          set={(v) => ({ maxTokens: v })}
          empty={{ maxTokens: null }}
        />
        <Field
          label="Seed"
          value={seed}
          min={0}
          max={Number.MAX_SAFE_INTEGER}
          step={1}
          set={(v) => ({ seed: v })}
        />
        <label class="wide">
          System prompt
          <input
            type="text"
            value={system}
            onChange={(event) => changeSettings({ system: event.currentTarget.value })}
          />
        </label>
        <label class="check">
          <input
            type="checkbox"
            checked={trace}
            onChange={(event) => changeSettings({ trace: event.currentTarget.checked })}
          />
          <span>Scores of each token</span>
        </label>
      </div>
    </details>
  );
}

type Change = Parameters<typeof changeSettings>[0];

interface FieldProps {
  label: string;
  value: number | null;
  min: number;
  max: number;
  step: number;
  set: (value: number) => Change;
  /** What an empty field means, if it may be empty. */
  empty?: Change;
}

function Field({ label, value, min, max, step, set, empty }: FieldProps) {
  return (
    <label>
      {label}
      <input
        type="number"
        value={value ?? ""}
        placeholder={empty && "the server's choice"}
        min={min}
        max={max}
        step={step}
        onChange={(event) => {
          const input = event.currentTarget;
          if (input.value && input.validity.valid) changeSettings(set(input.valueAsNumber));
          else if (empty && !input.validity.badInput && !input.value) changeSettings(empty);
          else input.value = String(value ?? "");
        }}
      />
    </label>
  );
}
