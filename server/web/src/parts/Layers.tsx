import { useId } from "preact/hooks";
import type { EditCard, ProfileCard } from "../types";

const POINTS = ["resid_pre", "attn_out", "mlp_out", "resid_post"] as const;
type Point = (typeof POINTS)[number];

const WORDS: Record<Point, string> = {
  resid_pre: "before the block",
  attn_out: "attention's output",
  mlp_out: "MLP's output",
  resid_post: "after the block",
};

const WIDTH = 30;
/** Blocks beyond which the drawing is smaller, and scrolls rather than shrinks. */
const MANY = 16;
const [TOP, MIDDLE, BOTTOM] = [12, 36, 60];

/** The model's blocks along the residual stream, and where the profile edits them. */
export function Layers({ profile }: { profile: ProfileCard }) {
  const id = useId();
  const found = profile.edits.map(place).filter((each) => each !== null);
  const blocks = Array.from({ length: profile.layers }, (_, i) => i);
  const width = blocks.length * WIDTH + 16;
  const many = blocks.length > MANY;
  return (
    <figure class="layers">
      <div
        class="scroll"
        {...(many && { tabIndex: 0, role: "region", "aria-label": `Blocks of ${profile.name}` })}
      >
        <svg
          viewBox={`0 0 ${width} 88`}
          width={width * (many ? 1.2 : 1.5)}
          role="img"
          aria-labelledby={id}
          class={many ? "many" : ""}
        >
          <line class="stream" x1="0" x2={width} y1={MIDDLE} y2={MIDDLE} />
          {blocks.map((block) => (
            <g key={block} transform={`translate(${8 + block * WIDTH} 0)`}>
              <rect class="part" x="7" y={TOP - 7} width="16" height="14" rx="3" />
              <rect class="part" x="7" y={BOTTOM - 7} width="16" height="14" rx="3" />
              <path class="branch" d={`M7 ${MIDDLE}v${TOP - MIDDLE + 7}M23 ${TOP + 7}V${MIDDLE}`} />
              <path
                class="branch"
                d={`M7 ${MIDDLE}v${BOTTOM - MIDDLE - 7}M23 ${BOTTOM - 7}V${MIDDLE}`}
              />
              <text x="15" y="84" text-anchor="middle">
                {block}
              </text>
            </g>
          ))}
          {found.map(({ block, point, edit }, i) => (
            <Mark key={i} block={block} point={point} edit={edit} />
          ))}
        </svg>
      </div>
      <figcaption id={id}>{caption(profile, found)}</figcaption>
    </figure>
  );
}

interface Placed {
  block: number;
  point: Point;
  edit: EditCard;
}

function place(edit: EditCard): Placed | null {
  const [block, name] = edit.site.split(".");
  const point = POINTS.find((each) => each === name);
  return point ? { block: Number(block), point, edit } : null;
}

function Mark({ block, point, edit }: Placed) {
  const left = 8 + block * WIDTH;
  const [x, y] = {
    resid_pre: [left, MIDDLE],
    attn_out: [left + 15, TOP],
    mlp_out: [left + 15, BOTTOM],
    resid_post: [left + WIDTH, MIDDLE],
  }[point] as [number, number];
  return (
    <g class="edit">
      <title>{`Block ${block}, ${WORDS[point]}: ${describe(edit)}`}</title>
      {edit.gate && <circle class="gate" cx={x} cy={y} r="8" />}
      <circle class="dot" cx={x} cy={y} r="5" />
    </g>
  );
}

function describe({ rank, shift, phase, gate }: EditCard): string {
  const what = rank ? `rank ${rank}${shift ? " and a vector" : ""}` : "a vector";
  const parts = [what, tokens(phase)];
  if (gate) parts.push(`gated at ${gate.site}`);
  return parts.join(", ");
}

const tokens = (phase: string) =>
  phase === "all" ? "every token" : phase === "prompt" ? "the prompt's tokens" : "generated tokens";

function caption(profile: ProfileCard, found: readonly Placed[]): string {
  if (!profile.edits.length) return `${profile.layers} blocks, none of them edited.`;
  const blocks = [...new Set(found.map(({ block }) => block))].sort((a, b) => a - b);
  const points = [...new Set(found.map(({ point }) => WORDS[point]))];
  const phases = [...new Set(profile.edits.map(({ phase }) => tokens(phase)))];
  const ranks = profile.edits.map(({ rank }) => rank);
  const [least, most] = [Math.min(...ranks), Math.max(...ranks)];
  const rank =
    most === 0 ? "that add a vector" : `of rank ${least === most ? least : `${least} to ${most}`}`;
  const gated = profile.edits.some(({ gate }) => gate)
    ? "; a ring is a gate, which opens for some prompts"
    : "";
  return (
    `${profile.edits.length} edits ${rank}, ${points.join(" and ")}, ` +
    `in ${runs(blocks)} of ${profile.layers}, for ${phases.join(" and ")}${gated}.`
  );
}

/** "blocks 0–4 and 7" */
function runs(blocks: readonly number[]): string {
  const found: [number, number][] = [];
  for (const block of blocks) {
    const last = found.at(-1);
    if (last && block === last[1] + 1) last[1] = block;
    else found.push([block, block]);
  }
  const texts = found.map(([from, to]) => (from === to ? `${from}` : `${from}–${to}`));
  return `block${blocks.length > 1 ? "s" : ""} ${texts.join(", ")}`;
}
