/**
 * The client: puts core, feed, transports and tabs together, and is what applications see. In every tab there is one;
 * the leader's has the connection and tells the others each frame it applies, so that all hold the same feed.
 */

import { watchAttention } from "./attention.ts";
import { Core, TIMING } from "./core.ts";
import type { Connection, Timing, TransportName } from "./core.ts";
import { Feed } from "./feed.ts";
import type { Dump, Page } from "./feed.ts";
import { httpClient } from "./http.ts";
import type { Http } from "./http.ts";
import { AS_THE_APP, CarillonError } from "./protocol.ts";
import type { Attention, ClientFrame, Notification, Op, Position, PresenceStatus, Presentation, ServerFrame } from "./protocol.ts";
import { Tabs } from "./tabs.ts";
import { websocket } from "./transports.ts";
import type { Wire } from "./transports.ts";

/** What the client needs of its surroundings; a browser's own by default. Tests put theirs here. */
export interface Env {
  now(): number;
  random(): number;
  WebSocket: typeof WebSocket | undefined;
  fetch: typeof fetch;
  BroadcastChannel: typeof BroadcastChannel | undefined;
  locks: LockManager | undefined;
  document: Document | undefined;
}

export interface Options {
  /** Of the WebSocket, e.g. `wss://notify.example.com/ws`; a function is asked before each connection. */
  url: string | (() => string | Promise<string>);
  /** Origin of the HTTP API, e.g. `https://notify.example.com`. Default: the page's own. */
  http?: string;
  /** Whose notifications: the `sub` of the tokens. Tabs of one user share a connection, those of two do not. */
  userId: string;
  /**
   * A token, or how to get one. `refresh` is true if the last one was refused or has expired. null: the user is signed
   * out, the client stops. A rejection is tried again after a pause.
   */
  token: string | ((refresh: boolean) => string | null | Promise<string | null>);
  /** The id used under /api/devices. Default: random, kept in `storage` if there is one. */
  deviceId?: string;
  /** Keeps position, unsent changes and device id over reloads, e.g. `localStorage`. Default: nothing is kept. */
  storage?: Pick<Storage, "getItem" | "setItem"> | null;
  /** Prefix of what is kept in `storage` and of the tabs' channel. Default: `carillon`. */
  name?: string;
  /** One connection for all tabs. Default: true in a document. */
  shareTabs?: boolean;
  /** Tell the server what the user looks at. Default: true in a document. */
  attention?: boolean;
  /** In the order in which they are tried. Default: all three. */
  transports?: readonly TransportName[];
  /** Notifications of a page. Default: 30. */
  pageSize?: number;
  timing?: Partial<Timing>;
  env?: Partial<Env>;
}

/** State at one moment; never changed, replaced by another one. */
export interface Snapshot {
  /** Newest first. */
  readonly items: readonly Notification[];
  readonly unreadCount: number;
  /** The revision of the user's stream that `unreadCount` is true for. */
  readonly unreadRev: number;
  readonly connection: Connection;
  /** Of those that are watched, as far as the server tells. */
  readonly presence: Readonly<Record<string, PresenceStatus>>;
  /** How the user wants notifications to be shown. */
  readonly presentation: Presentation;
  /** The first page is there. */
  readonly loaded: boolean;
  /** `loadMore` would bring older ones. */
  readonly hasMore: boolean;
  /** Changes made here that the server has not confirmed. */
  readonly pending: number;
  /** This tab holds the connection. */
  readonly leader: boolean;
}

export interface Events {
  /** A new notification, once; also those of while the client was away. In every tab. */
  notification: Notification;
  /** The same, with what its user wants: what `toasts` shows. */
  present: Presented;
  connection: Connection;
  /** What no promise tells: a token callback that failed, a frame that was refused. */
  error: CarillonError;
  /** Every frame, for debugging. "out" only in the leader. */
  frame: { direction: "in" | "out"; frame: ServerFrame | ClientFrame };
}

/** A new notification, and how it is to be shown. Sound and vibration are for one tab: in others they are false. */
export interface Presented extends Presentation {
  readonly notification: Notification;
  /** It came while the client was away: all that have the same number come at once, and one noise is enough for them. */
  readonly replay?: number;
}

/** Beside one that is new in all tabs. */
interface Arrival {
  /** The one that makes the noise: that is looked at most; "": none does. */
  tab: string;
  replay?: number;
}

export type PreferencesView = "complete" | "own";

export interface Preferences {
  readonly document: Readonly<Record<string, unknown>>;
  /** For `patch`, where no other device's change may be between. */
  readonly version: string;
}

interface Look {
  state: Attention | null;
  viewing?: string;
  watch: string[];
  /** Date.now() */
  at: number;
}

/** Tabs of several versions understand each other: members stay as they are, and newer ones may be missing. */
type Message =
  | { t: "hello" }
  | { t: "state"; leader: string; dump: Dump; connection: Connection; presence: Snapshot["presence"]; presentation?: Presentation; fresh: Notification[]; arrivals?: Arrival[] }
  | { t: "page"; page: Page; cursor: string }
  | { t: "op"; op: Op }
  | { t: "done"; id: string; error: [code: string, message: string, temporary: boolean] | null }
  | { t: "look"; tab: string; look: Look }
  | { t: "bye"; tab: string };

/** A leader that answered none of so many questions, one a second, is suspended. */
const HELLOS = 3;
/** Ids in one frame. */
const IDS_MAX = 1_000;
/** Changes that wait for a connection. */
const PENDING_MAX = 1_000;
const ATTENTION: readonly Attention[] = ["focused", "visible", "idle", "hidden"];

type DistributiveOmit<T, K extends PropertyKey> = T extends unknown ? Omit<T, K> : never;

type Handler = [name: keyof Events, handler: (value: never) => void];

interface Promised {
  resolve(): void;
  reject(error: CarillonError): void;
}

export class CarillonClient {
  /** As given, or chosen. */
  readonly deviceId: string;
  #options: Options;
  #feed = new Feed();
  #core: Core | null = null;
  #tabs: Tabs<Message>;
  #wire: Wire | null = null;
  #http: Http;
  #env: Env;
  #timing: Timing;
  #key: string;
  #token: Promise<string> | null = null;
  #promised = new Map<string, Promised>();
  #ops = 0;
  #attempt = 0; // number of the connection: what an older one still says is void
  #leader = ""; // id of the tab that leads, as far as this one knows
  #connection: Connection = { state: "idle" };
  #presence: Snapshot["presence"] = {};
  #presentation: Presentation = AS_THE_APP;
  #fresh: [Notification, Arrival][] = []; // what the other tabs are to be told of
  #loud: Arrival = { tab: "" }; // the last one that may be heard
  #others = false; // there are some, or were
  #look: Omit<Look, "at"> = { state: null, watch: [] };
  #looks = new Map<string, Look>();
  #timers: Partial<Record<"core" | "keep" | "hello" | "look", ReturnType<typeof setTimeout>>> = {};
  #watching: AbortController | undefined;
  #listeners = new Set<() => void>();
  #handlers = new Set<Handler>();
  #snapshot: Snapshot | null = null;
  #told = true;
  #joined = false;
  #more: Promise<void> | null = null;

  constructor(options: Options) {
    this.#options = options;
    const global = globalThis as Partial<typeof globalThis>;
    this.#env = {
      now: Date.now,
      random: Math.random,
      WebSocket: global.WebSocket,
      fetch: (...args) => globalThis.fetch(...args),
      BroadcastChannel: global.BroadcastChannel,
      locks: global.navigator?.locks,
      document: global.document,
      ...options.env,
    };
    this.#timing = { ...TIMING, ...options.timing };
    this.#key = `${options.name ?? "carillon"}:${options.userId}`;
    this.#http = httpClient(options.http ?? "", this.#env.fetch, (refresh) => this.#getToken(refresh));
    const share = options.shareTabs ?? this.#env.document;
    this.#tabs = new Tabs<Message>(
      this.#key,
      { ...this.#env, BroadcastChannel: share ? this.#env.BroadcastChannel : undefined },
      { changed: (leading) => (leading ? this.#lead() : this.#follow()), message: (message) => this.#heard(message, true) },
    );
    this.deviceId = options.deviceId ?? this.#keep("device") ?? `web-${this.#tabs.id}`;
    if (!options.deviceId) this.#keep("device", this.deviceId);
  }

  // ---------------------------------------------------------------- connection

  /** Connect, and stay connected. Also: try now instead of after the pause, and try again after `stopped`. */
  connect(): void {
    const { document } = this.#env;
    if (this.#joined) {
      this.#run((core) => core.start());
      return;
    }
    this.#joined = true;
    this.#setConnection({ state: "connecting" });
    const { signal } = (this.#watching = new AbortController());
    const window = document?.defaultView;
    // The leader may be a tab that is suspended now that this one is shown: ask.
    const wake = () => (this.#core ? this.#run((core) => core.wake()) : this.#hello());
    window?.addEventListener("online", wake, { signal });
    document?.addEventListener("visibilitychange", wake, { signal });
    window?.addEventListener("pagehide", () => {
      this.#keepNow();
      this.#tabs.post({ t: "bye", tab: this.#tabs.id });
    }, { signal });
    this.#tabs.join();
    if (!this.#tabs.leading) this.#follow();
    if (document && this.#options.attention !== false) {
      watchAttention(document, this.#timing.idle, this.#env.now, signal, (state) => this.#lookAt({ state }));
    }
  }

  /** Go offline here; another tab takes the connection over. What was not confirmed waits for `connect`. */
  disconnect(): void {
    if (!this.#joined) return;
    this.#joined = false;
    this.#watching?.abort();
    this.#keepNow();
    this.#run((core) => core.stop());
    this.#core = null;
    this.#attempt += 1;
    for (const timer of Object.values(this.#timers)) clearTimeout(timer);
    this.#timers = {};
    this.#looks.clear();
    this.#tabs.post({ t: "bye", tab: this.#tabs.id });
    this.#tabs.leave();
    this.#leader = "";
    this.#presence = {};
    this.#setConnection({ state: "idle" });
  }

  /** Disconnect for good: changes that were not confirmed are rejected. */
  close(): void {
    this.disconnect();
    const error = new CarillonError("closed", "closed");
    for (const id of [...this.#feed.pending.keys()]) this.#finished(id, error);
    this.#listeners.clear();
    this.#handlers.clear();
  }

  // ---------------------------------------------------------------- store

  /** Call `listener` after each change. @returns unsubscribes. Bound, as React's useSyncExternalStore wants it. */
  readonly subscribe = (listener: () => void): (() => void) => {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  };

  /** The present state: the same object until something changes. */
  readonly getSnapshot = (): Snapshot => {
    const { pending, cursor } = this.#feed;
    return (this.#snapshot ??= {
      ...this.#feed.view(),
      connection: this.#connection,
      presence: this.#presence,
      presentation: this.#presentation,
      loaded: cursor !== undefined,
      hasMore: !!cursor,
      pending: [...pending.values()].filter((op) => !op.done).length,
      leader: this.#tabs.leading,
    });
  };

  /** @returns unsubscribes. */
  on<Name extends keyof Events>(name: Name, handler: (value: Events[Name]) => void): () => void {
    const entry: Handler = [name, handler as (value: never) => void];
    this.#handlers.add(entry);
    return () => this.#handlers.delete(entry);
  }

  // ---------------------------------------------------------------- what the user does

  /** Mark as read: at once here, confirmed when the promise resolves, undone when it rejects. */
  read(ids: string | readonly string[]): Promise<void> {
    return this.#many("MARK_READ", ids);
  }

  /** Mark as seen (shown, not yet read). */
  seen(ids: string | readonly string[]): Promise<void> {
    return this.#many("MARK_SEEN", ids);
  }

  /** Mark everything as read that there is now. */
  readAll(): Promise<void> {
    return this.#do({ type: "MARK_ALL_READ", upToSeq: this.#feed.position?.lastSeq });
  }

  archive(id: string): Promise<void> {
    return this.#do({ type: "ARCHIVE", notificationId: id });
  }

  dismiss(id: string): Promise<void> {
    return this.#do({ type: "DISMISS", notificationId: id });
  }

  /** Note a click, on one of its actions or on the whole; it is read by that. */
  click(id: string, actionId?: string): Promise<void> {
    return this.#do({ type: "CLICK", notificationId: id, actionId });
  }

  /** Load the next page of older ones. Rejects with a CarillonError. */
  loadMore(): Promise<void> {
    const { cursor } = this.#feed;
    if (!cursor) return Promise.resolve();
    return (this.#more ??= this.#page(cursor)
      .then((page) => this.#say({ t: "page", page, cursor }))
      .finally(() => (this.#more = null)));
  }

  /** Tell that the user looks at this very thing, e.g. `order:4711`; undefined: no more. */
  viewing(target: string | undefined): void {
    this.#lookAt({ viewing: target });
  }

  /** Tell the server what the user looks at, where there is no document to ask. */
  attention(state: Attention): void {
    this.#lookAt({ state });
  }

  /** Whose presence to show in the snapshot. Replaces the list of before. */
  watchPresence(userIds: readonly string[]): void {
    this.#lookAt({ watch: [...userIds] });
  }

  /** What the user may choose: docs/reference/preferences.md has the document. Both reject with a CarillonError. */
  readonly preferences = {
    /** @param view own: what the user said; complete: what holds, with the tenant's defaults. */
    get: (view: PreferencesView = "complete"): Promise<Preferences> => this.#preferences("GET", view),
    /**
     * Change a part of what the user said: a JSON merge patch, null takes a member out.
     *
     * @param version only if this is the present one, else it rejects with `version_conflict`. Default: whatever is there.
     */
    patch: (patch: Record<string, unknown>, { view = "complete", version }: { view?: PreferencesView; version?: string } = {}): Promise<Preferences> =>
      this.#preferences("PATCH", view, patch, version),
  };

  async #preferences(method: string, view: PreferencesView, patch?: Record<string, unknown>, version?: string): Promise<Preferences> {
    const answer = await this.#http(method, `/api/notifications/preferences?view=${view}`, patch, version ? { headers: { "If-Match": version } } : undefined);
    return { document: (await answer.json()) as Preferences["document"], version: answer.headers.get("ETag") ?? "" };
  }

  /** Call the HTTP API as the user, e.g. `request("PUT", "/api/devices/web-1", {...})`. Rejects with a CarillonError. */
  async request<T = unknown>(method: string, path: string, body?: unknown): Promise<T> {
    return (await (await this.#http(method, path, body)).json()) as T;
  }

  // ---------------------------------------------------------------- changes

  #many(type: "MARK_READ" | "MARK_SEEN", ids: string | readonly string[]): Promise<void> {
    const state = type === "MARK_READ" ? "read" : "seen";
    const done = new Set(this.getSnapshot().items.filter((item) => item[state]).map((item) => item.id));
    const wanted = ([ids].flat() as string[]).filter((id) => !done.has(id));
    const parts: Promise<void>[] = [];
    while (wanted.length) parts.push(this.#do({ type, notificationIds: wanted.splice(0, IDS_MAX) }));
    return handled(Promise.all(parts).then(() => {}));
  }

  #do(change: DistributiveOmit<Op, "id">): Promise<void> {
    const id = `${this.#tabs.id}-${(this.#ops += 1)}`;
    return handled(new Promise<void>((resolve, reject) => {
      if (this.#feed.pending.size >= PENDING_MAX) {
        reject(new CarillonError("queue_full", "too many wait", true));
        return;
      }
      this.#promised.set(id, { resolve, reject });
      const op = { id, ...change } as Op;
      this.#feed.pending.set(id, op);
      this.#changed();
      this.#say({ t: "op", op });
    }));
  }

  #finished(id: string, error: CarillonError | null): void {
    this.#feed.finish(id, !!error);
    if (this.#feed.pending.has(id)) {
      setTimeout(() => {
        if (this.#feed.pending.delete(id)) this.#changed();
      }, this.#timing.settle);
    }
    const promised = this.#promised.get(id);
    this.#promised.delete(id);
    if (error) promised?.reject(error);
    else promised?.resolve();
    this.#changed();
  }

  // ---------------------------------------------------------------- the leader

  #lead(): void {
    this.#leader = this.#tabs.id;
    const core = (this.#core = new Core(
      this.#feed, this.#timing, this.#env.now, this.#env.random, this.#options.transports ?? ["websocket", "sse", "poll"],
    ));
    this.#answered();
    try {
      const kept = JSON.parse(this.#keep("state") ?? "{}") as { position?: Position; ops?: Op[] };
      this.#feed.position ??= kept.position ?? null;
      for (const op of kept.ops ?? []) this.#feed.pending.set(op.id, this.#feed.pending.get(op.id) ?? op);
    } catch { /* not ours, or of another version */ }
    this.#run(() => {
      for (const op of this.#feed.pending.values()) if (!op.done) core.add(op);
      core.start();
    });
    this.#sayLook();
    this.#changed();
  }

  /** Let something happen to the core, then do what it wants. */
  #run(happens: (core: Core) => void): void {
    const core = this.#core;
    if (!core) return;
    happens(core);
    // Effects may lead to more of them (a connection that fails at once).
    for (let effect; (effect = core.effects.shift()); ) {
      switch (effect.do) {
        case "connect": void this.#dial(core, effect.transport, effect.position, effect.refresh); break;
        case "drop": this.#attempt += 1; this.#wire?.close(); this.#wire = null; break;
        case "send":
          this.#emit("frame", { direction: "out", frame: effect.frame });
          this.#wire?.send(effect.frame);
          break;
        case "applied": {
          const { frame, fresh, replay } = effect;
          if (frame.type === "PRESENCE") this.#presence = { ...this.#presence, [frame.userId]: frame.status };
          if (!fresh) break;
          // All of a replay in one tab.
          if (!replay || replay !== this.#loud.replay) this.#loud = { tab: this.#mostLooked()?.[0] ?? this.#tabs.id, replay };
          this.#arrived(fresh, "silent" in frame || fresh.read || fresh.seen ? { tab: "", replay } : this.#loud);
          break;
        }
        case "load": this.#ask(effect.generation, this.#page(), core.loaded); break;
        case "recount": this.#ask(effect.generation, this.request<{ count: number; rev: number }>("GET", "/api/notifications/unread-count"), core.counted); break;
        case "finished": {
          const { id, error } = effect;
          this.#tabs.post({ t: "done", id, error: error && [error.code, error.message, error.temporary] });
          this.#finished(id, error);
          break;
        }
        case "error": this.#emit("error", effect.error); break;
        case "connection":
          if (core.connection.state !== "open") this.#presence = {};
          this.#setConnection(core.connection);
      }
    }
    this.#presentation = core.presentation;
    this.#changed();
    if (core !== this.#core) return;
    clearTimeout(this.#timers.core);
    const { due } = core;
    if (due < Infinity) {
      this.#timers.core = setTimeout(() => this.#run((core) => core.tick()), due - this.#env.now());
    }
    if (this.#options.storage) this.#timers.keep ??= setTimeout(() => this.#keepNow(), 200);
  }

  async #dial(core: Core, transport: TransportName, position: Position | null, refresh: boolean): Promise<void> {
    const attempt = (this.#attempt += 1);
    const current = () => attempt === this.#attempt && core === this.#core;
    try {
      const { url } = this.#options;
      const [token, where, open] = await Promise.all([
        this.#getToken(refresh),
        typeof url === "string" ? url : url(),
        // Few need it: not in the first load.
        transport === "websocket" ? websocket : import("./fallback.js").then((fallback) => fallback[transport]),
      ]);
      if (!current()) return;
      this.#wire = open({
        url: where,
        token,
        deviceId: this.deviceId,
        position,
        http: this.#http,
        timing: this.#timing,
        WebSocket: this.#env.WebSocket,
        onFrame: (frame) => {
          if (!current()) return;
          this.#emit("frame", { direction: "in", frame });
          this.#run((core) => core.frame(frame));
        },
        onClose: (code, reason) => current() && this.#run((core) => core.closed(code, reason)),
      });
    } catch (error) {
      if (!current()) return;
      const known = error instanceof CarillonError ? error : new CarillonError("network", String(error), true);
      if (known.code === "stopped") this.#run((core) => core.stop(4001, known.message));
      else {
        this.#emit("error", known);
        // Not the transport's fault: the next try is on the same one.
        this.#run((core) => core.closed(known.code === "token" ? 4213 : 1006, known.message));
      }
    }
  }

  #getToken(refresh: boolean): Promise<string> {
    const { token } = this.#options;
    if (refresh || !this.#token) {
      const asked = Promise.resolve().then(() => (typeof token !== "string" ? token(refresh) : refresh ? null : token)).then(
        (got) => {
          if (!got) throw new CarillonError("stopped", "no token");
          return got;
        },
        (error) => {
          throw new CarillonError("token", String(error), true);
        },
      );
      this.#token = asked;
      asked.catch(() => (this.#token = null));
    }
    return this.#token;
  }

  #page(cursor?: string): Promise<Page> {
    const query = cursor ? `&cursor=${encodeURIComponent(cursor)}` : "";
    return this.request<Page>("GET", `/api/notifications?limit=${this.#options.pageSize ?? 30}${query}`);
  }

  /** The answer goes to the core; null: it could not be had, and the core asks again. */
  #ask<T>(generation: number, question: Promise<T>, answered: (generation: number, answer: T | null) => void): void {
    const answer = (value: T | null) => this.#run((core) => answered.call(core, generation, value));
    question.then(answer, (error: CarillonError) => {
      this.#emit("error", error);
      answer(null);
    });
  }

  // ---------------------------------------------------------------- the tabs

  #follow(): void {
    // From leader to follower only in an election without Web Locks.
    this.#run((core) => core.stop());
    this.#core = null;
    clearTimeout(this.#timers.core);
    this.#leader = "";
    this.#hello();
    this.#sayLook();
  }

  /** Ask for the leader's state, until it answers. */
  #hello(asked = 0): void {
    if (!asked && this.#timers.hello) return; // asking already
    if (asked === HELLOS) this.#tabs.seize();
    this.#tabs.post({ t: "hello" });
    this.#timers.hello = setTimeout(() => this.#hello(asked + 1), 1_000);
  }

  #answered(): void {
    clearTimeout(this.#timers.hello);
    delete this.#timers.hello;
  }

  /** To the leader, which may be this tab. */
  #say(message: Message): void {
    this.#tabs.post(message);
    if (this.#core) this.#heard(message);
  }

  #heard(message: Message, other = false): void {
    if (!this.#joined) return;
    this.#others ||= other;
    switch (message.t) {
      case "hello":
        this.#changed();
        break;
      case "op":
        this.#feed.pending.set(message.op.id, message.op);
        this.#run((core) => core.add(message.op));
        this.#changed();
        break;
      case "done":
        this.#finished(message.id, message.error && new CarillonError(...message.error));
        break;
      case "page":
        // The leader's answer is its new state.
        if (this.#core && message.cursor === this.#feed.cursor) {
          this.#feed.page(message.page, false);
          this.#changed();
        }
        break;
      case "look":
        this.#looks.set(message.tab, message.look);
        this.#attend();
        break;
      case "bye":
        this.#looks.delete(message.tab);
        this.#attend();
        break;
      case "state": {
        if (this.#core) break;
        const { leader, dump, connection, presence, presentation = AS_THE_APP, fresh, arrivals } = message;
        const unknown = this.#leader !== leader;
        this.#leader = leader;
        this.#answered();
        this.#feed.restore(dump);
        this.#presence = presence;
        this.#presentation = presentation;
        if (unknown) {
          for (const op of this.#feed.pending.values()) if (this.#promised.has(op.id)) this.#tabs.post({ t: "op", op });
          this.#sayLook();
        }
        if (unknown || JSON.stringify(this.#connection) !== JSON.stringify(connection)) this.#setConnection(connection);
        this.#changed();
        fresh.forEach((note, n) => this.#arrived(note, arrivals?.[n] ?? { tab: "" }));
      }
    }
  }

  #lookAt(change: Partial<Look>): void {
    this.#look = { ...this.#look, ...change };
    this.#sayLook();
  }

  #sayLook(): void {
    if (!this.#joined) return;
    clearTimeout(this.#timers.look);
    this.#timers.look = setTimeout(() => {
      this.#sayLook();
      if (!this.#core) this.#hello();
    }, this.#timing.look);
    this.#say({ t: "look", tab: this.#tabs.id, look: { ...this.#look, at: this.#env.now() } });
  }

  /** The connection's attention is that of the tab that is looked at most; presence is watched for all. */
  #attend(): void {
    const most = this.#mostLooked()?.[1];
    this.#run((core) => {
      if (most) core.attend(most.state!, most.viewing);
      core.watch([...new Set(this.#recent().flatMap(([, look]) => look.watch))]);
    });
  }

  /** Tabs that were heard of lately, and what their users look at. */
  #recent(): [tab: string, look: Look][] {
    return [...this.#looks].filter(([, look]) => look.at > this.#env.now() - 2.5 * this.#timing.look);
  }

  #mostLooked(): [tab: string, look: Look] | undefined {
    const looks = this.#recent();
    return ATTENTION.flatMap((state) => looks.filter(([, look]) => look.state === state))[0];
  }

  // ---------------------------------------------------------------- telling

  #arrived(notification: Notification, arrival: Arrival): void {
    if (this.#core) this.#fresh.push([notification, arrival]);
    const { tab, replay } = arrival;
    this.#emit("notification", notification);
    const loud = tab === this.#tabs.id;
    const { sound, vibration } = this.#presentation;
    this.#emit("present", {
      notification, ...this.#presentation, sound: loud && sound, vibration: loud && vibration, ...(replay && { replay }),
    });
  }

  #setConnection(connection: Connection): void {
    this.#connection = connection;
    this.#changed();
    this.#emit("connection", connection);
  }

  #emit<Name extends keyof Events>(name: Name, value: Events[Name]): void {
    for (const [wanted, handler] of [...this.#handlers]) {
      try {
        if (wanted === name) handler(value as never);
      } catch (error) {
        setTimeout(() => { throw error; }); // the application's fault is not to stop the stream
      }
    }
  }

  /** Tell subscribers, and the leader the other tabs, once, after everything that happens at this moment. */
  #changed(): void {
    this.#snapshot = null;
    if (!this.#told) return;
    this.#told = false;
    queueMicrotask(() => {
      this.#told = true;
      const fresh = this.#fresh.splice(0);
      if (this.#core && this.#others) {
        this.#tabs.post({
          t: "state", leader: this.#leader, dump: this.#feed.dump(), connection: this.#connection, presence: this.#presence,
          presentation: this.#presentation, fresh: fresh.map(([note]) => note), arrivals: fresh.map(([, arrival]) => arrival),
        });
      }
      for (const listener of [...this.#listeners]) listener();
    });
  }

  // ---------------------------------------------------------------- what is kept

  #keep(what: string, value?: string): string | null {
    try {
      const { storage } = this.#options;
      const key = `${this.#key}:${what}`;
      if (value) storage?.setItem(key, value);
      return storage?.getItem(key) ?? null;
    } catch {
      return null; // private mode, or full
    }
  }

  #keepNow(): void {
    clearTimeout(this.#timers.keep);
    delete this.#timers.keep;
    if (this.#core) this.#keep("state", JSON.stringify({ position: this.#feed.position, ops: this.#core.queued }));
  }
}

/** Whoever does not look at the promise gets no warning about its rejection: the roll-back shows it. */
function handled<T>(promise: Promise<T>): Promise<T> {
  promise.catch(() => {});
  return promise;
}
