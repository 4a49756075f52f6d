import assert from "node:assert/strict";
import { test } from "node:test";
import { watchAttention } from "../src/attention.ts";

class FakeDocument extends EventTarget {
  visibilityState = "visible";
  focused = true;
  defaultView = new EventTarget();
  hasFocus = () => this.focused;
}

test("hidden, visible, focused and idle follow the document, the focus and input", (context) => {
  context.mock.timers.enable({ apis: ["setTimeout"] });
  let now = 0;
  const pass = (ms: number) => {
    now += ms;
    context.mock.timers.tick(ms);
  };
  const document = new FakeDocument();
  const told: string[] = [];
  const end = new AbortController();
  watchAttention(document as unknown as Document, 1_000, () => now, end.signal, (state) => told.push(state));
  document.focused = false;
  document.defaultView.dispatchEvent(new Event("blur"));
  document.visibilityState = "hidden";
  document.dispatchEvent(new Event("visibilitychange"));
  pass(5_000);
  document.visibilityState = "visible";
  document.dispatchEvent(new Event("visibilitychange"));
  pass(1_000);
  document.focused = true;
  document.defaultView.dispatchEvent(new Event("keydown"));
  pass(999);
  document.defaultView.dispatchEvent(new Event("pointermove"));
  pass(999);
  assert.deepEqual(told, ["focused", "visible", "hidden", "visible", "idle", "focused"]);
  end.abort();
  document.defaultView.dispatchEvent(new Event("blur"));
  pass(10_000);
  assert.equal(told.length, 6);
});
