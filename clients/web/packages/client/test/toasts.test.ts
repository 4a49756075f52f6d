import assert from "node:assert/strict";
import { mock, test } from "node:test";
import type { Presented, Snapshot } from "../src/index.ts";
import { AS_THE_APP } from "../src/protocol.ts";
import type { Notification, Presentation } from "../src/protocol.ts";
import { toasts } from "../src/toasts.ts";
import type { ToastOptions } from "../src/toasts.ts";

/** A client without a connection, a screen of ids, and time that is put forward by hand. */
function world(options: Partial<ToastOptions> = {}) {
  mock.timers.enable({ apis: ["setTimeout"] });
  let present: (toast: Presented) => void = () => {};
  let changed = () => {};
  const screen: string[] = [];
  const noise: string[] = [];
  const handles = new Map<string, { close(): void; hold(held: boolean): void }>();
  const items: Partial<Notification>[] = [];
  const client = {
    on: (_name: string, handler: never) => {
      present = handler;
      return () => { present = () => {}; };
    },
    subscribe: (listener: () => void) => {
      changed = listener;
      return () => { changed = () => {}; };
    },
    getSnapshot: () => ({ items }) as unknown as Snapshot,
  };
  const stop = toasts(client as never, {
    show: ({ notification: { id } }, close, hold) => {
      screen.push(id);
      handles.set(id, { close, hold });
    },
    hide: (id) => screen.splice(screen.indexOf(id), 1),
    play: (sound) => noise.push(`sound ${sound}`),
    vibrate: () => noise.push("vibration"),
    ...options,
  });
  return {
    screen, noise, handles, items, stop,
    arrive: (id: string, presentation: Partial<Presentation> = {}) => present({ ...AS_THE_APP, ...presentation, notification: { id } as Notification }),
    replay: (replay: number, ...ids: string[]) => {
      for (const id of ids) {
        items.push({ id, read: false, seen: false });
        present({ ...AS_THE_APP, notification: items.at(-1) as Notification, replay });
      }
    },
    change: () => changed(),
    pass: (ms: number) => mock.timers.tick(ms),
  };
}

test("a toast leaves after the time that its user wants, else the application's", (t) => {
  t.after(() => mock.timers.reset());
  const { screen, arrive, pass } = world({ durationMs: 5_000 });
  arrive("app's");
  arrive("user's", { durationMs: 2_000 });
  arrive("long", { durationMs: 60_000, autoDismiss: true });
  pass(1_999);
  assert.deepEqual(screen, ["app's", "user's", "long"]);
  pass(1);
  assert.deepEqual(screen, ["app's", "long"]);
  pass(3_000);
  assert.deepEqual(screen, ["long"]);
});

test("without auto-dismiss it stays until somebody closes it; for no time at all it is in the feed alone", (t) => {
  t.after(() => mock.timers.reset());
  const { screen, noise, handles, arrive, pass } = world({ autoDismiss: false });
  arrive("stays", { durationMs: 10 });
  arrive("leaves", { durationMs: 10, autoDismiss: true });
  arrive("none", { durationMs: 0, autoDismiss: true, sound: "bell", vibration: false });
  pass(3_600_000);
  assert.deepEqual(screen, ["stays"]);
  assert.deepEqual(noise, ["sound true", "vibration", "sound true", "vibration", "sound bell"]);
  handles.get("stays")!.close();
  handles.get("stays")!.close();
  assert.deepEqual(screen, []);
});

test("sound and vibration are as the user wants them", (t) => {
  t.after(() => mock.timers.reset());
  const { noise, arrive } = world();
  arrive("a", { sound: false });
  arrive("b", { vibration: false, sound: "chime" });
  arrive("c", { vibration: false, sound: false });
  assert.deepEqual(noise, ["vibration", "sound chime"]);
});

test("what is held stays, and begins its time anew", (t) => {
  t.after(() => mock.timers.reset());
  const { screen, handles, arrive, pass } = world();
  arrive("a", { durationMs: 1_000 });
  pass(900);
  handles.get("a")!.hold(true);
  pass(10_000);
  assert.deepEqual(screen, ["a"]);
  handles.get("a")!.hold(false);
  pass(999);
  assert.deepEqual(screen, ["a"]);
  pass(1);
  assert.deepEqual(screen, []);
  handles.get("a")!.hold(false);
  pass(10_000);
});

test("what is read or removed anywhere leaves, the oldest of too many leaves, and all leave in the end", (t) => {
  t.after(() => mock.timers.reset());
  const { screen, items, arrive, change, stop } = world({ autoDismiss: false, most: 3 });
  for (const id of ["a", "b", "c", "d"]) arrive(id);
  assert.deepEqual(screen, ["b", "c", "d"]);
  change(); // not in the feed yet: they stay
  items.push({ id: "b", read: false }, { id: "c", read: false }, { id: "d", read: false });
  change();
  assert.deepEqual(screen, ["b", "c", "d"]);
  items.splice(0, 2, { id: "b", read: true });
  change();
  assert.deepEqual(screen, ["d"]);
  stop();
  assert.deepEqual(screen, []);
  arrive("e");
  assert.deepEqual(screen, []);
});

test("what came while the client was away makes one noise, and the newest of it is on the screen", (t) => {
  t.after(() => mock.timers.reset());
  const { screen, noise, replay, arrive, pass } = world({ autoDismiss: false, most: 3 });
  for (let n = 1; n <= 50; n += 1) {
    replay(50, `n${n}`);
    pass(20); // longer than it is gathered
  }
  pass(1_000);
  assert.deepEqual(noise, ["sound true", "vibration"]);
  assert.deepEqual(screen, ["n48", "n49", "n50"]);
  arrive("live");
  assert.equal(noise.length, 4);
  replay(52, "n51", "n52");
  pass(1_000);
  assert.equal(noise.length, 6);
});

test("what was read, seen or removed while the client was away makes no noise", (t) => {
  t.after(() => mock.timers.reset());
  const { screen, noise, items, replay, change, pass } = world({ autoDismiss: false });
  replay(4, "read", "seen", "removed");
  // Told behind them.
  items.splice(0, 3, { id: "read", read: true, seen: true }, { id: "seen", read: false, seen: true });
  change();
  pass(1_000);
  assert.deepEqual(noise, []);
  assert.deepEqual(screen, ["seen", "removed"]);
  replay(4, "new");
  pass(1_000);
  assert.deepEqual(noise, ["sound true", "vibration"]);
});
