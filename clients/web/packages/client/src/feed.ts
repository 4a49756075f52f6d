/**
 * The feed of one user as this client knows it: pure, no clock, no network.
 *
 * `Feed` holds what the server confirmed, and beside it the user's own changes that are not confirmed yet.
 * `view()` lays the second over the first, so rolling one back is forgetting it.
 *
 * Rules (docs/reference/websocket.md, "Position and resume"): the position moves with the `seq` of each
 * notification and with the `rev` beside `type` of each state frame, never with one inside of a notification.
 * A frame may come twice; the later revision of a notification wins, so a repeated one changes nothing.
 *
 * The unread count is true for a revision: `unreadRev`. Changes after it are counted as they come. Where their
 * effect cannot be known (a notification that was never loaded), `uncertain` asks for the server's count, which is
 * taken only if it is at least as new as everything counted: so a badge never jumps back.
 */

import type { Notification, Op, Position, ServerFrame, Welcome } from "./protocol.ts";

/** How many ids that are not in the list are remembered: a page that was read earlier must not undo what came since. */
const ASIDE_MAX = 500;

type States = Partial<Pick<Notification, "read" | "seen" | "clicked">>;
const READ: States = { read: true, seen: true };
const SEEN: States = { seen: true };
const CLICKED: States = { read: true, seen: true, clicked: true };

/** A page of GET /api/notifications. */
export interface Page {
  notifications: Notification[];
  nextCursor?: string | null;
}

/** Everything confirmed, to hand to another tab. */
export interface Dump {
  position: Position | null;
  items: Notification[];
  gone: string[];
  /** Count, the revision it is true for, the seq up to which it counts, the newest change counted since. */
  count: [number, number, number, number];
  cursor: string | null | undefined;
}

/** What is to be shown. */
export interface View {
  readonly items: readonly Notification[];
  readonly unreadCount: number;
  /** The revision that `unreadCount` is true for, this client's own pending changes aside. */
  readonly unreadRev: number;
}

const wins = (note: Notification, known: Notification | undefined) => !known || note.rev >= known.rev;
const merged = (note: Notification) => (note.count ?? 1) > 1 && note.updatedAt;
/** The feed's order: by seq, but what merged came to the top when it did. */
const above = (a: Notification, b: Notification) =>
  merged(a) || merged(b) ? (merged(a) || a.createdAt) >= (merged(b) || b.createdAt) : a.seq > b.seq;
const has = (note: Notification, states: States) =>
  (Object.keys(states) as (keyof States)[]).every((name) => note[name]);

export class Feed {
  position: Position | null = null;
  /** Newest first; what merged comes to the top. */
  order: Notification[] = [];
  unread = 0;
  unreadRev = -1;
  /** The count is wanted from the server. */
  uncertain = false;
  /** undefined: nothing loaded yet; null: the oldest is loaded. */
  cursor: string | null | undefined;
  /** Grows when history is dropped: answers to questions of before are void. */
  generation = 0;
  readonly pending = new Map<string, Op & { done?: boolean }>();

  #byId = new Map<string, Notification>();
  #gone = new Set<string>();
  #aside = new Map<string, Partial<Notification> & { rev: number }>(); // what came of notifications that are not loaded
  #allRead = { upToSeq: 0, rev: 0 };
  #unreadSeq = 0; // notifications up to here are in the server's count
  #countedRev = -1; // the newest change counted here
  #frozen = false; // a position was sent and is not answered yet
  #shown = new WeakMap<Notification, [string, Notification]>();

  get(id: string): Notification | undefined {
    return this.#byId.get(id);
  }

  /**
   * Take a frame.
   *
   * @returns a notification that was not known before.
   */
  apply(frame: ServerFrame): Notification | undefined {
    let fresh: Notification | undefined;
    switch (frame.type) {
      case "WELCOME":
        this.#welcome(frame);
        return;
      case "SYNCED":
        this.position = { epoch: frame.epoch, lastSeq: frame.lastSeq, lastRev: frame.rev };
        this.#countIs(frame.unreadCount, frame.rev, frame.lastSeq);
        return;
      case "NEW_NOTIFICATION":
      case "NOTIFICATION_UPDATED":
        fresh = this.#arrived(frame.notification, frame.type === "NEW_NOTIFICATION");
        break;
      case "NOTIFICATIONS_READ":
        this.#change(frame.notificationIds, frame.rev, READ);
        break;
      case "NOTIFICATIONS_SEEN":
        this.#change(frame.notificationIds, frame.rev, SEEN);
        break;
      case "NOTIFICATION_CLICKED":
        this.#change([frame.notificationId], frame.rev, CLICKED);
        break;
      case "NOTIFICATION_ARCHIVED":
      case "NOTIFICATION_DISMISSED":
      case "NOTIFICATION_RETRACTED":
        this.#change([frame.notificationId], frame.rev, null);
        break;
      case "ALL_NOTIFICATIONS_READ": {
        const { upToSeq, rev } = (this.#allRead = frame);
        this.#change(this.order.filter((note) => note.seq <= upToSeq).map((note) => note.id), rev, READ);
        if (rev > this.unreadRev) {
          this.unread = this.#unreadAfter(upToSeq);
          this.#countedRev = Math.max(this.#countedRev, rev);
          // Of what was never loaded, some may be newer than upToSeq and unread.
          if (this.cursor !== null) this.uncertain = true;
        }
        break;
      }
      case "UNREAD_COUNT":
        this.#countIs(frame.count, frame.rev);
    }
    if ("rev" in frame && this.position && !this.#frozen) {
      this.position = { ...this.position, lastRev: Math.max(this.position.lastRev, frame.rev) };
    }
    this.tidy();
    return fresh;
  }

  /** Take a page of the feed; `first`: the newest one, else the one after `cursor`. */
  page(page: Page, first: boolean): void {
    const others = new Set(first ? this.order : []);
    const listed: Notification[] = [];
    const { upToSeq, rev } = this.#allRead;
    for (let note of page.notifications) {
      const since = this.#aside.get(note.id);
      if (since && since.rev >= note.rev) note = { ...note, ...since };
      if (note.seq <= upToSeq && note.rev <= rev) note = { ...note, ...READ };
      if (this.#gone.has(note.id)) continue;
      const had = this.#byId.get(note.id);
      const kept = wins(note, had) ? note : had!;
      // Newer than the count: whether the count has it, only the server knows.
      if (note.rev > this.unreadRev && had?.read !== kept.read) this.uncertain = true;
      this.#byId.set(note.id, kept);
      if (had && !first) this.#replace(had, kept);
      // What came to the top since the page was read is placed below, as what the page does not have.
      else if (had && merged(had) !== merged(note) && kept === had) continue;
      else {
        others.delete(had!);
        listed.push(kept);
      }
    }
    this.order = first ? listed : [...this.order, ...listed];
    this.cursor = page.nextCursor ?? null;
    for (const note of others) this.#insert(note);
    this.tidy();
  }

  /** Take GET /api/notifications/unread-count. False: it is older than what was counted here; ask again. */
  counted(count: number, rev: number): boolean {
    if (rev < Math.max(this.unreadRev, this.#countedRev)) return false;
    this.#countIs(count, rev);
    return true;
  }

  /** Forget what the server does not know any more. */
  reset(): void {
    this.position = null;
    this.order = [];
    this.#byId.clear();
    for (const [id, op] of this.pending) if (op.done) this.pending.delete(id);
    this.#gone.clear();
    this.#aside.clear();
    this.#allRead = { upToSeq: 0, rev: 0 };
    this.unread = this.#unreadSeq = 0;
    this.unreadRev = this.#countedRev = -1;
    this.uncertain = this.#frozen = false;
    this.cursor = undefined;
    this.generation += 1;
  }

  /** The op is done (or refused: forget it at once, which rolls it back). */
  finish(id: string, refused: boolean): void {
    const op = this.pending.get(id);
    if (op && !refused) {
      op.done = true;
      if (op.type === "MARK_ALL_READ") op.upToSeq ??= this.position?.lastSeq; // up to the head meant: of now
    } else this.pending.delete(id);
    this.tidy();
  }

  /** Forget ops that are done and whose effect the confirmed state shows: until then they must stay laid over it. */
  tidy(): void {
    for (const [id, op] of this.pending) {
      if (!op.done) continue;
      const states = statesOf(op);
      const open = op.type === "MARK_ALL_READ"
        ? this.order.some((note) => !note.read && note.seq <= (op.upToSeq ?? Infinity))
        : idsOf(op).some((id) => {
            const note = this.#byId.get(id);
            return note && (!states || !has(note, states));
          });
      if (!open) this.pending.delete(id);
    }
  }

  dump(): Dump {
    const { position, order: items, unread, unreadRev, cursor } = this;
    return { position, items, gone: [...this.#gone], count: [unread, unreadRev, this.#unreadSeq, this.#countedRev], cursor };
  }

  /** Be as another tab. What did not change stays the same object. */
  restore({ position, items, gone, count, cursor }: Dump): void {
    const known = this.#byId;
    this.position = position;
    this.order = items.map((note) => {
      const had = known.get(note.id);
      return had?.rev === note.rev && had.read === note.read && had.seen === note.seen && had.clicked === note.clicked ? had : note;
    });
    this.#byId = new Map(this.order.map((note) => [note.id, note]));
    this.#gone = new Set(gone);
    [this.unread, this.unreadRev, this.#unreadSeq, this.#countedRev] = count;
    this.cursor = cursor;
    this.tidy();
  }

  /** What is confirmed with what is pending laid over it. A notification that looks the same is the same object. */
  view(): View {
    let items: readonly Notification[] = this.order;
    let unread = this.unread;
    if (this.pending.size) {
      const patches = new Map<string, States | null>();
      let readUpTo = -1;
      for (const op of this.pending.values()) {
        if (op.type === "MARK_ALL_READ") readUpTo = Math.max(readUpTo, op.upToSeq ?? Infinity);
        else {
          const states = statesOf(op);
          for (const id of idsOf(op)) {
            const before = patches.get(id);
            patches.set(id, states === null || before === null ? null : { ...before, ...states });
          }
        }
      }
      if (readUpTo >= 0) unread = this.#unreadAfter(readUpTo);
      const shown: Notification[] = [];
      for (const note of this.order) {
        let patch = patches.get(note.id);
        const below = note.seq <= readUpTo;
        if (below && patch !== null) patch = { ...patch, ...READ };
        if (!note.read && !below && (patch === null || patch?.read)) unread -= 1;
        if (patch !== null) shown.push(patch ? this.#look(note, patch) : note);
      }
      items = shown;
    }
    return { items, unreadCount: Math.max(0, unread), unreadRev: Math.max(this.unreadRev, this.#countedRev) };
  }

  // ---------------------------------------------------------------- inside

  #welcome(frame: Welcome): void {
    if (frame.recovered === null && this.position) {
      this.#frozen = true; // RESUME is on its way: until it is answered the position stands still
      return;
    }
    this.#frozen = false;
    if (frame.recovered === false) this.reset();
    if (!this.position || frame.recovered === false) {
      this.position = { epoch: frame.epoch, lastSeq: frame.lastSeq, lastRev: frame.rev };
    }
    this.#countIs(frame.unreadCount, frame.rev, frame.lastSeq);
  }

  #countIs(count: number | null, rev: number, seq = 0): void {
    if (count === null || rev < this.unreadRev) return;
    this.unread = count;
    this.unreadRev = rev;
    this.#unreadSeq = Math.max(this.#unreadSeq, seq);
    this.uncertain = false;
  }

  #unreadAfter(seq: number): number {
    return this.order.filter((note) => !note.read && note.seq > seq).length;
  }

  #replace(old: Notification, now: Notification): void {
    this.#byId.set(now.id, now);
    const at = this.order.indexOf(old);
    if (at >= 0) {
      this.order = this.order.slice();
      this.order[at] = now;
    }
  }

  #insert(note: Notification): void {
    const at = this.order.findIndex((other) => above(note, other));
    if (at < 0 && this.cursor) {
      // Below what is loaded: its page will bring it, with those between.
      this.#byId.delete(note.id);
      this.#keepAside(note.id, note);
      return;
    }
    this.order = this.order.slice();
    this.order.splice(at < 0 ? this.order.length : at, 0, note);
    this.#byId.set(note.id, note);
  }

  #remove(note: Notification): void {
    this.#byId.delete(note.id);
    this.order = this.order.filter((other) => other !== note);
  }

  /** A change of `by` in the number of unread ones that `rev` brought. */
  #count(by: number, rev: number): void {
    if (rev > this.unreadRev) {
      this.unread += by;
      if (rev > this.#countedRev) this.#countedRev = rev;
    } else if (rev === this.unreadRev) {
      // The first frames of one change carry the rev before it: they may be in the count or not.
      this.uncertain = true;
    }
  }

  #arrived(note: Notification, isNew: boolean): Notification | undefined {
    const { position } = this;
    const fresh = isNew && !!position && note.seq > position.lastSeq;
    if (fresh && !this.#frozen) this.position = { ...position, lastSeq: note.seq };
    if (this.#gone.has(note.id)) return;
    const known = this.#byId.get(note.id);
    if (!wins(note, known)) return fresh ? known : undefined;
    if (note.archived || note.dismissed) {
      this.#change([note.id], note.rev, null);
      return;
    }
    if (known) {
      if (known.read !== note.read) this.#count(note.read ? -1 : 1, note.rev);
      // A merge comes to the top, an edit stays where it is.
      if ((note.count ?? 1) > (known.count ?? 1)) {
        this.#remove(known);
        this.#insert(note);
      } else this.#replace(known, note);
      return fresh ? note : undefined;
    }
    // An edit of what is not loaded is for its page. A merge comes to the top.
    if (!isNew && !merged(note)) {
      this.#keepAside(note.id, note);
      return;
    }
    if (isNew && note.seq > this.#unreadSeq && note.rev > this.unreadRev) {
      if (!note.read) this.#count(1, note.rev);
      // Changed since it was new: its rev does not tell whether the count has it.
      if (note.seen || note.updatedAt) this.uncertain = true;
    }
    this.#insert(note);
    return fresh ? note : undefined;
  }

  /** `states` become true of these; null: they leave the list for good. */
  #change(ids: readonly string[], rev: number, states: States | null): void {
    for (const id of ids) {
      const note = this.#byId.get(id);
      if (this.#gone.has(id)) continue;
      if (!states) {
        bounded(this.#gone.add(id));
      }
      if (!note) {
        // Never loaded, and it may have been unread.
        if ((!states || states.read) && rev > this.unreadRev) this.uncertain = true;
        if (states) this.#keepAside(id, { ...states, rev });
        continue;
      }
      if (!note.read && (!states || states.read)) this.#count(-1, rev);
      if (!states) this.#remove(note);
      else if (!has(note, states) || note.rev < rev) {
        this.#replace(note, { ...note, ...states, rev: Math.max(note.rev, rev) });
      }
    }
  }

  #keepAside(id: string, change: Partial<Notification> & { rev: number }): void {
    bounded(this.#aside.set(id, { ...this.#aside.get(id), ...change }));
  }

  #look(note: Notification, patch: States): Notification {
    if (has(note, patch)) return note;
    const key = JSON.stringify(patch);
    const before = this.#shown.get(note);
    if (before?.[0] === key) return before[1];
    const look = { ...note, ...patch };
    this.#shown.set(note, [key, look]);
    return look;
  }
}

/** Forget the oldest of too many. */
function bounded(known: Set<string> | Map<string, unknown>): void {
  if (known.size > ASIDE_MAX) known.delete(known.keys().next().value!);
}

/** What an op makes true; null: it takes its notification out of the list. */
function statesOf({ type }: Op): States | null {
  return type === "ARCHIVE" || type === "DISMISS" ? null
    : type === "MARK_SEEN" ? SEEN
    : type === "CLICK" ? CLICKED
    : READ;
}

function idsOf(op: Op): string[] {
  return "notificationIds" in op ? op.notificationIds : "notificationId" in op ? [op.notificationId] : [];
}
