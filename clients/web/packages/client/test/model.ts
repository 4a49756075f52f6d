/** The server's side as a small model: one user's stream, its frames, replays and HTTP answers. */

import type { Notification, Op, Position, ServerFrame } from "../src/protocol.ts";

/** A seeded generator (mulberry32): a failing run is repeated by its seed. */
export function seeded(seed: number): () => number {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

export type Row = { -readonly [K in keyof Notification]: Notification[K] } & { position: number; retracted: boolean };

export class Model {
  epoch = "e1";
  seq = 0;
  rev = 0;
  rows: Row[] = [];
  /** Called with every frame of a change, after the commit. */
  told: (frame: ServerFrame) => void = () => {};

  get unread(): number {
    return this.rows.filter((row) => visible(row) && !row.read).length;
  }

  /** The feed, newest first. */
  get feed(): Row[] {
    return this.rows.filter(visible).sort((a, b) => b.position - a.position);
  }

  note(title = `n${this.seq + 1}`, silent = false): Row {
    this.seq += 1;
    this.rev += 1;
    const row: Row = {
      id: `00000000-0000-7000-${this.epoch.slice(1).padStart(4, "0")}-${String(this.seq).padStart(12, "0")}`, seq: this.seq, rev: this.rev, userId: "ann", type: "t", title,
      body: null, actorId: null, targetType: null, targetId: null, read: false, seen: false, archived: false, priority: "normal",
      category: null, actions: [], data: {}, createdAt: time(this.rev), position: this.rev, retracted: false,
    };
    this.rows.push(row);
    this.told({ type: "NEW_NOTIFICATION", notification: shown(row), ...(silent && { silent }) });
    return row;
  }

  /** A change of any device; what changed nothing causes no frame. Throws for what a strict one does not find. */
  change(op: Op | { type: "RETRACT" | "MERGE" | "EDIT"; notificationId: string }): void {
    const ids = "notificationIds" in op ? op.notificationIds : "notificationId" in op ? [op.notificationId] : null;
    const upTo = "upToSeq" in op ? op.upToSeq ?? this.seq : this.seq;
    const rows = this.rows.filter((row) => (ids ? ids.includes(row.id) : row.seq <= upTo && visible(row)));
    if (!rows.length && "notificationId" in op) throw new Error("not_found");
    const hit = rows.filter((row) => !row.retracted && changes(op.type, row));
    if (!hit.length) return;
    this.rev += 1;
    const { rev } = this;
    for (const row of hit) {
      Object.assign(row, effectOf(op.type, row, rev), { rev });
      if (op.type === "MERGE") row.position = rev;
    }
    const notificationIds = hit.map((row) => row.id);
    const notificationId = notificationIds[0]!;
    if (op.type === "MARK_READ") this.told({ type: "NOTIFICATIONS_READ", notificationIds, rev });
    else if (op.type === "MARK_SEEN") this.told({ type: "NOTIFICATIONS_SEEN", notificationIds, rev });
    else if (op.type === "MARK_ALL_READ") this.told({ type: "ALL_NOTIFICATIONS_READ", upToSeq: upTo, rev });
    else if (op.type === "MERGE" || op.type === "EDIT") this.told({ type: "NOTIFICATION_UPDATED", notification: shown(hit[0]!) });
    else {
      const kind = { ARCHIVE: "ARCHIVED", DISMISS: "DISMISSED", CLICK: "CLICKED", RETRACT: "RETRACTED" }[op.type] as "ARCHIVED";
      this.told({ type: `NOTIFICATION_${kind}`, notificationId, rev });
    }
  }

  knows(position: Position): boolean {
    return position.epoch === this.epoch && position.lastSeq <= this.seq;
  }

  welcome(recovered: boolean | null): ServerFrame {
    const { epoch, seq: lastSeq, rev, unread: unreadCount } = this;
    return { type: "WELCOME", epoch, lastSeq, rev, unreadCount, recovered, heartbeatMs: 25_000 };
  }

  missed({ lastSeq }: Position): Notification[] {
    return this.rows.filter((row) => row.seq > lastSeq && !row.retracted).map(shown);
  }

  /** Changes of what the client has, by rev, in the frames of the server's replay (carillon/session.py). */
  changes({ lastSeq, lastRev }: Position): ServerFrame[] {
    const frames: ServerFrame[] = [];
    const rows = this.rows.filter((row) => row.rev > lastRev && row.seq <= lastSeq && row.rev !== row.seq).sort((a, b) => a.rev - b.rev);
    for (const row of rows) {
      const { rev } = row;
      const group: ServerFrame[] = [];
      if (row.updatedAt && !row.retracted) group.push({ type: "NOTIFICATION_UPDATED", notification: shown(row) });
      if (row.read && !row.retracted) group.push({ type: "NOTIFICATIONS_READ", notificationIds: [row.id], rev });
      else if (row.seen && !row.retracted) group.push({ type: "NOTIFICATIONS_SEEN", notificationIds: [row.id], rev });
      for (const [kind, is] of [["CLICKED", row.clicked], ["DISMISSED", row.dismissed], ["ARCHIVED", row.archived]] as const) {
        if (is && !row.retracted) group.push({ type: `NOTIFICATION_${kind}`, notificationId: row.id, rev });
      }
      if (row.retracted) group.push({ type: "NOTIFICATION_RETRACTED", notificationId: row.id, rev });
      // Of the frames of one rev only the last carries it.
      const last = rows.filter((other) => other.rev === rev).at(-1) === row;
      group.forEach((frame, at) => {
        const told = last && at === group.length - 1 ? rev : Math.max(lastRev, rev - 1);
        frames.push("rev" in frame ? ({ ...frame, rev: told } as ServerFrame) : frame);
      });
    }
    return frames;
  }

  replay(position: Position): ServerFrame[] {
    return [
      // Of those withdrawn only that is told: the client may have them from the feed.
      ...this.rows.filter((row) => row.seq > position.lastSeq).map((row): ServerFrame => row.retracted
        ? { type: "NOTIFICATION_RETRACTED", notificationId: row.id, rev: position.lastRev }
        : { type: "NEW_NOTIFICATION", notification: shown(row) }),
      ...this.changes(position),
    ];
  }

  /** `cursor`: the position of the last row of the page before. */
  page(limit: number, cursor?: string | null): { notifications: Notification[]; nextCursor: string | null } {
    const below = this.feed.filter((row) => row.position < (cursor ? Number(cursor) : Infinity));
    const rows = below.slice(0, limit);
    return { notifications: rows.map(shown), nextCursor: below.length > limit ? String(rows.at(-1)!.position) : null };
  }
}

const time = (at: number) => new Date(1.7e12 + at).toISOString();
const visible = (row: Row) => !row.archived && !row.dismissed && !row.retracted;

export function shown({ position: _position, retracted: _retracted, ...row }: Row): Notification {
  return { ...row };
}

function changes(type: string, row: Row): boolean {
  switch (type) {
    case "MARK_SEEN": return !row.seen;
    case "ARCHIVE": return !row.archived;
    case "DISMISS": return !row.dismissed;
    case "CLICK": return !row.clicked;
    case "RETRACT": return true;
    case "MERGE": return visible(row);
    case "EDIT": return true;
    default: return !row.read;
  }
}

function effectOf(type: string, row: Row, rev: number): Partial<Row> {
  switch (type) {
    case "MARK_SEEN": return { seen: true };
    case "ARCHIVE": return { archived: true };
    case "DISMISS": return { dismissed: true };
    case "CLICK": return { clicked: true, read: true, seen: true };
    case "RETRACT": return { retracted: true };
    case "MERGE": return { count: (row.count ?? 1) + 1, updatedAt: time(rev), title: `${row.title}+` };
    case "EDIT": return { updatedAt: row.count ? row.updatedAt : time(rev), title: `${row.title}'` };
    default: return { read: true, seen: true };
  }
}
