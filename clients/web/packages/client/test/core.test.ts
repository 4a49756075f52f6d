import assert from "node:assert/strict";
import { test } from "node:test";
import { Core, TIMING } from "../src/core.ts";
import type { Effect } from "../src/core.ts";
import { Feed } from "../src/feed.ts";
import type { ClientFrame, Op, ServerFrame } from "../src/protocol.ts";
import { Model, seeded } from "./model.ts";

const PAGE = 5;

/** A core, the model's server and a wire between them on which everything may be late or lost. Time is a number. */
class World {
  now = 1_000;
  model = new Model();
  feed = new Feed();
  core: Core;
  down: ServerFrame[] = []; // on their way to the client
  up: ClientFrame[] = [];
  questions: (() => void)[] = []; // HTTP, asked and not answered
  connected = false;
  live = false;
  waiting: ServerFrame[] = [];
  effects: Effect[] = [];
  sent: ClientFrame[] = [];
  finished = new Map<string, string | null>();
  refuse: { code: string; temporary: boolean } | null = null;
  ops = 0;
  maxSeen = -1;

  constructor(readonly random: () => number = () => 0.5) {
    this.core = new Core(this.feed, TIMING, () => this.now, random, ["websocket", "sse", "poll"]);
    this.model.told = (frame) => {
      if (this.connected) (this.live ? this.down : this.waiting).push(frame);
    };
  }

  do(happens: (core: Core) => void): void {
    happens(this.core);
    for (let effect; (effect = this.core.effects.shift()); ) {
      this.effects.push(effect);
      if (effect.do === "drop") this.lose();
      else if (effect.do === "connect") this.dial(effect.position);
      else if (effect.do === "send") {
        this.sent.push(effect.frame);
        if (this.connected) this.up.push(effect.frame);
      } else if (effect.do === "finished") {
        this.finished.set(effect.id, effect.error?.code ?? null);
        this.feed.finish(effect.id, effect.error !== null);
      }
      else if (effect.do === "load") {
        const { generation } = effect;
        this.ask(() => this.model.page(PAGE), (page) => this.core.loaded(generation, page));
      } else if (effect.do === "recount") {
        const { generation } = effect;
        this.ask(() => ({ count: this.model.unread, rev: this.model.rev }), (answer) => this.core.counted(generation, answer));
      }
    }
    // Badge and revision go together, and the revision never goes back while history is the same.
    const { unreadRev } = this.feed.view();
    assert.ok(unreadRev >= this.maxSeen || unreadRev === -1 || this.feed.generation > 0, "the badge went back");
    this.maxSeen = Math.max(this.maxSeen, unreadRev);
  }

  dial(position: { epoch: string; lastSeq: number; lastRev: number } | null): void {
    this.lose();
    this.connected = true;
    this.live = false;
    this.waiting = [];
    if (!position) this.down.push(this.model.welcome(null));
    else {
      const known = this.model.knows(position);
      this.down.push(this.model.welcome(known), ...(known ? this.model.replay(position) : []));
      this.live = true;
    }
  }

  lose(): void {
    this.connected = false;
    this.down = [];
    this.up = [];
  }

  /** Read now, told later. */
  ask<T>(read: () => T, tell: (answer: T) => void): void {
    const answer = read();
    this.questions.push(() => this.do(() => tell(answer)));
  }

  /** The server takes a frame of the client. */
  serve(): void {
    const frame = this.up.shift();
    if (!frame) return;
    // The first frame opens the flow: with it comes what happened since the WELCOME (the server's recent window).
    this.down.push(...this.waiting.splice(0));
    this.live = true;
    if (frame.type === "PING") this.down.push({ type: "PONG" });
    if (!("id" in frame) || frame.type === "WATCH_PRESENCE") return;
    if (this.refuse) {
      this.down.push({ type: "ERROR", id: frame.id, message: "no", ...this.refuse });
      return;
    }
    try {
      this.model.change(frame);
      this.down.push({ type: "OK", id: frame.id });
    } catch {
      this.down.push({ type: "ERROR", id: frame.id, code: "not_found", message: "no", temporary: false });
    }
  }

  /** The client takes a frame of the server. */
  take(): void {
    const frame = this.down.shift();
    if (frame) this.do((core) => core.frame(frame));
  }

  pass(ms: number): void {
    this.now += ms;
    if (this.core.due <= this.now) this.do((core) => core.tick());
  }

  op(op: Op): void {
    this.feed.pending.set(op.id, op);
    this.do((core) => core.add(op));
  }

  /** Let everything arrive. */
  quiet(): void {
    if (this.core.connection.state === "idle") this.do((core) => core.start());
    for (let step = 0; step < 2_000; step += 1) {
      this.serve();
      this.take();
      this.questions.shift()?.();
      const busy = this.down.length || this.up.length || this.questions.length || this.core.connection.state !== "open" || this.feed.uncertain || this.feed.cursor === undefined || this.core.queued.length;
      if (!busy) return;
      this.pass(this.down.length || this.up.length || this.questions.length ? 1 : 500);
    }
    assert.fail(`never quiet: ${JSON.stringify(this.core.connection)} uncertain ${this.feed.uncertain}`);
  }

  check(): void {
    const wanted = this.model.feed;
    const { items, unreadCount } = this.feed.view();
    const look = (n: { seq: number; read: boolean; seen: boolean; clicked?: boolean; title: string | null }) =>
      `${n.seq}${n.read ? "r" : ""}${n.seen ? "s" : ""}${n.clicked ? "c" : ""} ${n.title}`;
    assert.deepEqual(items.map(look), wanted.slice(0, items.length).map(look));
    assert.ok(items.length >= Math.min(PAGE, wanted.length) || this.feed.cursor, "the newest are there");
    assert.equal(unreadCount, this.model.unread);
    // Of one that was withdrawn meanwhile only that is told.
    const last = Math.max(0, ...this.model.rows.filter((row) => !row.retracted).map((row) => row.seq));
    assert.ok(this.feed.position!.lastSeq >= last && this.feed.position!.lastSeq <= this.model.seq);
  }
}

const KINDS = ["MARK_READ", "MARK_SEEN", "MARK_ALL_READ", "ARCHIVE", "DISMISS", "CLICK"] as const;

function anyOp(world: World, random: () => number, id: string): Op {
  const type = KINDS[Math.floor(random() * KINDS.length)]!;
  const any = () => world.model.rows[Math.floor(random() * world.model.rows.length)]?.id ?? "00000000-0000-7000-8000-ffffffffffff";
  if (type === "MARK_ALL_READ") return { type, id, upToSeq: random() < 0.3 ? undefined : Math.floor(random() * (world.model.seq + 1)) };
  if (type === "MARK_READ" || type === "MARK_SEEN") return { type, id, notificationIds: [any(), any()] };
  return { type, id, notificationId: any() };
}

/** One random story: frames, losses, resumes, own changes and those of other devices in any order. */
function story(seed: number, steps: number): void {
  const random = seeded(seed);
  const world = new World(random);
  for (let n = Math.floor(random() * 12); n > 0; n -= 1) world.model.note();
  world.do((core) => core.start());
  for (let step = 0; step < steps; step += 1) {
    const dice = random();
    if (dice < 0.15) world.model.note();
    else if (dice < 0.25) {
      try { world.model.change(anyOp(world, random, "other")); } catch { /* no such notification */ }
    } else if (dice < 0.3 && world.model.rows.length) {
      const row = world.model.rows[Math.floor(random() * world.model.rows.length)]!;
      world.model.change({ type: random() < 0.3 ? "RETRACT" : random() < 0.5 ? "MERGE" : "EDIT", notificationId: row.id });
    } else if (dice < 0.4) world.op(anyOp(world, random, `op-${(world.ops += 1)}`));
    else if (dice < 0.6) world.take();
    else if (dice < 0.75) world.serve();
    else if (dice < 0.82) world.questions.shift()?.();
    else if (dice < 0.84) world.questions.length = 0; // answers that never come: told as failures below
    else if (dice < 0.88) world.do((core) => core.closed(random() < 0.5 ? 1006 : 4201, ""));
    else if (dice < 0.885) {
      // History is lost: another epoch, other notifications.
      const fresh = new Model();
      fresh.epoch = `e${step}`;
      fresh.told = world.model.told;
      world.model = fresh;
      for (let n = Math.floor(random() * 4); n > 0; n -= 1) fresh.note();
      world.maxSeen = -1;
      world.do((core) => core.closed(4202, ""));
    } else if (dice < 0.9) world.refuse = random() < 0.5 ? { code: "busy", temporary: random() < 0.7 } : null;
    else world.pass(random() * 3_000);
    if (!world.questions.length && step % 7 === 0 && world.core.connection.state === "open" && world.feed.cursor === undefined) {
      const { generation } = world.feed;
      world.do((core) => core.loaded(generation, null)); // as the shell tells a failed request
    }
  }
  world.refuse = null;
  if (world.core.connection.state === "open" && world.feed.cursor === undefined) {
    const { generation } = world.feed;
    world.do((core) => core.loaded(generation, null));
  }
  if (world.feed.uncertain) {
    const { generation } = world.feed;
    world.do((core) => core.counted(generation, null));
  }
  world.quiet();
  world.check();
}

test("any interleaving of frames, losses, resumes and changes ends in the state of the model", () => {
  for (let seed = 1; seed <= 2_000; seed += 1) {
    try {
      story(seed, 30 + (seed % 90));
    } catch (error) {
      throw new Error(`seed ${seed}: ${(error as Error).stack}`);
    }
  }
});

test("the position goes with each connection, and nothing is shown twice", () => {
  const world = new World();
  world.model.note();
  world.do((core) => core.start());
  world.quiet();
  world.model.note();
  world.take();
  assert.deepEqual(world.feed.position, { epoch: "e1", lastSeq: 2, lastRev: 1 });
  world.do((core) => core.closed(4201, "drain"));
  world.model.note();
  world.model.change({ type: "MARK_READ", id: "x", notificationIds: [world.model.rows[0]!.id] });
  world.quiet();
  const dials = world.effects.filter((effect) => effect.do === "connect");
  assert.deepEqual(dials.map((effect) => effect.position), [null, { epoch: "e1", lastSeq: 2, lastRev: 1 }]);
  const fresh = world.effects.flatMap((effect) => (effect.do === "applied" && effect.fresh ? [effect.fresh.seq] : []));
  assert.deepEqual(fresh, [2, 3]);
  world.check();
});

test("pauses double from one second to thirty, half of each at random, and start anew after a stable connection", () => {
  const random = seeded(3);
  const world = new World(random);
  world.do((core) => core.start());
  const pauses: number[] = [];
  for (let n = 0; n < 8; n += 1) {
    world.do((core) => core.closed(4213, ""));
    pauses.push(world.core.connection.retryAt! - world.now);
    world.now = world.core.connection.retryAt!;
    world.pass(0);
  }
  pauses.forEach((pause, n) => {
    const most = Math.min(30_000, 1_000 * 2 ** n);
    assert.ok(pause >= most / 2 && pause <= most, `pause ${n}: ${pause}`);
  });
  assert.equal(new Set(pauses.map((pause, n) => pause / 2 ** n)).size, pauses.length, "jittered");
  world.quiet();
  world.now += TIMING.stable;
  world.do((core) => core.closed(4201, ""));
  assert.ok(world.core.connection.retryAt! - world.now <= 1_000);
});

test("a socket that does not answer PING is abandoned and another one opened", () => {
  const world = new World();
  world.do((core) => core.start());
  world.quiet();
  world.pass(25_000);
  assert.equal(world.sent.at(-1)!.type, "PING");
  world.pass(TIMING.pong - 1);
  assert.equal(world.core.connection.state, "open");
  world.pass(1);
  assert.deepEqual([world.core.connection.state, world.core.connection.code], ["waiting", 1006]);
  world.quiet();
  assert.equal(world.core.connection.state, "open");
});

test("any frame is a sign of life", () => {
  const world = new World();
  world.do((core) => core.start());
  world.quiet();
  for (let n = 0; n < 10; n += 1) {
    world.pass(20_000);
    world.model.note();
    world.quiet();
  }
  // One PING opened the flow of notifications; no other was needed.
  assert.equal(world.sent.filter((frame) => frame.type === "PING").length, 1);
});

test("acknowledgements are cumulative and share a frame", () => {
  const world = new World();
  world.do((core) => core.start());
  world.quiet();
  for (let n = 0; n < 7; n += 1) world.model.note();
  for (let n = 0; n < 7; n += 1) world.take();
  assert.deepEqual(world.sent.filter((frame) => frame.type === "ACK"), []);
  world.pass(TIMING.ack);
  assert.deepEqual(world.sent.filter((frame) => frame.type === "ACK"), [{ type: "ACK", seq: 7, rev: 7 }]);
});

test("an update is acknowledged by the revision that is shown", () => {
  const world = new World();
  world.do((core) => core.start());
  world.quiet();
  const { id, rev } = world.model.note();
  world.quiet();
  const sent = () => {
    world.pass(TIMING.ack);
    return world.sent.filter((frame) => frame.type === "ACK").at(-1);
  };
  assert.deepEqual(sent(), { type: "ACK", seq: 1, rev });
  world.model.change({ type: "MERGE", notificationId: id });
  world.quiet();
  assert.deepEqual(sent(), { type: "ACK", seq: 1, rev: rev + 1 });
});

test("a change shows at once, stays through confirmation, and is undone by a refusal", () => {
  const world = new World();
  const [one, two] = [world.model.note(), world.model.note()];
  world.do((core) => core.start());
  world.quiet();
  world.op({ type: "MARK_READ", id: "a", notificationIds: [one.id] });
  assert.deepEqual([world.feed.view().unreadCount, world.feed.view().items[1]!.read], [1, true]);
  world.quiet();
  world.check();
  world.refuse = { code: "invalid", temporary: false };
  world.op({ type: "ARCHIVE", id: "b", notificationId: two.id });
  assert.deepEqual([world.feed.view().unreadCount, world.feed.view().items.length], [0, 1]);
  world.serve();
  world.take();
  assert.deepEqual(world.finished.get("b"), "invalid");
  assert.deepEqual([world.feed.view().unreadCount, world.feed.view().items.length], [1, 2]);
});

test("what the server refuses for the moment is sent again, four times at most", () => {
  const world = new World();
  const { id } = world.model.note();
  world.do((core) => core.start());
  world.quiet();
  world.refuse = { code: "busy", temporary: true };
  world.op({ type: "CLICK", id: "a", notificationId: id });
  for (let n = 0; n < 40; n += 1) {
    world.serve();
    world.take();
    world.pass(1_000);
  }
  assert.equal(world.sent.filter((frame) => frame.type === "CLICK").length, 4);
  assert.equal(world.finished.get("a"), "busy");
});

test("changes made offline go out with the next connection, those under way once more", () => {
  const world = new World();
  const [one, two] = [world.model.note(), world.model.note()];
  world.do((core) => core.start());
  world.quiet();
  world.op({ type: "MARK_READ", id: "a", notificationIds: [one.id] });
  world.do((core) => core.closed(1006, "")); // lost before the server took it
  world.op({ type: "ARCHIVE", id: "b", notificationId: two.id });
  assert.deepEqual(world.feed.view().items.map((item) => item.seq), [1]);
  world.quiet();
  assert.deepEqual([one.read, two.archived], [true, true]);
  world.check();
});

test("a refused or revoked user stops, and what was pending is rejected", () => {
  const world = new World();
  world.do((core) => core.start());
  world.quiet();
  world.op({ type: "MARK_ALL_READ", id: "a" });
  world.do((core) => core.closed(4001, "revoked"));
  assert.deepEqual(world.core.connection, { state: "stopped", code: 4001, reason: "revoked" });
  assert.equal(world.finished.get("a"), "stopped");
  assert.equal(world.core.due, Infinity);
});

test("an expired token is replaced at once, and after a pause if the new one is refused, too", () => {
  const world = new World();
  world.do((core) => core.start());
  world.quiet();
  world.do((core) => core.closed(4101, ""));
  assert.equal(world.core.connection.state, "connecting");
  assert.equal(world.effects.filter((effect) => effect.do === "connect").at(-1)!.refresh, true);
  world.do((core) => core.closed(4101, ""));
  assert.equal(world.core.connection.state, "waiting");
});

test("two connections in vain try the next transport; a code of Carillon does not", () => {
  const world = new World();
  const used = () => world.core.connection.transport;
  const fail = (code: number) => {
    world.do((core) => core.closed(code, ""));
    world.now = world.core.connection.retryAt!;
    world.pass(0);
    return used();
  };
  world.do((core) => core.start());
  assert.deepEqual([used(), fail(1006), fail(4213), fail(1006), fail(1006), fail(1006)], ["websocket", "websocket", "websocket", "sse", "poll", "websocket"]);
});

test("on a fallback WebSocket is tried again after a while", () => {
  const world = new World();
  world.do((core) => core.start());
  world.do((core) => core.closed(1006, ""));
  world.pass(1_000);
  world.do((core) => core.closed(1006, ""));
  world.pass(2_000);
  world.take();
  assert.deepEqual([world.core.connection.state, world.core.connection.transport], ["open", "sse"]);
  const until = world.now + TIMING.upgrade;
  while (world.now < until) {
    world.pass(10_000);
    world.do((core) => core.frame({ type: "PONG" }));
    if (world.core.connection.transport === "websocket") return;
  }
  world.pass(2_000);
  assert.equal(world.core.connection.transport, "websocket");
});

test("a WELCOME that left the position unanswered is answered by RESUME", () => {
  const world = new World();
  world.model.note();
  world.do((core) => core.start());
  world.quiet();
  world.do((core) => core.closed(1006, ""));
  world.pass(1_000);
  world.down = [];
  world.do((core) => core.frame(world.model.welcome(null)));
  assert.deepEqual(world.sent.at(-1), { type: "RESUME", epoch: "e1", lastSeq: 1, lastRev: 1 });
  assert.equal(world.core.connection.state, "connecting");
  world.do((core) => core.frame(world.model.welcome(true)));
  assert.equal(world.core.connection.state, "open");
});

test("what a connection is told of how notifications are to be shown holds for what is replayed behind it", () => {
  const world = new World();
  const plain = { sound: true, vibration: true, durationMs: null, autoDismiss: null };
  const hear = (...frames: ServerFrame[]) => frames.forEach((frame) => world.do((core) => core.frame(frame)));
  const told = (durationMs: number): ServerFrame => ({ type: "PRESENTATION", ...plain, durationMs });
  world.do((core) => core.start());
  hear(world.model.welcome(null), told(1));
  world.do((core) => core.closed(4202, ""));
  world.now += 60_000;
  world.do((core) => core.tick());
  const missed = [world.model.note(), world.model.note()];
  const replayed = world.model.replay(world.feed.position!);
  // Behind each WELCOME, of those the one that answers RESUME is the second.
  hear(world.model.welcome(null));
  assert.deepEqual(world.core.presentation, plain);
  hear(told(2));
  assert.equal(world.core.presentation.durationMs, 2);
  hear(world.model.welcome(true));
  assert.equal(world.core.presentation.durationMs, 2);
  hear(told(3));
  world.effects = [];
  const shown: number[] = [];
  for (const frame of replayed) {
    hear(frame);
    shown.push(world.core.presentation.durationMs!);
  }
  assert.deepEqual(shown, [3, 3]);
  // On another shard without a WELCOME; what is live then is no replay.
  hear({ type: "PRESENTATION", ...plain });
  assert.deepEqual(world.core.presentation, plain);
  const { id: _, ...live } = world.model.note();
  hear({ type: "NEW_NOTIFICATION", notification: { id: "live", ...live } });
  const applied = world.effects.filter((effect) => effect.do === "applied");
  assert.deepEqual(applied.map(({ fresh, replay }) => [fresh?.seq, replay]), [[missed[0]!.seq, 2], [missed[1]!.seq, 2], [3, undefined]]);
});
