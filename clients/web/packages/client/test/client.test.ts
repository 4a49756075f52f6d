import assert from "node:assert/strict";
import { afterEach, beforeEach, test } from "node:test";
import { BroadcastChannel } from "node:worker_threads";
import { WebSocket } from "ws";
import { CarillonClient, CarillonError } from "../src/index.ts";
import type { Env, Options, Presented, Timing } from "../src/index.ts";
import { eventually, FakeServer } from "./fake_server.ts";

let server: FakeServer;
let clients: CarillonClient[] = [];

beforeEach(async () => {
  server = await FakeServer.start();
});

afterEach(async () => {
  for (const client of clients) client.close();
  clients = [];
  await server.stop();
});

/** Short enough for tests; proportions as in production. */
const FAST: Partial<Timing> = { backoff: [20, 100], ack: 10, pong: 60, connect: 1_000, stable: 500, recount: 10, poll: 20, wait: 1_000, settle: 300 };
const ENV: Partial<Env> = { WebSocket: WebSocket as unknown as Env["WebSocket"], BroadcastChannel: undefined, locks: undefined, document: undefined };

function open(options: Partial<Options> = {}): CarillonClient {
  const client = new CarillonClient({
    url: server.ws, http: server.http, userId: "ann", token: async () => server.token, ...options,
    env: { ...ENV, ...options.env }, timing: { ...FAST, ...options.timing },
  });
  clients.push(client);
  client.connect();
  return client;
}

const state = (client: CarillonClient) => client.getSnapshot().connection.state;
const seqs = (client: CarillonClient) => client.getSnapshot().items.map((item) => item.seq).join();
const isOpen = (client: CarillonClient) => eventually("open and loaded", () => state(client) === "open" && client.getSnapshot().loaded);

test("how notifications are to be shown: told by the server, in the snapshot, with each that arrives", async () => {
  const plain = { sound: true, vibration: true, durationMs: null, autoDismiss: null };
  server.presentation = { ...plain, sound: "bell", durationMs: 3_000 };
  const client = open();
  await isOpen(client);
  await eventually("told", () => client.getSnapshot().presentation.durationMs === 3_000);
  const told: Presented[] = [];
  client.on("present", (toast) => told.push(toast));
  const note = server.model.note();
  await eventually("shown", () => told.length === 1);
  assert.deepEqual(told[0], { ...plain, sound: "bell", durationMs: 3_000, notification: client.getSnapshot().items[0] });
  assert.equal(told[0]!.notification.id, note.id);
  // Nothing said on the next connection: as ever.
  server.presentation = null;
  server.cut(4202);
  await eventually("as ever", () => client.getSnapshot().presentation.durationMs === null);
  server.model.told({ type: "PRESENTATION", ...plain, vibration: false });
  await eventually("changed", () => !client.getSnapshot().presentation.vibration);
  server.model.note("quiet hours", true);
  await eventually("silent", () => told.length === 2);
  assert.deepEqual([told[1]!.sound, told[1]!.vibration], [false, false]);
});

test("preferences: read, changed in part, and not over another device's change", async () => {
  const client = open();
  assert.deepEqual(await client.preferences.get("own"), { document: {}, version: '"0"' });
  const { version } = await client.preferences.patch({ sound: "bell" }, { view: "own", version: '"0"' });
  assert.equal(version, '"1"');
  await assert.rejects(client.preferences.patch({ sound: false }, { version: '"0"' }), { code: "version_conflict", status: 412 });
  await client.preferences.patch({ vibration: false });
  assert.deepEqual((await client.preferences.get("own")).document, { sound: "bell", vibration: false });
  assert.deepEqual((await client.preferences.get()).document, { channels: {}, sound: "bell", vibration: false });
});

test("polling: how notifications are to be shown is read where no frame tells it", async () => {
  server.own = { sound: false, channels: { in_app: { sound: "bell", durationMs: 2_000 } } };
  const client = open({ transports: ["poll"], timing: { connect: 20_000 } });
  await isOpen(client);
  await eventually("read", () => client.getSnapshot().presentation.sound === "bell");
  assert.deepEqual(client.getSnapshot().presentation, { sound: "bell", vibration: true, durationMs: 2_000, autoDismiss: null });
  assert.equal(server.requests.filter((request) => request.endsWith("/preferences")).length, 1);
});

for (const transport of ["websocket", "sse", "poll", "plain poll"] as const) {
  const only = (): Partial<Options> => {
    server.refuse.wait = transport === "plain poll";
    return { transports: [transport === "plain poll" ? "poll" : transport] };
  };

  test(`${transport}: what is there, what comes, what changes elsewhere`, async () => {
    server.model.note();
    server.model.note();
    const client = open(only());
    await isOpen(client);
    assert.deepEqual([seqs(client), client.getSnapshot().unreadCount], ["2,1", 2]);
    const told: number[] = [];
    client.on("notification", (note) => told.push(note.seq));
    const third = server.model.note();
    await eventually("the third", () => seqs(client) === "3,2,1" && client.getSnapshot().unreadCount === 3);
    assert.deepEqual(told, [3]);
    server.model.change({ type: "MARK_READ", id: "", notificationIds: [third.id] });
    await eventually("read", () => client.getSnapshot().items[0]!.read && client.getSnapshot().unreadCount === 2);
  });

  test(`${transport}: own changes show at once and are confirmed`, async () => {
    for (let n = 0; n < 6; n += 1) server.model.note();
    const client = open(only());
    await isOpen(client);
    const [six, five, four, three] = client.getSnapshot().items.map((item) => item.id) as [string, string, string, string];
    const done = Promise.all([client.read(six), client.archive(five), client.dismiss(four), client.click(three, "yes")]);
    const { items, unreadCount, pending } = client.getSnapshot();
    assert.deepEqual([items.map((item) => `${item.seq}${item.read}`).join(), unreadCount, pending], ["6true,3true,2false,1false", 2, 4]);
    await done;
    await client.readAll();
    await eventually("agreement", () => client.getSnapshot().unreadCount === 0 && client.getSnapshot().pending === 0);
    assert.deepEqual(server.model.feed.map((row) => [row.seq, row.read, !!row.clicked]), [[6, true, false], [3, true, true], [2, true, false], [1, true, false]]);
    assert.equal(server.model.rows[4]!.archived && server.model.rows[3]!.dismissed, true);
  });

  test(`${transport}: a refused change is undone and its promise rejects`, async () => {
    const { id } = server.model.note();
    const client = open(only());
    await isOpen(client);
    server.refusal = { code: "invalid", temporary: false, status: 422 };
    const done = client.read(id);
    assert.equal(client.getSnapshot().unreadCount, 0);
    await assert.rejects(done, (error: unknown) => error instanceof CarillonError && error.code === "invalid" && !error.temporary);
    assert.deepEqual([client.getSnapshot().unreadCount, client.getSnapshot().items[0]!.read], [1, false]);
  });

  test(`${transport}: lost history is dropped and the feed read anew`, async () => {
    server.model.note("old");
    const client = open(only());
    await isOpen(client);
    server.model.epoch = "e2";
    server.model.rows = [];
    server.model.seq = server.model.rev = 0;
    server.model.note("new");
    server.cut(4202);
    await eventually("the new feed", () => client.getSnapshot().items.map((item) => item.title).join() === "new");
    assert.equal(client.getSnapshot().unreadCount, 1);
  });
}

test("a cut connection resumes with its position: nothing twice, nothing missed", async () => {
  const { id } = server.model.note();
  const client = open();
  await isOpen(client);
  const told: number[] = [];
  client.on("notification", (note) => told.push(note.seq));
  server.model.note();
  await eventually("the second", () => told.length === 1);
  server.refuse.websocket = true;
  server.cut(4201);
  await eventually("waiting", () => state(client) !== "open");
  server.model.note();
  server.model.change({ type: "MARK_READ", id: "", notificationIds: [id] });
  server.refuse.websocket = false;
  await eventually("caught up", () => seqs(client) === "3,2,1" && client.getSnapshot().unreadCount === 2);
  assert.deepEqual(told, [2, 3]);
  assert.ok(server.urls.at(-1)!.includes("epoch=e1&lastSeq=2&lastRev=1"), server.urls.at(-1));
});

test("the token is in the first frame, never in a URL", async () => {
  const client = open({ deviceId: "d1" });
  await isOpen(client);
  assert.deepEqual(server.frames[0], { type: "AUTH", token: "t1", deviceId: "d1" });
  assert.ok(!server.urls.join().includes("t1"));
});

test("what was received is acknowledged, cumulatively", async () => {
  const client = open();
  await isOpen(client);
  for (let n = 0; n < 5; n += 1) server.model.note();
  await eventually("the ACK", () => server.frames.some((frame) => frame.type === "ACK" && frame.seq === 5));
  assert.ok(server.frames.filter((frame) => frame.type === "ACK").length < 5);
});

test("a deaf socket is abandoned and replaced", async () => {
  server.heartbeatMs = 40;
  const client = open();
  await isOpen(client);
  server.deaf = true;
  const [first] = server.sockets;
  await eventually("another socket", () => server.sockets.size > 0 && !server.sockets.has(first!));
  server.deaf = false;
  await isOpen(client);
});

test("an expired token is asked for anew, on the socket and over HTTP", async () => {
  const asked: boolean[] = [];
  const client = open({ token: (refresh) => (asked.push(refresh), server.token) });
  await isOpen(client);
  server.token = "t2";
  server.cut(4101);
  await eventually("open with the new token", () => server.frames.some((frame) => frame.type === "AUTH" && frame.token === "t2"));
  await isOpen(client);
  server.token = "t3";
  await client.request("GET", "/api/notifications/unread-count");
  assert.deepEqual(asked, [false, true, true]);
});

test("a token callback that fails is tried again, and told; null ends it", async () => {
  let answer: () => string | null = () => { throw new Error("away"); };
  const errors: string[] = [];
  const client = open({ token: async () => answer() });
  client.on("error", (error) => errors.push(error.code));
  await eventually("two failures", () => errors.length >= 2);
  assert.equal(errors[0], "token");
  answer = () => "t1";
  await isOpen(client);
  answer = () => null;
  server.cut(4101);
  await eventually("stopped", () => state(client) === "stopped");
});

test("a revoked user stops; connect() tries again", async () => {
  const client = open();
  await isOpen(client);
  server.cut(4001);
  await eventually("stopped", () => state(client) === "stopped");
  assert.equal(client.getSnapshot().connection.code, 4001);
  client.connect();
  await isOpen(client);
});

test("changes made offline wait, and survive a reload with storage, as does the position", async () => {
  const { id } = server.model.note();
  const kept = new Map<string, string>();
  const storage = { getItem: (key: string) => kept.get(key) ?? null, setItem: (key: string, value: string) => void kept.set(key, value) };
  const first = open({ storage });
  await isOpen(first);
  server.refuse.websocket = server.refuse.sse = true;
  server.cut(4201);
  await eventually("offline", () => state(first) !== "open");
  void first.archive(id);
  first.disconnect();
  server.model.note();
  server.refuse.websocket = false;
  const told: number[] = [];
  const second = new CarillonClient({ url: server.ws, http: server.http, userId: "ann", token: "t1", storage, env: ENV, timing: FAST });
  clients.push(second);
  second.on("notification", (note) => told.push(note.seq));
  second.connect();
  await eventually("the archived", () => server.model.rows[0]!.archived);
  await isOpen(second);
  await eventually("agreement", () => seqs(second) === "2");
  assert.deepEqual(told, [2]);
  const devices = server.frames.flatMap((frame) => (frame.type === "AUTH" ? [frame.deviceId] : []));
  assert.equal(new Set(devices).size, 1);
});

test("history is paged over HTTP", async () => {
  for (let n = 0; n < 7; n += 1) server.model.note();
  const client = open({ pageSize: 3 });
  await isOpen(client);
  assert.deepEqual([seqs(client), client.getSnapshot().hasMore], ["7,6,5", true]);
  server.model.note();
  await Promise.all([client.loadMore(), client.loadMore()]);
  await client.loadMore();
  await eventually("all", () => seqs(client) === "8,7,6,5,4,3,2,1");
  assert.equal(client.getSnapshot().hasMore, false);
});

test("without WebSockets it falls back to the stream, without that to polling, and back when they are there again", async () => {
  server.refuse.websocket = true;
  const client = open();
  await isOpen(client);
  assert.equal(client.getSnapshot().connection.transport, "sse");
  server.refuse.sse = true;
  server.cut(1006 as never);
  await eventually("polling", () => state(client) === "open" && client.getSnapshot().connection.transport === "poll");
  server.model.note();
  await eventually("the note", () => seqs(client) === "1");
  client.disconnect();
  server.refuse.websocket = false;
  client.connect();
  await eventually("WebSocket", () => state(client) === "open" && client.getSnapshot().connection.transport === "websocket");
});

test("the close code of a stream is obeyed as that of a WebSocket", async () => {
  const client = open({ transports: ["sse"] });
  await isOpen(client);
  server.token = "t2";
  server.cut(4101);
  await eventually("open again with the new token", () =>
    server.requests.filter((request) => request === "GET /api/stream").length > 1 && server.streams.size === 1 && state(client) === "open");
  server.cut(4001);
  await eventually("stopped", () => state(client) === "stopped");
  assert.equal(client.getSnapshot().connection.code, 4001);
});

test("a poll tells where the user looks each time", async () => {
  const client = open({ transports: ["poll"], deviceId: "d1" });
  await isOpen(client);
  client.attention("hidden");
  client.viewing("order:1");
  server.model.note();
  await eventually("told", () => server.queries.some((query) => query.includes("deviceId=d1&state=hidden&viewing=order%3A1")));
});

test("the stream tells attention and acknowledgements by request", async () => {
  const client = open({ transports: ["sse"], deviceId: "d1" });
  await isOpen(client);
  client.attention("focused");
  client.viewing("order:1");
  server.model.note();
  await eventually("both", () => server.bodies.some(([path, body]) => path === "/api/ack" && body.seq === 1)
    && server.bodies.some(([path, body]) => path === "/api/visibility" && body.viewing === "order:1" && body.state === "focused" && body.deviceId === "d1"));
});

test("a snapshot is the same object until something changes, and unchanged items stay the same objects", async () => {
  const { id } = server.model.note();
  server.model.note();
  const client = open();
  await isOpen(client);
  const before = client.getSnapshot();
  assert.equal(client.getSnapshot(), before);
  let calls = 0;
  const stop = client.subscribe(() => { calls += 1; });
  const done = client.read(id);
  const after = client.getSnapshot();
  assert.notEqual(after, before);
  assert.equal(before.items[1]!.read, false, "what was handed out never changes");
  assert.equal(after.items[0], before.items[0]);
  assert.equal(client.getSnapshot().items[1], after.items[1]);
  await done;
  await eventually("told", () => calls > 0);
  stop();
});

test("a handler that throws does not stop the stream", async () => {
  const uncaught: unknown[] = [];
  const before = process.listeners("uncaughtException");
  process.removeAllListeners("uncaughtException");
  process.on("uncaughtException", (error) => uncaught.push(error));
  try {
    const client = open();
    await isOpen(client);
    client.on("notification", () => { throw new Error("mine"); });
    server.model.note();
    server.model.note();
    await eventually("both", () => seqs(client) === "2,1" && uncaught.length === 2);
  } finally {
    process.removeAllListeners("uncaughtException");
    for (const listener of before) process.on("uncaughtException", listener);
  }
});

test("presence of others is in the snapshot", async () => {
  const client = open();
  client.watchPresence(["bob"]);
  await eventually("bob", () => client.getSnapshot().presence.bob === "active");
});

// ---------------------------------------------------------------- tabs

class TabChannel extends BroadcastChannel {
  constructor(name: string) {
    super(name);
    this.unref();
  }
}

/** Web Locks as a browser has them, for the tabs of one process and one lock. */
function fakeLocks(): LockManager {
  interface Waiting {
    run(): Promise<void>;
    resolve(): void;
    reject(error: DOMException): void;
  }
  const queue: Waiting[] = [];
  let held: Waiting | undefined;
  const next = () => {
    if (held) return;
    const mine = (held = queue.shift());
    mine?.run().then(() => {
      if (held !== mine) return; // stolen
      held = undefined;
      mine.resolve();
      next();
    });
  };
  const aborted = () => new DOMException("", "AbortError");
  return {
    request: (_name: string, { signal, steal }: { signal?: AbortSignal; steal?: boolean }, run: () => Promise<void>) =>
      new Promise<void>((resolve, reject) => {
        const mine = { run, resolve, reject };
        signal?.addEventListener("abort", () => {
          const at = queue.indexOf(mine);
          if (at >= 0) reject(queue.splice(at, 1)[0] && aborted());
        });
        if (steal) {
          held?.reject(aborted());
          held = undefined;
          queue.unshift(mine);
        } else queue.push(mine);
        queueMicrotask(next);
      }),
  } as unknown as LockManager;
}

test("a leader that sleeps loses its lock to the tab that gets no answer, and follows when it wakes", async () => {
  const asleep = new Set<string>();
  const missed: (() => void)[] = [];
  const tab = (name: string, shared: LockManager) => {
    /** Says and hears nothing while its tab sleeps, and hears everything when it wakes. */
    class Sleepy {
      #channel: TabChannel;
      onmessage = (_event: unknown) => {};

      constructor(channel: string) {
        this.#channel = new TabChannel(channel);
        this.#channel.onmessage = (event: unknown) => {
          const take = () => this.onmessage(event);
          if (asleep.has(name)) missed.push(take);
          else take();
        };
      }

      postMessage = (message: unknown) => {
        if (!asleep.has(name)) this.#channel.postMessage(message);
      };

      close = () => this.#channel.close();
    }
    return open({ shareTabs: true, name: `sleep-${server.http}`, timing: { look: 100 }, env: { BroadcastChannel: Sleepy as never, locks: shared } });
  };
  const shared = fakeLocks();
  const first = tab("first", shared);
  await isOpen(first);
  const second = tab("second", shared);
  await isOpen(second);
  assert.equal(server.sockets.size, 1);
  asleep.add("first");
  await eventually("the second leads", () => second.getSnapshot().leader && state(second) === "open");
  asleep.clear();
  for (const take of missed.splice(0)) take();
  await eventually("the first follows", () => !first.getSnapshot().leader && state(first) === "open");
  assert.equal(server.sockets.size, 1);
  server.model.note();
  await eventually("both have it", () => [first, second].every((client) => seqs(client) === "1"));
  await first.read(server.model.rows[0]!.id);
  second.close();
  await eventually("the first leads again", () => first.getSnapshot().leader && state(first) === "open");
});

for (const [how, locks] of [["Web Locks", fakeLocks], ["an election", () => undefined]] as const) {
  const tab = (shared: LockManager | undefined, options: Partial<Options> = {}) =>
    open({ shareTabs: true, name: `tabs-${how}-${server.http}`, ...options, env: { BroadcastChannel: TabChannel as never, locks: shared } });

  test(`tabs by ${how}: what is new is shown in all of them as its user wants, and heard in the one that is looked at`, async () => {
    server.presentation = { sound: "bell", vibration: true, durationMs: 500, autoDismiss: false };
    const shared = locks();
    const tabs = [tab(shared), tab(shared), tab(shared)];
    await Promise.all(tabs.map(isOpen));
    await eventually("told to all", () => tabs.every((client) => client.getSnapshot().presentation.durationMs === 500));
    const told: [number, Presented][] = [];
    tabs.forEach((client, n) => client.on("present", (toast) => told.push([n, toast])));
    const follower = tabs.findIndex((client) => !client.getSnapshot().leader);
    tabs[follower]!.attention("focused");
    await eventually("heard of", () => server.frames.some((frame) => frame.type === "VISIBILITY" && frame.state === "focused"));
    server.model.note();
    await eventually("in all", () => told.length === 3);
    assert.deepEqual(told.filter(([, toast]) => toast.durationMs !== 500 || toast.autoDismiss !== false), []);
    assert.deepEqual(told.filter(([, toast]) => toast.sound === "bell" && toast.vibration).map(([n]) => n), [follower]);
    assert.equal(told.filter(([, toast]) => toast.sound || toast.vibration).length, 1);
  });

  test(`tabs by ${how}: one socket, the same feed, changes from any of them`, async () => {
    server.model.note();
    const shared = locks();
    const tabs = [tab(shared), tab(shared), tab(shared)];
    await Promise.all(tabs.map(isOpen));
    assert.equal(server.sockets.size, 1);
    assert.equal(tabs.filter((client) => client.getSnapshot().leader).length, 1);
    const told = tabs.map(() => 0);
    tabs.forEach((client, n) => client.on("notification", () => { told[n]! += 1; }));
    server.model.note();
    await eventually("all have it", () => tabs.every((client) => seqs(client) === "2,1" && client.getSnapshot().unreadCount === 2));
    assert.deepEqual(told, [1, 1, 1]);
    const follower = tabs.find((client) => !client.getSnapshot().leader)!;
    await follower.read(follower.getSnapshot().items[0]!.id);
    assert.equal(server.model.rows[1]!.read, true);
    await eventually("read in all", () => tabs.every((client) => client.getSnapshot().unreadCount === 1 && client.getSnapshot().pending === 0));
    server.refusal = { code: "invalid", temporary: false, status: 422 };
    await assert.rejects(follower.archive(server.model.rows[0]!.id), { code: "invalid" });
    await eventually("undone in all", () => tabs.every((client) => seqs(client) === "2,1"));
  });

  test(`tabs by ${how}: when the leader goes another takes over from its position`, async () => {
    server.model.note();
    const shared = locks();
    const tabs = [tab(shared), tab(shared)];
    await Promise.all(tabs.map(isOpen));
    const leader = tabs.find((client) => client.getSnapshot().leader)!;
    const other = tabs.find((client) => client !== leader)!;
    server.refuse.websocket = server.refuse.sse = true;
    const pending = other.read(server.model.rows[0]!.id);
    leader.close();
    await eventually("the other leads", () => other.getSnapshot().leader);
    server.model.note();
    server.refuse.websocket = false;
    await isOpen(other);
    await pending;
    await eventually("caught up", () => seqs(other) === "2,1" && other.getSnapshot().unreadCount === 1);
    assert.ok(server.urls.at(-1)!.includes("epoch=e1&lastSeq=1"), server.urls.at(-1));
  });

  test(`tabs by ${how}: the server hears of the most attentive one`, async () => {
    const shared = locks();
    const tabs = [tab(shared), tab(shared)];
    await Promise.all(tabs.map(isOpen));
    const last = () => server.frames.filter((frame) => frame.type === "VISIBILITY").at(-1);
    tabs[0]!.attention("hidden");
    tabs[1]!.attention("focused");
    tabs[1]!.viewing("order:7");
    await eventually("focused", () => JSON.stringify(last()) === '{"type":"VISIBILITY","state":"focused","viewing":"order:7"}');
    tabs[1]!.disconnect();
    if (tabs[0]!.getSnapshot().leader) await eventually("hidden", () => last()!.state === "hidden");
  });

  test(`tabs by ${how}: any of them pages`, async () => {
    for (let n = 0; n < 5; n += 1) server.model.note();
    const shared = locks();
    const tabs = [tab(shared, { pageSize: 2 }), tab(shared, { pageSize: 2 })];
    await Promise.all(tabs.map(isOpen));
    await tabs.find((client) => !client.getSnapshot().leader)!.loadMore();
    await eventually("both have it", () => tabs.every((client) => seqs(client) === "5,4,3,2"));
  });
}
