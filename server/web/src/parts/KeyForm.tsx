import { useId, useRef } from "preact/hooks";
import { apiKey, keyWanted, setKey } from "../api";

/** Takes the API key. In the page's head it opens under a button; `inline` it stands by itself. */
export function KeyForm({ inline = false }: { inline?: boolean }) {
  const details = useRef<HTMLDetailsElement>(null);
  const id = useId();
  const save = (event: SubmitEvent) => {
    event.preventDefault();
    const form = event.currentTarget as HTMLFormElement;
    setKey(String(new FormData(form).get("key") ?? ""));
    form.reset();
    if (details.current) details.current.open = false;
  };
  const form = (
    <form class="key" onSubmit={save}>
      <label for={id}>API key</label>
      <div class="row">
        <input
          id={id}
          name="key"
          type="password"
          autocomplete="off"
          spellcheck={false}
          placeholder="ph-…"
        />
        <button type="submit" class="main">
          Use key
        </button>
      </div>
      {!inline && (
        <p class="quiet">
          {apiKey.value ? "A key is in use. An empty field forgets it. " : ""}
          Kept in this tab only.
        </p>
      )}
    </form>
  );
  if (inline) return form;
  return (
    <details class="menu" ref={details}>
      <summary class={keyWanted.value ? "wanted" : ""}>
        {keyWanted.value ? "Key needed" : apiKey.value ? "Key in use" : "Key"}
      </summary>
      <div class="sheet">{form}</div>
    </details>
  );
}
