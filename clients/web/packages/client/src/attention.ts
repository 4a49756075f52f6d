/** What the user of this tab looks at: document visibility, focus, and input. */

import type { Attention } from "./protocol.ts";

const INPUTS = ["pointerdown", "pointermove", "keydown", "wheel"];

/**
 * @param idleMs a visible page without input for so long is idle.
 * @param told called at once, and with each change.
 * @param signal ends it.
 */
export function watchAttention(
  document: Document, idleMs: number, now: () => number, signal: AbortSignal, told: (state: Attention) => void,
): void {
  const window = document.defaultView!;
  let lastInput = now();
  let timer: ReturnType<typeof setTimeout>;
  let state: Attention | undefined;
  const look = () => {
    clearTimeout(timer);
    const left = lastInput + idleMs - now();
    const found: Attention = document.visibilityState === "hidden" ? "hidden"
      : left <= 0 ? "idle"
      : document.hasFocus() ? "focused"
      : "visible";
    if (found !== "hidden" && left > 0) timer = setTimeout(look, left);
    if (found !== state) told((state = found));
  };
  const input = () => {
    lastInput = now();
    if (state === "idle") look();
  };
  const changed = () => {
    lastInput = now(); // coming, and going, is input
    look();
  };
  const options = { passive: true, capture: true, signal };
  for (const name of INPUTS) window.addEventListener(name, input, options);
  for (const name of ["focus", "blur", "pageshow"]) window.addEventListener(name, changed, { signal });
  document.addEventListener("visibilitychange", changed, { signal });
  signal.addEventListener("abort", () => clearTimeout(timer));
  look();
}
