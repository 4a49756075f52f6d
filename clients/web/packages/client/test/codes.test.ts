import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { dutyOf } from "../src/index.ts";

/** The repository, seen from clients/web, where the tests run. */
const page = readFileSync("../../docs/reference/websocket.md", "utf8");

test("the duty of each close code is the one that the server's page gives it", () => {
  // tests/unit/test_docs.py holds the page against the codes that the server closes with.
  const rows = [...page.matchAll(/^\| (\d{4}) \|[^|]*\|([^|]*)\|$/gm)].map(([, code, duty]) => [Number(code), duty!.trim()] as const);
  assert.ok(rows.length >= 12, "the table was found");
  let above = "";
  for (const [code, words] of rows) {
    const duty = words === "the same" ? above : words.startsWith("stops") ? "stop" : words.startsWith("gets a new one") ? "renew" : "retry";
    above = duty;
    assert.equal(dutyOf(code), duty, `${code}: ${words}`);
  }
});

test("codes of a newer server are understood by their range; those of the way mean retry", () => {
  assert.deepEqual([4000, 4005, 4099, 4102, 4199, 4299, 1006, 1011].map(dutyOf), ["stop", "stop", "stop", "renew", "renew", "retry", "retry", "retry"]);
});

test("the page has every frame that the client knows", () => {
  for (const file of ["feed", "core", "client", "protocol"]) {
    const source = readFileSync(`packages/client/src/${file}.ts`, "utf8");
    for (const [, name] of source.matchAll(/"([A-Z]{2,}(?:_[A-Z]+)*)"/g)) {
      if (!["GET", "PATCH", "POST", "PUT", "SYNCED"].includes(name!)) assert.ok(page.includes(`\`${name}\``), name);
    }
  }
});
