/** What is told of each new notification: after the client was away, over polls, and among tabs of several versions. */

import assert from "node:assert/strict";
import { afterEach, beforeEach, test } from "node:test";
import { BroadcastChannel } from "node:worker_threads";
import { WebSocket } from "ws";
import { CarillonClient } from "../src/index.ts";
import type { Options, Presented, Timing } from "../src/index.ts";
import { AS_THE_APP } from "../src/protocol.ts";
import type { Notification } from "../src/protocol.ts";
import { toasts } from "../src/toasts.ts";
import { eventually, FakeServer } from "./fake_server.ts";
import { shown } from "./model.ts";

let server: FakeServer;
let ends: (() => void)[] = [];

beforeEach(async () => {
  server = await FakeServer.start();
});

afterEach(async () => {
  for (const end of ends) end();
  ends = [];
  await server.stop();
});

const FAST: Partial<Timing> = { backoff: [20, 100], ack: 10, pong: 60, connect: 20_000, stable: 500, recount: 10, poll: 20, wait: 1_000, settle: 300 };

/** A client, and what it presents from its first moment on. */
function open(options: Partial<Options> = {}): { client: CarillonClient; told: Presented[] } {
  const client = new CarillonClient({
    url: server.ws, http: server.http, userId: "ann", token: async () => server.token, ...options, timing: FAST,
    env: { WebSocket: WebSocket as never, BroadcastChannel: undefined, locks: undefined, document: undefined, ...options.env },
  });
  const told: Presented[] = [];
  client.on("present", (toast) => told.push(toast));
  ends.push(() => client.close());
  client.connect();
  return { client, told };
}

const isOpen = (client: CarillonClient) =>
  eventually("open and loaded", () => client.getSnapshot().connection.state === "open" && client.getSnapshot().loaded);

function memory(): NonNullable<Options["storage"]> {
  const kept = new Map<string, string>();
  return { getItem: (key) => kept.get(key) ?? null, setItem: (key, value) => void kept.set(key, value) };
}

for (const transport of ["websocket", "sse", "poll", "plain poll"] as const) {
  test(`${transport}: what came while the client was away is shown as its user wants, and makes one noise`, async () => {
    server.refuse.wait = transport === "plain poll";
    server.syncLimit = 2;
    server.presentation = { ...AS_THE_APP, sound: "bell", durationMs: 60_000 };
    server.own = { channels: { in_app: { sound: "bell", durationMs: 60_000 } } };
    const options: Partial<Options> = { transports: [transport === "plain poll" ? "poll" : transport], storage: memory() };
    const before = open(options).client;
    await isOpen(before);
    before.close();
    const [read, seen] = [server.model.note(), server.model.note()];
    for (let n = 0; n < 5; n += 1) server.model.note();
    server.model.change({ type: "MARK_READ", id: "", notificationIds: [read.id] });
    server.model.change({ type: "MARK_SEEN", id: "", notificationIds: [seen.id] });
    const { client, told } = open(options);
    const screen: string[] = [];
    const noise: unknown[] = [];
    ends.push(toasts(client, {
      show: ({ notification: { id } }) => screen.push(id), hide: (id) => screen.splice(screen.indexOf(id), 1),
      play: (sound) => noise.push(sound), vibrate: () => noise.push("vibration"), most: 3,
    }));
    await eventually("all are there", () => told.length === 7);
    assert.deepEqual(told.map((toast) => [toast.notification.seq, toast.sound, toast.vibration]), [
      [1, false, false], [2, false, false], ...[3, 4, 5, 6, 7].map((seq) => [seq, "bell", true]),
    ]);
    assert.deepEqual(new Set(told.map((toast) => toast.durationMs)), new Set([60_000]));
    assert.equal(new Set(told.map((toast) => toast.replay)).size, 1);
    assert.ok(told[0]!.replay);
    await eventually("heard", () => noise.length);
    assert.deepEqual(noise, ["bell", "vibration"]);
    assert.deepEqual(screen, server.model.rows.slice(-3).map((row) => row.id));
    await isOpen(client);
    server.model.note();
    await eventually("a live one is heard", () => noise.length > 2);
    assert.deepEqual(noise, ["bell", "vibration", "bell", "vibration"]);
    assert.deepEqual([told.length, told[7]!.replay], [8, undefined]);
  });
}

test("polling: where preferences are not to be had, notifications are shown as the application has it", async () => {
  server.refuse.preferences = true;
  server.own = { sound: "bell" };
  const { client, told } = open({ transports: ["poll"] });
  await isOpen(client);
  server.model.note();
  await eventually("shown", () => told.length === 1);
  assert.ok(server.requests.some((request) => request.endsWith("/preferences")));
  assert.deepEqual(client.getSnapshot().presentation, AS_THE_APP);
  assert.deepEqual([told[0]!.sound, told[0]!.vibration], [true, true]);
});

class TabChannel extends BroadcastChannel {
  constructor(name: string) {
    super(name);
    this.unref();
  }
}

/** A tab of a version before notifications were presented: what it says is given by hand. */
function oldTab(name: string) {
  const channel = new TabChannel(`${name}:ann`);
  const heard: Record<string, unknown>[] = [];
  channel.onmessage = (event) => heard.push((event as { data: Record<string, unknown> }).data);
  ends.push(() => channel.close());
  return { heard, say: (message: unknown) => channel.postMessage(message) };
}

/** Grants a lock to the first tab, or to none: another one leads. */
const locks = (granted: boolean) =>
  ({ request: (_name: string, _options: unknown, run: () => Promise<void>) => (granted ? run() : new Promise(() => {})) }) as unknown as LockManager;

test("tabs: one of an older version understands a leader of this one", async () => {
  const name = `old-${server.http}`;
  const old = oldTab(name);
  const { client } = open({ name, shareTabs: true, env: { BroadcastChannel: TabChannel as never, locks: locks(true) } });
  await isOpen(client);
  old.say({ t: "hello" });
  await eventually("answered", () => old.heard.some((message) => message["t"] === "state"));
  const { id } = server.model.note();
  // As it reads it: notifications, nothing around them.
  const fresh = () => old.heard.flatMap((message) => (message["t"] === "state" ? (message["fresh"] as Notification[]) : []));
  await eventually("told", () => fresh().length);
  assert.deepEqual(fresh().map((note) => [note.id, note.seq, note.type]), [[id, 1, "t"]]);
});

test("tabs: one of this version understands a leader of an older one", async () => {
  const name = `new-${server.http}`;
  const old = oldTab(name);
  const { client, told } = open({ name, shareTabs: true, env: { BroadcastChannel: TabChannel as never, locks: locks(false) } });
  await eventually("asked", () => old.heard.some((message) => message["t"] === "hello"));
  const note = shown(server.model.note());
  const state = (fresh: Notification[]) => ({
    t: "state", leader: "old", connection: { state: "open", transport: "websocket" }, presence: {}, fresh,
    dump: { position: { epoch: "e1", lastSeq: 1, lastRev: 1 }, items: [note], gone: [], count: [1, 1, 1, 1], cursor: null },
  });
  old.say(state([]));
  await isOpen(client);
  assert.deepEqual(client.getSnapshot().presentation, AS_THE_APP);
  const notes: string[] = [];
  client.on("notification", ({ id }) => notes.push(id));
  old.say(state([note]));
  await eventually("told", () => told.length);
  assert.deepEqual(notes, [note.id]);
  // Shown; who is to make the noise, and whether any, the old leader does not say.
  assert.deepEqual(told, [{ ...AS_THE_APP, sound: false, vibration: false, notification: note }]);
});
