/** Requests to the server that this page came from, with the tab's key. */

import { signal } from "@preact/signals";
import { events } from "./logic/sse";
import type { ApiErrorBody, CompareChunk, CompareRequest } from "./types";

const KEY = "pilothouse-key";

/** The API key; it lives as long as the tab. */
export const apiKey = signal(read());

/** True after the server has asked for a key, or refused the one it got. */
export const keyWanted = signal(false);

function read(): string {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

export function setKey(key: string): void {
  keyWanted.value = false;
  apiKey.value = key.trim(); // what is served is asked for anew at once
  try {
    if (apiKey.value) sessionStorage.setItem(KEY, apiKey.value);
    else sessionStorage.removeItem(KEY);
  } catch {
    // then it is forgotten with the page
  }
}

/** What went wrong, in words for the user. */
export class ApiError extends Error {
  constructor(
    message: string,
    readonly status: number,
    readonly code: string = "",
  ) {
    super(message);
  }
}

const UNREACHABLE = "The server cannot be reached. Is it still running?";
const BROKEN_OFF =
  "The connection ended before the replies were complete. The server may have stopped; try again.";

/** Where a path of the server is, seen from this page: a proxy may serve it below a path. */
export const addressOf = (path: string): string => new URL(`.${path}`, document.baseURI).href;

/** A response whose status is good. Raises ApiError, or AbortError. */
async function send(path: string, init: RequestInit = {}): Promise<Response> {
  const headers = new Headers(init.headers);
  if (/[^\x21-\x7e]/.test(apiKey.value)) {
    keyWanted.value = true; // a browser would not even send it
    throw new ApiError("No key holds such characters; copy it again.", 401);
  }
  if (apiKey.value) headers.set("Authorization", `Bearer ${apiKey.value}`);
  let response: Response;
  try {
    response = await fetch(addressOf(path), {
      ...init,
      headers,
      credentials: "omit",
      cache: "no-store",
    });
  } catch (error) {
    if (isAbort(error)) throw error;
    throw new ApiError(UNREACHABLE, 0);
  }
  if (response.ok) {
    return response;
  }
  throw await toError(response);
}

async function toError(response: Response): Promise<ApiError> {
  let body: ApiErrorBody | undefined;
  try {
    body = (await response.json()).error;
  } catch {
    // a proxy's page, say
  }
  let message = body?.message ?? `The server answered with status ${response.status}.`;
  const wait = response.headers.get("Retry-After");
  if (response.status === 429 && wait) message += ` It asks to wait ${wait} s.`;
  if (response.status === 401) keyWanted.value = true;
  return new ApiError(message, response.status, body?.code);
}

export async function getJson<T>(path: string, signal?: AbortSignal): Promise<T> {
  return (await send(path, signal ? { signal } : {})).json();
}

export async function getText(path: string, signal?: AbortSignal): Promise<string> {
  return (await send(path, signal ? { signal } : {})).text();
}

/** The chunks of a comparison, as they come. Raises ApiError, or AbortError. */
export async function* compare(
  request: CompareRequest,
  signal: AbortSignal,
): AsyncGenerator<CompareChunk> {
  const response = await send("/v1/steering/compare", {
    method: "POST",
    headers: { "Content-Type": "application/json", Accept: "text/event-stream" },
    body: JSON.stringify(request),
    signal,
  });
  const stream = events(response.body!);
  for (;;) {
    let step: IteratorResult<string, boolean>;
    try {
      step = await stream.next();
    } catch (error) {
      if (isAbort(error)) throw error;
      throw new ApiError(BROKEN_OFF, 0);
    }
    if (step.done) {
      if (step.value) return;
      throw new ApiError(BROKEN_OFF, 0);
    }
    const chunk: CompareChunk = JSON.parse(step.value);
    if (chunk.error) throw new ApiError(chunk.error.message, 200, chunk.error.code);
    yield chunk;
  }
}

export const isAbort = (error: unknown): boolean =>
  error instanceof DOMException && error.name === "AbortError";

export const inWords = (error: unknown): string =>
  error instanceof Error ? error.message : String(error);
