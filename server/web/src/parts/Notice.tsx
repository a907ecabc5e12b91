import type { ComponentChildren } from "preact";

interface Props {
  tone?: "bad" | "plain";
  action?: { label: string; do: () => void };
  children: ComponentChildren;
}

/** Something that the user must know; what is bad is also announced. */
export function Notice({ tone = "plain", action, children }: Props) {
  return (
    <div class={`notice ${tone}`} role={tone === "bad" ? "alert" : "status"}>
      <p>{children}</p>
      {action && (
        <button type="button" onClick={action.do}>
          {action.label}
        </button>
      )}
    </div>
  );
}
