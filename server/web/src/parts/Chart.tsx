import { useEffect, useRef } from "preact/hooks";
import uPlot from "uplot";
import { colour, repaint } from "../theme";

export type Data = uPlot.AlignedData;

interface Props {
  /** What a picture of it would be called; charts are drawn on a canvas. */
  label: string;
  height: number;
  data: Data;
  /** Everything but the size. Called anew when colours, or `structure`, change. */
  make: (colour: (name: string) => string) => Omit<uPlot.Options, "width" | "height">;
  structure?: string;
  /** Index under the pointer, from outside and to outside. */
  at?: number | null;
  onAt?: (index: number | null) => void;
}

/** A uPlot chart that follows its box's width and the page's colours. */
export function Chart({ label, height, data, make, structure = "", at = null, onAt }: Props) {
  const box = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | null>(null);
  const latest = useRef({ data, onAt });
  latest.current = { data, onAt };
  const paint = repaint.value;

  useEffect(() => {
    const element = box.current!;
    const options = make(colour);
    const made = new uPlot(
      {
        legend: { show: false },
        ...options,
        cursor: { drag: { x: false, y: false }, y: false, ...options.cursor },
        hooks: {
          ...options.hooks,
          setCursor: [
            (u) => {
              // Only what a pointer does: `at` moves the cursor too.
              if (u.over.matches(":hover")) latest.current.onAt?.(u.cursor.idx ?? null);
            },
          ],
        },
        width: element.clientWidth,
        height,
      },
      latest.current.data,
      element,
    );
    plot.current = made;
    const leave = () => latest.current.onAt?.(null);
    made.over.addEventListener("mouseleave", leave);
    const sizes = new ResizeObserver(() => made.setSize({ width: element.clientWidth, height }));
    sizes.observe(element);
    return () => {
      sizes.disconnect();
      made.over.removeEventListener("mouseleave", leave);
      made.destroy();
      plot.current = null;
    };
  }, [paint, structure, height]);

  useEffect(() => plot.current?.setData(data), [data]);

  useEffect(() => {
    const made = plot.current;
    if (!made || made.over.matches(":hover")) return;
    const x = at === null ? undefined : made.data[0][at];
    made.setCursor({ left: x === undefined ? -10 : made.valToPos(x, "x"), top: -10 }, false);
  }, [at]);

  return <div class="chart" ref={box} role="img" aria-label={label} />;
}
