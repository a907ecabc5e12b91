/** A comparison as something to paste elsewhere. The key is never in it. */

import type { CompareRequest } from "../types";

export function asCurl(request: CompareRequest, origin: string, withKey: boolean): string {
  return [
    `curl -N '${origin}/v1/steering/compare' \\`,
    ...(withKey ? [`  -H "Authorization: Bearer $PILOTHOUSE_KEY" \\`] : []),
    "  -H 'Content-Type: application/json' \\",
    `  -d '${JSON.stringify(request, null, 2).replaceAll("'", "'\\''")}'`,
  ].join("\n");
}

/** For the official client of OpenAI's API. */
export function asPython(request: CompareRequest, origin: string, withKey: boolean): string {
  return `${withKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url="${origin}/v1", api_key=${withKey ? 'os.environ["PILOTHOUSE_KEY"]' : '"none"'})
comparison = client.post(
    "/steering/compare",
    cast_to=object,
    body=${indented(toPython({ ...request, stream: false }))},
)
for choice in comparison["choices"]:
    receipt = choice["steering"]
    print(f"{receipt['profile']} ({receipt['outcome']}): {choice['message']['content']}")
`;
}

const indented = (text: string) => text.replaceAll("\n", "\n    ");

/** A value as a Python literal. */
export function toPython(value: unknown, indent = ""): string {
  if (value === null || value === undefined) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const deeper = indent + "    ";
  if (Array.isArray(value)) {
    if (!value.length) return "[]";
    return `[\n${value.map((item) => `${deeper}${toPython(item, deeper)},\n`).join("")}${indent}]`;
  }
  const items = Object.entries(value).filter(([, item]) => item !== undefined);
  if (items.every(([, item]) => typeof item !== "object" || item === null)) {
    return `{${items.map(([key, item]) => `${JSON.stringify(key)}: ${toPython(item)}`).join(", ")}}`;
  }
  return `{\n${items
    .map(([key, item]) => `${deeper}${JSON.stringify(key)}: ${toPython(item, deeper)},\n`)
    .join("")}${indent}}`;
}
