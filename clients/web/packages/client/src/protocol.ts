/**
 * What travels between a client and Carillon, as types, and what a client owes to each close code.
 * The words are those of docs/reference/websocket.md and docs/reference/http.md.
 */

/** An action of a notification, e.g. a button. */
export interface Action {
  id: string;
  label: string;
  action?: string | null;
  url?: string | null;
  method?: string | null;
  payload?: unknown;
}

/** A notification as the server shows it. Members without `?` are always there. */
export interface Notification {
  readonly id: string;
  /** Counts the user's notifications, without gaps. */
  readonly seq: number;
  /** The revision of the user's stream that changed it last. */
  readonly rev: number;
  readonly userId: string;
  readonly type: string;
  readonly title: string | null;
  readonly body: string | null;
  readonly actorId: string | null;
  readonly targetType: string | null;
  readonly targetId: string | null;
  readonly read: boolean;
  readonly seen: boolean;
  readonly archived: boolean;
  readonly priority: "low" | "normal" | "high" | "urgent";
  readonly category: string | null;
  readonly actions: readonly Action[];
  readonly data: Readonly<Record<string, unknown>>;
  /** RFC 3339, UTC. */
  readonly createdAt: string;
  readonly clicked?: boolean;
  readonly dismissed?: boolean;
  readonly count?: number;
  readonly actors?: readonly unknown[];
  readonly aggregationKey?: string;
  readonly imageUrl?: string;
  readonly icon?: string;
  readonly link?: string;
  readonly updatedAt?: string;
  readonly deliveredAt?: string;
  readonly seenAt?: string;
  readonly readAt?: string;
  readonly clickedAt?: string;
  readonly expiresAt?: string;
  readonly campaignId?: string;
  readonly sourceApp?: string;
  readonly channels?: readonly string[];
}

/** How far a client has come: every notification up to `lastSeq`, of those every change up to `lastRev`. */
export interface Position {
  epoch: string;
  lastSeq: number;
  lastRev: number;
}

export interface Welcome {
  type: "WELCOME";
  epoch: string;
  lastSeq: number;
  rev: number;
  /** null: not known (only from the long-polling transport of this client). */
  unreadCount: number | null;
  heartbeatMs?: number;
  /** null: no position was given; else the answer to one. */
  recovered: boolean | null;
  sessionId?: string;
  deviceId?: string;
}

/** How the user wants notifications to be shown in the app: what preferences say of `in_app`. */
export interface Presentation {
  /** false: none; a string names one of the app. */
  readonly sound: boolean | string;
  readonly vibration: boolean;
  /** So long on the screen; null: as the app has it. */
  readonly durationMs: number | null;
  /** Whether it leaves by itself; null: as the app has it. */
  readonly autoDismiss: boolean | null;
}

/** Nobody says anything: the server then says nothing, either. */
export const AS_THE_APP: Presentation = { sound: true, vibration: true, durationMs: null, autoDismiss: null };

/** Frames of the server. SYNCED and `replay` are never on the wire: the long-polling transport makes them of an answer. */
export type ServerFrame =
  | Welcome
  | { type: "NEW_NOTIFICATION" | "NOTIFICATION_UPDATED"; notification: Notification; silent?: true; replay?: number }
  | { type: "NOTIFICATIONS_READ" | "NOTIFICATIONS_SEEN"; notificationIds: string[]; rev: number; readAt?: string }
  | { type: "ALL_NOTIFICATIONS_READ"; upToSeq: number; rev: number; readAt?: string }
  | {
      type: "NOTIFICATION_ARCHIVED" | "NOTIFICATION_DISMISSED" | "NOTIFICATION_CLICKED" | "NOTIFICATION_RETRACTED";
      notificationId: string;
      rev: number;
    }
  | { type: "UNREAD_COUNT"; count: number; rev: number }
  | { type: "PRESENCE"; userId: string; status: PresenceStatus; lastSeenAt: string | null }
  | ({ type: "PRESENTATION" } & Presentation)
  | { type: "PONG"; id?: string | number }
  | { type: "OK"; id: string }
  | { type: "ERROR"; code: string; message: string; temporary: boolean; id?: string }
  | { type: "SYNCED"; epoch: string; lastSeq: number; rev: number; unreadCount: number | null };

export type PresenceStatus = "active" | "idle" | "offline";

/** What a device tells of its user's attention. */
export type Attention = "focused" | "visible" | "hidden" | "idle";

/** A change that the user makes, as its frame. `id` is unique: the server's OK or ERROR echoes it. */
export type Op = { id: string } & (
  | { type: "MARK_READ" | "MARK_SEEN"; notificationIds: string[] }
  | { type: "MARK_ALL_READ"; upToSeq?: number }
  | { type: "ARCHIVE" | "DISMISS"; notificationId: string }
  | { type: "CLICK"; notificationId: string; actionId?: string }
);

export type ClientFrame =
  | { type: "AUTH"; token: string; deviceId?: string }
  | ({ type: "RESUME" } & Position)
  | { type: "ACK"; seq: number; rev: number }
  | Op
  | { type: "VISIBILITY"; state: Attention; viewing?: string }
  | { type: "WATCH_PRESENCE"; userIds: string[]; id: string }
  | { type: "PING" };

/** stop: never connect again by itself. renew: get a new token, then connect. retry: connect after a pause. */
export type Duty = "stop" | "renew" | "retry";

/**
 * What a client owes to a close code. The ranges fix it, so that a code of a newer server is understood, too:
 * 40xx stop (4001 not authenticated or revoked, 4002 not permitted, 4003 protocol abuse, 4004 too many connections),
 * 41xx renew (4101 the token has expired), everything else retry (42xx of the server; 1006 and the like of the way).
 */
export function dutyOf(code: number): Duty {
  return code > 3999 && code < 4100 ? "stop" : code > 4099 && code < 4200 ? "renew" : "retry";
}

/** Every error this client raises or emits. */
export class CarillonError extends Error {
  override readonly name = "CarillonError";
  /**
   * @param code stable name: those of the server (`not_found`, `invalid`, `busy`, ...), and of this client
   *   `network` (no answer), `token` (the token callback failed), `stopped` (the connection ended for good),
   *   `closed` (`close()` was called), `queue_full`, `http_<status>`.
   * @param temporary the same may succeed later.
   * @param status HTTP status, if there was one.
   */
  constructor(
    readonly code: string,
    message: string,
    readonly temporary = false,
    readonly status?: number,
  ) {
    super(message);
  }
}
