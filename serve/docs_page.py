"""GET /docs: one self-contained page that renders /openapi.json. Nothing is loaded from elsewhere."""

from __future__ import annotations

from typing import Final

DOCS_HTML: Final = b"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>Carillon HTTP API</title>
<style>
:root{color-scheme:light dark;--line:#8884;--soft:#8881}
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
h2{margin-top:2.5rem;border-bottom:1px solid var(--line)}
details{border:1px solid var(--line);border-radius:6px;margin:.5rem 0}
summary{padding:.5rem .8rem;cursor:pointer;display:flex;gap:.8rem;align-items:baseline;flex-wrap:wrap}
summary b{font:600 .8rem ui-monospace,monospace;min-width:4rem}
summary code{font-size:.95rem}
summary span{opacity:.75}
.in{padding:0 .9rem .9rem}
pre{background:var(--soft);padding:.7rem;border-radius:6px;overflow:auto;font-size:.85rem}
table{border-collapse:collapse;width:100%}
td,th{border-bottom:1px solid var(--line);padding:.25rem .5rem;text-align:left;vertical-align:top}
</style></head><body>
<h1>Carillon HTTP API</h1><p id="about">Loading <a href="openapi.json">openapi.json</a> ...</p>
<main id="main"></main>
<script>
"use strict";
function el(tag, text, cls) {
  const e = document.createElement(tag);
  if (text !== undefined) e.textContent = text;
  if (cls) e.className = cls;
  return e;
}
function table(head, rows) {
  const t = el("table"), h = el("tr");
  head.forEach(x => h.append(el("th", x)));
  t.append(h);
  rows.forEach(r => { const tr = el("tr"); r.forEach(x => tr.append(el("td", x))); t.append(tr); });
  return t;
}
function part(box, title, value) {
  if (value === undefined) return;
  box.append(el("h4", title), el("pre", typeof value === "string" ? value : JSON.stringify(value, null, 2)));
}
function inline(doc, schema, depth) {
  if (!schema || typeof schema !== "object" || depth > 6) return schema;
  if (schema.$ref) return inline(doc, doc.components.schemas[schema.$ref.split("/").pop()], depth + 1);
  if (Array.isArray(schema)) return schema.map(x => inline(doc, x, depth + 1));
  const out = {};
  for (const k in schema) out[k] = inline(doc, schema[k], depth + 1);
  return out;
}
fetch("openapi.json").then(r => r.json()).then(doc => {
  document.getElementById("about").textContent = doc.info.description;
  const main = document.getElementById("main");
  doc.tags.forEach(tag => {
    main.append(el("h2", tag.name), el("p", tag.description));
    for (const path in doc.paths) for (const method in doc.paths[path]) {
      const op = doc.paths[path][method];
      if (op.tags[0] !== tag.name) continue;
      const d = el("details"), s = el("summary"), box = el("div", undefined, "in");
      s.append(el("b", method.toUpperCase()), el("code", path), el("span", op.summary));
      d.append(s, box);
      main.append(d);
      d.addEventListener("toggle", () => {
        if (box.childNodes.length) return;
        if (op.description) box.append(el("p", op.description));
        box.append(el("p", "Login: " + (op.security ? Object.keys(op.security[0])[0] : "none")));
        if (op.parameters.length) box.append(el("h4", "Parameters"), table(["name", "in", "schema", ""],
          op.parameters.map(p => [p.name, p.in, JSON.stringify(p.schema), p.description || ""])));
        if (op.requestBody) {
          const c = op.requestBody.content["application/json"];
          part(box, "Body: example", c.example);
          part(box, "Body: schema", inline(doc, c.schema, 0));
        }
        box.append(el("h4", "Answers"), table(["status", ""],
          Object.keys(op.responses).map(k => [k, op.responses[k].description])));
        for (const k in op.responses) for (const t in op.responses[k].content) {
          if (k < "300") part(box, k + ": example", op.responses[k].content[t].example);
        }
      }, {once: false});
    }
  });
}).catch(e => { document.getElementById("about").textContent = "openapi.json cannot be read: " + e; });
</script></body></html>
"""
