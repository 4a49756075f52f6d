import assert from "node:assert/strict";
import { test } from "node:test";
import { Election } from "../src/fallback.ts";
import type { ElectionMessage } from "../src/fallback.ts";
import { seeded } from "./model.ts";

/** Tabs whose clock is a number; `asleep` ones neither tick nor hear, as a browser slows hidden tabs down. */
class Browser {
  now = 0;
  tabs: { election: Election; asleep: boolean; missed: ElectionMessage[] }[] = [];

  constructor(readonly random: () => number) {}

  open(): void {
    const name = String(this.tabs.length);
    const election = new Election(name, this.random, (message) => this.tell(name, message), () => {});
    this.tabs.push({ election, asleep: false, missed: [] });
    election.join(this.now);
  }

  tell(from: string, message: ElectionMessage): void {
    this.tabs.forEach((tab, n) => {
      if (String(n) === from) return;
      if (tab.asleep) tab.missed.push(message);
      else tab.election.heard(message, this.now);
    });
  }

  wake(tab: Browser["tabs"][number]): void {
    tab.asleep = false;
    for (const message of tab.missed.splice(0)) tab.election.heard(message, this.now);
  }

  pass(ms: number): void {
    for (const until = this.now + ms; this.now < until; this.now += 10) {
      for (const tab of this.tabs) if (!tab.asleep) tab.election.tick(this.now);
    }
  }

  get leaders(): number {
    return this.tabs.filter((tab) => tab.election.leading && !tab.asleep).length;
  }
}

test("whatever opens, closes and sleeps: after five quiet seconds one tab leads", () => {
  for (let seed = 1; seed <= 200; seed += 1) {
    const random = seeded(seed);
    const browser = new Browser(random);
    browser.open();
    for (let step = 0; step < 30; step += 1) {
      const dice = random();
      const tab = browser.tabs[Math.floor(random() * browser.tabs.length)]!;
      if (dice < 0.25 && browser.tabs.length < 6) browser.open();
      else if (dice < 0.35) tab.election.leave();
      else if (dice < 0.5) tab.asleep = true;
      else if (dice < 0.7) browser.wake(tab);
      browser.pass(Math.floor(random() * 3_000));
    }
    for (const tab of browser.tabs) browser.wake(tab);
    browser.open();
    browser.pass(5_000);
    assert.equal(browser.leaders, 1, `seed ${seed}`);
    const leader = browser.tabs.find((tab) => tab.election.leading)!;
    browser.pass(20_000);
    assert.ok(leader.election.leading, `seed ${seed}: the leader changed without a reason`);
  }
});

test("a leader that resigns is followed within a quarter of a second", () => {
  const browser = new Browser(seeded(1));
  browser.open();
  browser.pass(500);
  browser.open();
  browser.pass(500);
  assert.equal(browser.tabs[0]!.election.leading, true);
  browser.tabs[0]!.election.leave();
  browser.pass(250);
  assert.equal(browser.tabs[1]!.election.leading, true);
});
