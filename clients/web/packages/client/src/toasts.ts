/**
 * Notifications that pop up: how long each stays, as its user wants it, and the noise it makes. Draws nothing itself.
 * A file of its own (`@carillon/client/toasts`), because not every application lets something pop up.
 */

import type { CarillonClient, Presented } from "./client.ts";

export interface ToastOptions {
  /** Draw one. `close` takes it off the screen; `hold(true)` lets it stay while the pointer is on it. */
  show(toast: Presented, close: () => void, hold: (held: boolean) => void): void;
  /** Take one off the screen: its time is over, it was closed, read or removed, or there are too many. */
  hide(id: string): void;
  /** Make a sound: true is the application's own, a string the one that the user chose. Default: none. */
  play?(sound: true | string): void;
  /** Default: `navigator.vibrate(200)`, where there is one. */
  vibrate?(): void;
  /** How long one stays if its user does not say. Default: 6,000. */
  durationMs?: number;
  /** Whether one leaves by itself if its user does not say. Default: true. */
  autoDismiss?: boolean;
  /** On the screen at a time; beyond it the oldest leaves. Default: 4. */
  most?: number;
}

interface Shown {
  timer?: ReturnType<typeof setTimeout>;
  /** It was in the feed: when it is no more, it leaves. */
  listed: boolean;
}

/** So long what is replayed is gathered, in milliseconds: that it was read meanwhile comes behind it. */
const GATHER = 250;

/** Show what arrives from now on; of what came while the client was away, one noise for all. @returns ends it and takes all of them off the screen. */
export function toasts(client: Pick<CarillonClient, "on" | "subscribe" | "getSnapshot">, options: ToastOptions): () => void {
  const shown = new Map<string, Shown>();
  const close = (id: string) => {
    const toast = shown.get(id);
    if (!toast) return;
    clearTimeout(toast.timer);
    shown.delete(id);
    options.hide(id);
  };
  const noise = ({ sound, vibration }: Presented) => {
    if (sound) options.play?.(sound);
    if (vibration) (options.vibrate ?? (() => globalThis.navigator?.vibrate?.(200)))();
  };
  let replayed: Presented[] = []; // not heard yet
  let heard: number | undefined; // the replay that was
  let gathering: ReturnType<typeof setTimeout> | undefined;
  const gathered = () => {
    const news = new Set(client.getSnapshot().items.filter((item) => !item.read && !item.seen).map((item) => item.id));
    for (const toast of replayed) {
      if (toast.replay === heard || !news.has(toast.notification.id)) continue;
      heard = toast.replay;
      noise(toast);
    }
    replayed = [];
    gathering = undefined;
  };
  const arrived = (toast: Presented) => {
    const { id, read } = toast.notification;
    if (read) return;
    if (!toast.replay) noise(toast);
    else if (toast.sound || toast.vibration) {
      replayed.push(toast);
      gathering ??= setTimeout(gathered, GATHER);
    }
    const leaves = toast.autoDismiss ?? options.autoDismiss ?? true;
    const durationMs = toast.durationMs ?? options.durationMs ?? 6_000;
    if (leaves && !durationMs) return; // in the feed alone
    const entry: Shown = { listed: false };
    const hold = (held: boolean) => {
      clearTimeout(entry.timer);
      if (leaves && !held && shown.get(id) === entry) entry.timer = setTimeout(() => close(id), durationMs);
    };
    close(id);
    shown.set(id, entry);
    options.show(toast, () => close(id), hold);
    hold(false);
    for (const oldest of [...shown.keys()].slice(0, -(options.most ?? 4))) close(oldest);
  };
  const changed = () => {
    if (!shown.size) return;
    const items = new Map(client.getSnapshot().items.map((item) => [item.id, item]));
    for (const [id, entry] of [...shown]) {
      const item = items.get(id);
      if (item ? item.read : entry.listed) close(id);
      else entry.listed ||= !!item;
    }
  };
  const ends = [client.on("present", arrived), client.subscribe(changed)];
  return () => {
    for (const end of ends) end();
    clearTimeout(gathering);
    for (const id of [...shown.keys()]) close(id);
  };
}
