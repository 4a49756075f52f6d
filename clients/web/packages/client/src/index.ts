/** `@carillon/client`: see README.md. */

export { CarillonClient } from "./client.ts";
export type { Env, Events, Options, Preferences, PreferencesView, Presented, Snapshot } from "./client.ts";
export type { Connection, Timing, TransportName } from "./core.ts";
export { CarillonError, dutyOf } from "./protocol.ts";
export type { Action, Attention, Duty, Notification, Position, PresenceStatus, Presentation } from "./protocol.ts";
