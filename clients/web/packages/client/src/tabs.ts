/**
 * Several tabs, one leader: the tab that holds the connection. Web Locks elect it where there are any (a lock ends with
 * its tab, whatever ends the tab); elsewhere, e.g. on plain http, an election over the
 * BroadcastChannel does (fallback.ts). A tab that the system suspends (on phones: any in the background) keeps its
 * lock and does nothing with it: one that gets no answer takes the lock away (`seize`).
 */

import type { ElectionMessage } from "./fallback.ts";

export interface TabsEnv {
  now(): number;
  random(): number;
  BroadcastChannel: typeof BroadcastChannel | undefined;
  locks: LockManager | undefined;
}

/** This tab among those of the same name. `M` is what they tell each other. */
export class Tabs<M extends { t: string }> {
  readonly id: string;
  leading = false;
  #channel: BroadcastChannel | undefined;
  #end = () => {};
  /** Lead although another tab holds the lock. Without Web Locks the election sees to that. */
  seize = () => {};

  #name: string;
  #env: TabsEnv;
  #on: { changed(leading: boolean): void; message(message: M): void };

  constructor(name: string, env: TabsEnv, on: { changed(leading: boolean): void; message(message: M): void }) {
    this.#name = name;
    this.#env = env;
    this.#on = on;
    this.id = env.random().toString(36).slice(2, 12).padEnd(10, "0");
  }

  /** Take part; `changed(true)` follows once this tab leads. */
  join(): void {
    const { BroadcastChannel, locks, now, random } = this.#env;
    const changed = (leading: boolean) => {
      this.leading = leading;
      this.#on.changed(leading);
    };
    if (!BroadcastChannel) {
      changed(true);
      return;
    }
    const channel = (this.#channel = new BroadcastChannel(this.#name));
    if (locks) {
      channel.onmessage = ({ data }) => this.#on.message(data as M);
      const request = (steal: boolean) => {
        const abort = new AbortController();
        const { signal } = abort;
        locks.request(this.#name, steal ? { steal } : { signal }, () =>
          new Promise<void>((resolve) => {
            signal.onabort = () => resolve();
            if (signal.aborted) resolve();
            else changed(true);
          })).catch(({ name }: DOMException) => {
          if (signal.aborted) return; // this tab left before it led
          if (name !== "AbortError") return changed(true); // no locks here after all: a connection of its own
          request(false); // another one seized the lock while this one slept
          changed(false);
        });
        this.#end = () => abort.abort();
      };
      this.seize = () => {
        this.#end();
        request(true);
      };
      request(false);
      return;
    }
    import("./fallback.js").then(({ Election }) => {
      if (channel !== this.#channel) return; // left meanwhile
      let timer: ReturnType<typeof setTimeout>;
      const then = (what: unknown) => {
        clearTimeout(timer);
        if (election.due < Infinity) timer = setTimeout(() => then(election.tick(now())), Math.max(0, election.due - now()));
        return what;
      };
      const election = new Election(this.id, random, (message) => channel.postMessage(message), changed);
      channel.onmessage = ({ data }) => then(election.heard(data as ElectionMessage, now())) || this.#on.message(data as M);
      this.#end = () => then(election.leave());
      then(election.join(now()));
    }, () => changed(true)); // not to be had: this tab has a connection of its own
  }

  /** Tell the other tabs. */
  post(message: M): void {
    this.#channel?.postMessage(message);
  }

  /** Take part no more. */
  leave(): void {
    this.leading = false;
    this.#end();
    this.#end = this.seize = () => {};
    this.#channel?.close();
    this.#channel = undefined;
  }
}
