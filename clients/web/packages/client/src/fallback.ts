/**
 * What few need, loaded when they do: the session without WebSockets (server-sent events, long polling), and the
 * election of a leader among tabs without Web Locks. Imports types only, so that it is a file of its own without a copy of the rest.
 */

import type { CarillonError, ClientFrame, Presentation, ServerFrame } from "./protocol.ts";
import type { Dial, Wire } from "./transports.ts";

/** The close code that a WebSocket would have had. */
function closeCodeOf({ code, status }: Partial<CarillonError>): number {
  return code === "stopped" ? 4001
    : code === "token_expired" ? 4101
    : status === 401 ? 4001
    : status === 403 ? 4002
    : status === 429 || status === 503 || code === "token" ? 4213
    : 1006;
}

const PATHS: Partial<Record<ClientFrame["type"], string>> = {
  MARK_READ: "notifications/read", MARK_SEEN: "notifications/seen", MARK_ALL_READ: "notifications/read-all",
  ARCHIVE: "archive", DISMISS: "dismiss", CLICK: "click", ACK: "ack", VISIBILITY: "visibility",
};

type Look = Extract<ClientFrame, { type: "VISIBILITY" }>;

/** What both fallbacks share: frames of the client as requests, whose answers become OK and ERROR. */
function overHttp(
  dial: Dial,
  run: (signal: AbortSignal, sleep: (ms: number) => Promise<void>, look: () => Partial<Look>) => Promise<Close | void>,
  silent: ClientFrame["type"][],
): Wire {
  const abort = new AbortController();
  let look: Partial<Look> = {};
  let awake = false;
  let wake = () => {
    awake = true;
  };
  // Until then, or until a change was made: its frame is waiting at the server.
  const sleep = (ms: number) =>
    new Promise<void>((resolve) => {
      const idle = wake;
      const timer = setTimeout(() => wake(), awake ? 0 : ms);
      awake = false;
      wake = () => {
        clearTimeout(timer);
        wake = idle;
        resolve();
      };
    });
  abort.signal.addEventListener("abort", () => wake());
  const tell = (frame: ServerFrame) => {
    if (!abort.signal.aborted) dial.onFrame(frame);
  };
  const ended = (code: number, reason: string) => {
    if (abort.signal.aborted) return;
    abort.abort();
    dial.onClose(code, reason);
  };
  run(abort.signal, sleep, () => look).then(
    (close) => ended(close?.code ?? 1006, close?.reason ?? "the stream ended"),
    (error: CarillonError) => ended(closeCodeOf(error), error.message),
  );
  return {
    send(frame: ClientFrame) {
      if (frame.type === "VISIBILITY") look = frame;
      const { type, ...body } = frame;
      const path = PATHS[type];
      if (!path || silent.includes(type) || abort.signal.aborted) return;
      const { id, ...members } = { deviceId: dial.deviceId, ...body } as { id?: string; notificationId?: string };
      const one = members.notificationId;
      dial.http("POST", `/api/${one ? `notifications/${encodeURIComponent(one)}/` : ""}${path}`, members).then(
        () => {
          if (id) tell({ type: "OK", id });
          wake();
        },
        ({ code, message, temporary }: CarillonError) => {
          // Without id (ACK, VISIBILITY) nobody waits for it; between two polls the device is not there to tell of.
          if (id) tell({ type: "ERROR", code, message, temporary, id });
        },
      );
    },
    close: () => abort.abort(),
  };
}

/** The last event of a stream, for want of a WebSocket's close frame. */
interface Close {
  type: "CLOSE";
  code: number;
  reason: string;
}

/** GET /api/stream. With fetch, because an EventSource sends no Authorization header. */
export function sse(dial: Dial): Wire {
  const { position } = dial;
  return overHttp(dial, async (signal) => {
    const headers: Record<string, string> = { Accept: "text/event-stream" };
    if (position) headers["Last-Event-ID"] = `${position.epoch}:${position.lastSeq}:${position.lastRev}`;
    const response = await dial.http("GET", `/api/stream?deviceId=${encodeURIComponent(dial.deviceId)}`, undefined, { signal, headers });
    const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done || signal.aborted) return;
      const events = (text + value).split(/\r?\n\r?\n/);
      text = events.pop()!;
      for (const event of events) {
        const data = event.match(/^data:.*/gm)?.map((line) => line.slice(5)).join("");
        if (signal.aborted) return;
        const frame = (data ? JSON.parse(data) : { type: "PONG" }) as ServerFrame | Close; // a comment: it is alive
        if (frame.type === "CLOSE") return frame;
        dial.onFrame(frame);
      }
    }
  }, []);
}

interface Sync {
  notifications: never[];
  changes: ServerFrame[];
  lastSeq: number;
  rev: number;
  unreadCount: number;
  epoch: string;
  recovered: boolean;
  more?: boolean;
}

/** GET /api/sync, held by the server until something happens, or asked every `timing.poll` where it cannot. */
export function poll(dial: Dial): Wire {
  const { timing } = dial;
  const silent: ClientFrame["type"][] = ["ACK"]; // the next `since` and `rev` acknowledge, if they wait
  return overHttp(dial, async (signal, sleep, look) => {
    let { position } = dial;
    let welcomed = false;
    let replay: number | undefined;
    // No answer of a poll tells how notifications are to be shown.
    const told = presentation(dial, signal);
    let waitS = Math.round(timing.wait / 1000);
    while (!signal.aborted) {
      const query = new URLSearchParams();
      if (position) {
        query.set("epoch", position.epoch);
        query.set("rev", String(position.lastRev));
      }
      // Beyond any head: the answer is where the head is.
      query.set("since", String(position ? position.lastSeq : Number.MAX_SAFE_INTEGER));
      if (welcomed && waitS) query.set("waitS", String(waitS));
      query.set("deviceId", dial.deviceId);
      // A device is there for as long as a request of it waits: each tells anew where its user looks.
      const { state, viewing } = look();
      if (state) query.set("state", state);
      if (viewing) query.set("viewing", viewing);
      const asked = new AbortController();
      const cancel = () => asked.abort();
      signal.addEventListener("abort", cancel);
      const timer = setTimeout(cancel, timing.wait + timing.connect);
      let answer: Sync;
      try {
        answer = (await (await dial.http("GET", `/api/sync?${query}`, undefined, { signal: asked.signal })).json()) as Sync;
      } catch (error) {
        // Not at this door (Ray Serve's route cannot hold requests), or not at this server.
        if (!["not_found", "not_supported"].includes((error as CarillonError).code) || !query.has("waitS")) throw error;
        waitS = 0;
        silent.pop();
        continue;
      } finally {
        clearTimeout(timer);
        signal.removeEventListener("abort", cancel);
      }
      if (signal.aborted) return;
      const { epoch, lastSeq, rev, more } = answer;
      const unreadCount = more ? null : answer.unreadCount;
      const first = !welcomed;
      if (first || !answer.recovered) {
        welcomed = true;
        dial.onFrame({ type: "WELCOME", epoch, lastSeq, rev, unreadCount: answer.recovered ? null : unreadCount, recovered: position ? answer.recovered : null });
      }
      // Before what is replayed, as elsewhere.
      if (first) {
        const frame = await told;
        if (signal.aborted) return;
        if (frame) dial.onFrame(frame);
      }
      // What comes together came while nobody asked, in however many answers.
      if (first || more || answer.notifications.length > 1) replay ??= lastSeq;
      for (const notification of answer.notifications) dial.onFrame({ type: "NEW_NOTIFICATION", notification, replay });
      if (!more) replay = undefined;
      for (const change of answer.changes) dial.onFrame(change);
      if (answer.recovered) dial.onFrame({ type: "SYNCED", epoch, lastSeq, rev, unreadCount });
      position = { epoch, lastSeq, lastRev: rev };
      if (waitS || more) continue;
      await sleep(timing.poll);
    }
  }, silent);
}

/** What the preferences say of the app, as the frame that tells it elsewhere; null: not to be had, so it is as the application has it. */
async function presentation(dial: Dial, signal: AbortSignal): Promise<ServerFrame | null> {
  const asked = new AbortController();
  const cancel = () => asked.abort();
  signal.addEventListener("abort", cancel);
  const timer = setTimeout(cancel, dial.timing.connect);
  try {
    const answer = await dial.http("GET", "/api/notifications/preferences?view=complete", undefined, { signal: asked.signal });
    const { channels, sound, vibration } = (await answer.json()) as { channels: { in_app?: boolean | Partial<Presentation> } } & Presentation;
    const near = typeof channels.in_app === "object" ? channels.in_app : {};
    return {
      type: "PRESENTATION", sound: near.sound ?? sound, vibration: near.vibration ?? vibration,
      durationMs: near.durationMs ?? null, autoDismiss: near.autoDismiss ?? null,
    };
  } catch {
    return null;
  } finally {
    clearTimeout(timer);
    signal.removeEventListener("abort", cancel);
  }
}

// ---------------------------------------------------------------- tabs without Web Locks

/** Milliseconds. */
const BEAT = 1_000;
const SILENCE = 3_000;

export type ElectionMessage = { t: "who" } | { t: "lead"; tab: string; term: number } | { t: "resign" };

/**
 * Leader by heart-beat: who hears no leader for a while claims a higher term; the higher term wins, of equal ones the
 * higher tab id. A leader whose timers the browser slowed down loses to one that is awake. Pure: time comes in.
 */
export class Election {
  leading = false;
  /** When to call `tick`. */
  due = Infinity;
  #term = 0;

  constructor(
    private readonly tab: string,
    private readonly random: () => number,
    private readonly post: (message: ElectionMessage) => void,
    private readonly changed: (leading: boolean) => void,
  ) {}

  join(now: number): void {
    this.due = now + 200 + this.random() * 200;
    this.post({ t: "who" });
  }

  leave(): void {
    this.due = Infinity;
    if (this.leading) this.post({ t: "resign" });
    this.leading = false;
  }

  tick(now: number): void {
    if (now < this.due) return;
    const won = !this.leading;
    if (won) {
      this.leading = true;
      this.#term += 1;
    }
    this.#beat(now);
    if (won) this.changed(true);
  }

  /** True if the message was one of the election. */
  heard(message: ElectionMessage, now: number): boolean {
    if (message.t !== "who" && message.t !== "lead" && message.t !== "resign") return false;
    if (this.due === Infinity) return true;
    if (message.t === "who") {
      if (this.leading) this.#beat(now);
    } else if (message.t === "resign") {
      if (!this.leading) this.due = now + this.random() * 200;
    } else if (message.term > this.#term || (message.term === this.#term && (message.tab > this.tab || !this.leading))) {
      this.#term = message.term;
      this.due = now + SILENCE + this.random() * BEAT;
      if (this.leading) {
        this.leading = false;
        this.changed(false);
      }
    } else if (this.leading) this.#beat(now);
    return true;
  }

  #beat(now: number): void {
    this.post({ t: "lead", tab: this.tab, term: this.#term });
    this.due = now + BEAT;
  }
}
