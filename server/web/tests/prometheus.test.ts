import { expect, test } from "vitest";
import { parse, quantile, since, Snapshot, wilson } from "../src/logic/prometheus";

const PAGE = `# HELP steering_requests_total Requests.
# TYPE steering_requests_total counter
steering_requests_total{finish_reason="stop",profile="raw"} 7.0
steering_requests_total{finish_reason="length",profile="raw"} 1.0
steering_requests_total{finish_reason="stop",profile="say \\"hi\\", {x} \\\\ \\n"} 2e0
steering_requests_running 3
seconds_bucket{le="0.1",profile="raw"} 2
seconds_bucket{le="0.5",profile="raw"} 6
seconds_bucket{le="+Inf",profile="raw"} 8
seconds_bucket{le="0.1",profile="b"} 1
seconds_bucket{le="0.5",profile="b"} 1
seconds_bucket{le="+Inf",profile="b"} 1
not a sample
`;

const snapshot = new Snapshot(0, parse(PAGE));

test("samples are summed over the labels that are not named", () => {
  expect(snapshot.sum("steering_requests_total")).toBe(10);
  expect(snapshot.sum("steering_requests_total", { profile: "raw" })).toBe(8);
  expect(snapshot.sum("steering_requests_running")).toBe(3);
  expect(snapshot.sum("nothing")).toBe(0);
});

test("labels may hold anything", () => {
  expect(snapshot.values("steering_requests_total", "profile")).toEqual([
    "raw",
    'say "hi", {x} \\ \n',
  ]);
});

test("quantiles are interpolated as Prometheus does it", () => {
  const buckets = snapshot.buckets("seconds", { profile: "raw" });
  expect(buckets).toEqual([
    [0.1, 2],
    [0.5, 6],
    [Infinity, 8],
  ]);
  expect(quantile(0.25, buckets)).toBeCloseTo(0.1);
  expect(quantile(0.5, buckets)).toBeCloseTo(0.3);
  expect(quantile(0.95, buckets)).toBe(0.5);
  expect(quantile(0.5, [])).toBeNull();
  expect(quantile(0.5, [[1, 0]])).toBeNull();
});

test("histograms of several series add up", () => {
  expect(snapshot.buckets("seconds")).toEqual([
    [0.1, 3],
    [0.5, 7],
    [Infinity, 9],
  ]);
});

test("only what is new counts, unless the server has started anew", () => {
  const before: [number, number][] = [
    [0.1, 1],
    [Infinity, 4],
  ];
  expect(
    since(
      [
        [0.1, 2],
        [Infinity, 9],
      ],
      before,
    ),
  ).toEqual([
    [0.1, 1],
    [Infinity, 5],
  ]);
  expect(since([[0.1, 0]], before)).toEqual([[0.1, 0]]);
});

test("Wilson's interval is the textbook's", () => {
  const [low, high] = wilson(0, 400);
  expect(low).toBe(0);
  expect(high).toBeCloseTo(0.0095, 4);
  const [from, to] = wilson(211, 400);
  expect(from).toBeCloseTo(0.4785, 4);
  expect(to).toBeCloseTo(0.5759, 4);
});
