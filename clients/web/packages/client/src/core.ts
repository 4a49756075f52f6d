/**
 * The connection's state machine: no socket, and neither clock nor randomness of its own.
 *
 * Everything that happens is a method (`start`, `frame`, `closed`, `tick`, ...) that leaves effects in `effects` for
 * the shell to carry out in order. `due` is when it wants its next `tick`.
 */

import type { Feed, Page } from "./feed.ts";
import { AS_THE_APP, CarillonError, dutyOf } from "./protocol.ts";
import type { Attention, ClientFrame, Notification, Op, Position, Presentation, ServerFrame } from "./protocol.ts";

export type TransportName = "websocket" | "sse" | "poll";

/** Durations in milliseconds. */
export interface Timing {
  /** Pause before the next connection: doubles from the first to the second, of each half to all at random. */
  backoff: [number, number];
  /** Acknowledgements of so long share one frame. */
  ack: number;
  /** A PING unanswered for so long: the socket is dead, whatever the browser thinks. */
  pong: number;
  /** Longest wait for WELCOME. */
  connect: number;
  /** A connection that lived so long starts the pauses anew. */
  stable: number;
  /** Changes whose effect on the count is not known are gathered for so long before the count is asked for. */
  recount: number;
  /** On a fallback, after so long, WebSocket is tried again. */
  upgrade: number;
  /** Long polling: how long the server may hold a request, and the pause where it cannot. */
  wait: number;
  poll: number;
  /** Longest time that a confirmed change stays laid over the feed while its frame has not come. */
  settle: number;
  /** Without input for so long, a visible page is idle. */
  idle: number;
  /** Tabs tell each other this often what they look at, and are forgotten after twice that and a half. */
  look: number;
}

export const TIMING: Timing = {
  backoff: [1_000, 30_000],
  ack: 250,
  pong: 8_000,
  connect: 10_000,
  stable: 10_000,
  recount: 200,
  upgrade: 300_000,
  wait: 25_000,
  poll: 5_000,
  settle: 5_000,
  idle: 60_000,
  look: 15_000,
};

/** Connections in vain on one transport before the next one is tried; of one that worked before, more: the server may be down. */
const TRANSPORT_TRIES = 2;
const PROVEN_TRIES = 6;
/** How often a change is sent that the server refuses for the moment. */
const OP_TRIES = 4;

/**
 * - idle: `connect()` was not called, or `disconnect()` was.
 * - connecting: until WELCOME.
 * - open: live.
 * - waiting: the connection is lost; the next try is at `retryAt`.
 * - stopped: ended for good, see `code` and `reason`: not authenticated, revoked, not permitted.
 */
export interface Connection {
  readonly state: "idle" | "connecting" | "open" | "waiting" | "stopped";
  readonly transport?: TransportName;
  /** `Date.now()` of the next try. */
  readonly retryAt?: number;
  readonly code?: number;
  readonly reason?: string;
}

export type Effect =
  | { do: "connect"; transport: TransportName; position: Position | null; refresh: boolean }
  | { do: "drop" }
  | { do: "send"; frame: ClientFrame }
  | { do: "applied"; frame: ServerFrame; fresh: Notification | undefined; replay: number | undefined }
  | { do: "load"; generation: number }
  | { do: "recount"; generation: number }
  | { do: "finished"; id: string; error: CarillonError | null }
  | { do: "error"; error: CarillonError }
  | { do: "connection" };

/** When to do what; absent: not at all. */
type Due = Partial<Record<"connect" | "retry" | "ack" | "ping" | "pong" | "load" | "recount" | "upgrade", number>>;

interface Queued {
  op: Op;
  tries: number;
  /** When to send it; Infinity: it is under way. */
  at: number;
}

export class Core {
  effects: Effect[] = [];
  connection: Connection = { state: "idle" };
  presentation: Presentation = AS_THE_APP;

  #welcomed = false; // by the present connection
  #head = 0; // of the last WELCOME: what it has not told and is not newer is replayed
  #level = 0; // index of the transport in use
  #fails = 0; // connections in vain on it
  #tries = 0; // pauses since the last stable connection
  #refresh = false; // the next connection needs a new token
  #renewed = false; // and so did the last one
  #openedAt = 0;
  #proven = false; // a WebSocket got through before
  #beat = 0;
  #queue = new Map<string, Queued>();
  #attention: [Attention, string | undefined] | null = null;
  #watched: string[] = [];
  #ack!: { type: "ACK"; seq: number; rev: number };
  #due: Due = {};

  #feed: Feed;
  #timing: Timing;
  #now: () => number;
  #random: () => number;
  #transports: readonly TransportName[];

  constructor(feed: Feed, timing: Timing, now: () => number, random: () => number, transports: readonly TransportName[]) {
    this.#feed = feed;
    this.#timing = timing;
    this.#now = now;
    this.#random = random;
    this.#transports = transports;
  }

  /** When `tick` has something to do; Infinity: not before something happens. */
  get due(): number {
    return Math.min(...Object.values(this.#due), ...(this.#open ? [...this.#queue.values()].map((queued) => queued.at) : []));
  }

  /** Ops that are not confirmed yet, to be kept over a reload. */
  get queued(): Op[] {
    return [...this.#queue.values()].map((queued) => queued.op);
  }

  get #open(): boolean {
    return this.connection.state === "open";
  }

  // ---------------------------------------------------------------- the connection

  /** Connect now; also out of a pause, and after `stopped`. */
  start(): void {
    if (this.connection.state === "connecting" || this.#open) return;
    if (this.connection.state !== "waiting") this.#tries = 0;
    this.#connect();
  }

  /** End the connection and stay away. */
  stop(code?: number, reason?: string): void {
    this.#due = {};
    this.effects.push({ do: "drop" });
    this.#become({ state: code === undefined ? "idle" : "stopped", code, reason });
    if (code === undefined) return;
    for (const { op } of [...this.#queue.values()]) {
      this.#finish(op.id, new CarillonError("stopped", reason || `closed with ${code}`));
    }
  }

  /** The network may be back, or the machine awake: do not wait any longer, do not trust the old socket. */
  wake(): void {
    if (this.connection.state === "waiting") this.#connect();
    else if (this.#open && this.#due.ping !== undefined) this.#ping();
  }

  /** The connection ended; 1006 if nothing was said. */
  closed(code: number, reason: string): void {
    const { state } = this.connection;
    if (state !== "connecting" && state !== "open") return;
    const duty = dutyOf(code);
    if (duty === "stop") {
      this.stop(code, reason);
      return;
    }
    if (state === "open") {
      this.#fails = 0;
      this.#level = 0;
      if (this.#now() - this.#openedAt >= this.#timing.stable) this.#tries = 0;
    } else if (code < 4000) {
      // It did not get as far as Carillon: something between may not let this transport through.
      this.#fails += 1;
      if (this.#fails >= (this.#proven ? PROVEN_TRIES : TRANSPORT_TRIES) || this.#level) {
        this.#fails = 0;
        this.#level = (this.#level + 1) % this.#transports.length;
      }
    }
    for (const queued of this.#queue.values()) queued.at = 0;
    this.#due = {};
    this.effects.push({ do: "drop" });
    this.#refresh = duty === "renew";
    if (this.#refresh && !this.#renewed) {
      this.#renewed = true;
      this.#connect();
      return;
    }
    const retryAt = this.#at("retry", this.#pause(this.#tries++));
    this.#become({ state: "waiting", retryAt, code, reason });
  }

  /** A frame came. */
  frame(frame: ServerFrame): void {
    const { state, transport } = this.connection;
    if (state !== "open" && (state !== "connecting" || !/^(WELCOME|PRESENTATION)$/.test(frame.type))) return;
    delete this.#due.pong;
    if (transport !== "poll") this.#at("ping", this.#beat);
    if (frame.type === "PONG") return;
    if (frame.type === "OK") {
      this.#finish(frame.id, null);
      return;
    }
    if (frame.type === "ERROR") {
      this.#refused(frame);
      return;
    }
    if (frame.type === "WELCOME") {
      this.#head = frame.lastSeq;
      // What is as ever is not told: a connection begins with that. Later in it every change is, and that it is as ever again.
      if (!this.#welcomed) this.presentation = AS_THE_APP;
      this.#welcomed = true;
    }
    if (frame.type === "PRESENTATION") {
      const { sound, vibration, durationMs, autoDismiss } = frame;
      this.presentation = { sound, vibration, durationMs, autoDismiss };
      return;
    }
    const feed = this.#feed;
    const asked = !!feed.position;
    const fresh = feed.apply(frame);
    const replay = "replay" in frame ? frame.replay : fresh && fresh.seq <= this.#head ? this.#head : undefined;
    this.effects.push({ do: "applied", frame, fresh, replay });
    if (frame.type === "WELCOME") this.#welcome(asked && frame.recovered === null, frame.heartbeatMs);
    if ("notification" in frame) {
      // `rev` says which updates are covered: of later ones the push is still wanted.
      const { seq, rev } = frame.notification;
      this.#ack.seq = Math.max(this.#ack.seq, seq);
      this.#ack.rev = Math.max(this.#ack.rev, rev);
      this.#at("ack", this.#timing.ack, true);
    }
    this.#count();
  }

  /** Let time pass. */
  tick(): void {
    const is = (name: keyof Due): boolean => {
      if (!(this.#due[name]! <= this.#now())) return false;
      delete this.#due[name];
      return true;
    };
    if (is("retry")) this.#connect();
    if (is("connect") || is("pong")) this.closed(1006, "no answer");
    if (is("upgrade")) this.closed(1006, "upgrade");
    if (is("ping")) this.#ping();
    if (is("ack")) this.#send({ ...this.#ack });
    if (is("load")) this.effects.push({ do: "load", generation: this.#feed.generation });
    if (is("recount")) this.effects.push({ do: "recount", generation: this.#feed.generation });
    if (this.#open) this.#sendOps();
  }

  // ---------------------------------------------------------------- what the user does

  /** Send a change, now or when the connection is back. Idempotent by `id`. */
  add(op: Op): void {
    if (this.connection.state === "stopped") {
      this.#finish(op.id, new CarillonError("stopped", this.connection.reason!));
      return;
    }
    if (!this.#queue.has(op.id)) this.#queue.set(op.id, { op, tries: 0, at: 0 });
    if (this.#open) this.#sendOps();
  }

  /** What the user looks at. Sent when it changes and after each connect. */
  attend(state: Attention, viewing: string | undefined): void {
    const [was, at] = this.#attention ?? [];
    if (was === state && at === viewing) return;
    this.#attention = [state, viewing];
    if (this.#open) this.#send({ type: "VISIBILITY", state, viewing });
  }

  /** Whose presence to tell. */
  watch(userIds: string[]): void {
    if (userIds.join("\n") === this.#watched.join("\n")) return;
    this.#watched = userIds;
    if (this.#open) this.#send({ type: "WATCH_PRESENCE", userIds, id: "watch" });
  }

  // ---------------------------------------------------------------- answers over HTTP

  /** The first page, or the count; null: it could not be had. */
  loaded(generation: number, page: Page | null): void {
    if (generation !== this.#feed.generation) return;
    if (page) {
      this.#feed.page(page, true);
      this.#count();
    } else if (this.#open) this.#at("load", this.#pause(2));
  }

  counted(generation: number, answer: { count: number; rev: number } | null): void {
    if (generation !== this.#feed.generation) return;
    if (!answer && this.#open) this.#at("recount", this.#pause(2));
    else if (answer && !this.#feed.counted(answer.count, answer.rev)) this.#at("recount", this.#timing.recount);
  }

  // ---------------------------------------------------------------- inside

  /** @param keep an earlier time that is set already stays. */
  #at(name: keyof Due, ms: number, keep = false): number {
    return (this.#due[name] = (keep && this.#due[name]) || this.#now() + ms);
  }

  #become(connection: Connection): void {
    this.connection = connection;
    this.effects.push({ do: "connection" });
  }

  #connect(): void {
    const transport = this.#transports[this.#level]!;
    this.#welcomed = false;
    this.#due = {};
    this.#at("connect", this.#timing.connect);
    this.effects.push({ do: "connect", transport, position: this.#feed.position, refresh: this.#refresh });
    this.#become({ state: "connecting", transport });
  }

  #pause(tries: number): number {
    const [first, most] = this.#timing.backoff;
    const longest = Math.min(most, first * 2 ** Math.min(tries, 20));
    return longest / 2 + (this.#random() * longest) / 2;
  }

  #send(frame: ClientFrame): void {
    this.effects.push({ do: "send", frame });
  }

  #ping(): void {
    if (this.connection.transport === "websocket") {
      this.#send({ type: "PING" });
      this.#at("pong", this.#timing.pong, true);
    } else this.#at("pong", this.#beat, true); // a stream cannot ask: the server's next sign of life is due
  }

  #welcome(resume: boolean, heartbeat: number | undefined): void {
    const { transport } = this.connection;
    if (resume) {
      this.#send({ type: "RESUME", ...this.#feed.position! }); // answered by another WELCOME
      return;
    }
    this.#beat = heartbeat || 25_000;
    if (transport !== "poll") this.#at("ping", this.#beat);
    if (this.#feed.cursor === undefined) this.effects.push({ do: "load", generation: this.#feed.generation });
    if (this.#open) return;
    this.#openedAt = this.#now();
    this.#proven ||= transport === "websocket";
    this.#renewed = this.#refresh = false;
    this.#ack = { type: "ACK", seq: 0, rev: 0 };
    delete this.#due.connect;
    if (this.#level) this.#at("upgrade", this.#timing.upgrade);
    this.#become({ state: "open", transport });
    // The first frame of a connection opens the flow of notifications: so there always is one.
    if (this.#attention) this.#send({ type: "VISIBILITY", state: this.#attention[0], viewing: this.#attention[1] });
    else this.#ping();
    if (this.#watched.length) this.#send({ type: "WATCH_PRESENCE", userIds: this.#watched, id: "watch" });
    this.#sendOps();
  }

  #count(): void {
    if (this.#feed.uncertain) this.#at("recount", this.#timing.recount, true);
    else delete this.#due.recount;
  }

  #sendOps(): void {
    for (const queued of this.#queue.values()) {
      if (queued.at > this.#now()) continue;
      queued.at = Infinity;
      queued.tries += 1;
      this.#send(queued.op);
    }
  }

  #refused(frame: { code: string; message: string; temporary: boolean; id?: string }): void {
    const error = new CarillonError(frame.code, frame.message, frame.temporary);
    const queued = frame.id === undefined ? undefined : this.#queue.get(frame.id);
    if (queued && frame.temporary && queued.tries < OP_TRIES) queued.at = this.#now() + this.#pause(queued.tries - 1);
    else if (queued) this.#finish(queued.op.id, error);
    else if (frame.id !== "watch") this.effects.push({ do: "error", error });
  }

  #finish(id: string, error: CarillonError | null): void {
    this.#queue.delete(id);
    this.effects.push({ do: "finished", id, error });
  }
}
