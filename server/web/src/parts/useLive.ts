import { useSignal, type Signal } from "@preact/signals";
import { useEffect } from "preact/hooks";
import { apiKey, inWords, isAbort } from "../api";

export interface LiveValue<T> {
  value: T | null;
  error: string | null;
}

/** Asks again and again while the page is seen, and says what came last. */
export function useLive<T>(
  ask: (signal: AbortSignal) => Promise<T>,
  every: number,
  key: string = "",
): Signal<LiveValue<T>> {
  const found = useSignal<LiveValue<T>>({ value: null, error: null });
  const secret = apiKey.value;
  useEffect(() => {
    const controller = new AbortController();
    let timer = 0;
    let asking = false;
    found.value = { value: null, error: null };
    const again = async () => {
      clearTimeout(timer);
      if (asking || document.hidden) return;
      asking = true;
      const since = performance.now();
      try {
        found.value = { value: await ask(controller.signal), error: null };
      } catch (error) {
        if (isAbort(error)) return;
        // What was known stays, and is said to be old.
        found.value = { ...found.value, error: inWords(error) };
      } finally {
        asking = false;
      }
      // What the server takes long to work out is asked for less often.
      const wait = Math.max(every, 5 * (performance.now() - since));
      if (!controller.signal.aborted) timer = setTimeout(again, wait);
    };
    const seen = () => void again();
    document.addEventListener("visibilitychange", seen);
    void again();
    return () => {
      controller.abort();
      clearTimeout(timer);
      document.removeEventListener("visibilitychange", seen);
    };
  }, [every, key, secret]);
  return found;
}
