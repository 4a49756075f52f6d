// Builds the client. Without arguments: dist/ of the package, and what the demo page loads (serve/static). --package:
// only the former. --check: only says whether those committed files are what the sources give, and that they are small.
// --examples: checks the types of the code in the documents. --tests: runs the tests.
import { build } from "esbuild";
import { spawnSync } from "node:child_process";
import { mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { gzipSync } from "node:zlib";
import { minify } from "terser";

const root = new URL(".", import.meta.url);
const path = (relative) => new URL(relative, root).pathname;
const GZIPPED_MAX = 9 * 1024;
/**
 * Entry point -> the file under serve/static, if the demo page loads it. What is not in index is loaded by few: fallback
 * by the client where WebSockets or Web Locks are not to be had, ledger by applications that show desktop notifications,
 * toasts by those that let something pop up.
 */
const BUNDLES = { index: "carillon-client.js", fallback: "fallback.js", ledger: null, toasts: "toasts.js" };
/**
 * Members of Core and Feed, which no application, wire, other tab or other bundle sees: shortened in the minified
 * bundle. A name that is used for anything else must not be here.
 */
const INTERNAL = /^(feed|effects|generation|order|uncertain|unread|counted|finish|restore|queued|closed|attend|wake|tries|refresh|apply|view|tidy|reset|start|stop)$/;
const common = { bundle: true, format: "esm", target: "es2022", legalComments: "none", logLevel: "warning", absWorkingDir: path(".") };

/** The minified module of one entry point, and its source map. */
async function bundle(name) {
  const built = await build({
    ...common, entryPoints: [`packages/client/src/${name}.ts`], external: ["./fallback.js"], write: false,
    mangleProps: name === "index" ? INTERNAL : undefined, minify: true, sourcemap: "external", outdir: "packages/client/dist",
  });
  const [map, script] = ["map", "js"].map((ending) => built.outputFiles.find((file) => file.path.endsWith(ending)).text);
  const { code, map: minifiedMap } = await minify(script, {
    module: true, ecma: 2020, compress: { passes: 3, unsafe_arrows: true, unsafe_methods: true },
    format: { preamble: "// Built by clients/web/build.mjs." }, sourceMap: { content: map },
  });
  const text = `${code}\n`;
  const size = gzipSync(text, { level: 9 }).length;
  console.log(`${name}: ${text.length} bytes, ${size} gzipped`);
  if (size >= GZIPPED_MAX) throw new Error(`${name} has ${size} bytes gzipped, less than ${GZIPPED_MAX} are allowed`);
  return { text, map: minifiedMap };
}

function run(...command) {
  const { status } = spawnSync(process.execPath, command, { cwd: path("."), stdio: "inherit" });
  if (status) process.exit(status);
}

/** Documents whose TypeScript is to be right, and what their examples take for granted. */
const DOCUMENTS = ["packages/client/README.md", "../../docs/how-to/use-the-web-client.md"];
const GIVEN = `
declare const id: string, ids: string[];
declare function render(...shown: unknown[]): void;
declare function draw(...shown: unknown[]): void;
declare function useSyncExternalStore<T>(subscribe: (listener: () => void) => () => void, snapshot: () => T): T;
`;

const [what] = process.argv.slice(2);
if (what === "--tests") {
  const names = readdirSync(path("packages/client/test/")).filter((name) => name.endsWith(".test.ts"));
  const outdir = "packages/client/dist/test";
  await build({ ...common, platform: "node", external: ["ws"], outdir, entryPoints: names.map((name) => `packages/client/test/${name}`) });
  run("--test", "--test-reporter=dot", ...names.map((name) => `${outdir}/${name.replace(".ts", ".js")}`));
} else if (what === "--examples") {
  const folder = path("packages/client/dist/examples/");
  rmSync(folder, { recursive: true, force: true });
  mkdirSync(folder, { recursive: true });
  let count = 0;
  for (const document of DOCUMENTS) {
    for (const [, code] of readFileSync(path(document), "utf8").matchAll(/^```ts\n(.*?)^```$/gms)) {
      const own = code.includes("new CarillonClient") ? "" : 'import { CarillonClient } from "@carillon/client";\ndeclare const client: CarillonClient;\n';
      writeFileSync(`${folder}${(count += 1)}.ts`, `${own}${GIVEN}${code}\nexport {};\n`);
    }
  }
  if (count < 9) throw new Error(`expected at least 9 examples, found ${count}`);
  run("node_modules/typescript/bin/tsc", "-p", "packages/client/tsconfig.examples.json");
} else if (what === "--check") {
  for (const [name, file] of Object.entries(BUNDLES)) {
    const { text } = await bundle(name);
    if (file && readFileSync(path(`../../serve/static/${file}`), "utf8") !== text) {
      throw new Error(`serve/static/${file} is not what the sources give: run \`make web\``);
    }
  }
} else {
  mkdirSync(path("packages/client/dist"), { recursive: true });
  for (const [name, file] of Object.entries(BUNDLES)) {
    const { text, map } = await bundle(name);
    writeFileSync(path(`packages/client/dist/${name}.js`), `${text}//# sourceMappingURL=${name}.js.map\n`);
    writeFileSync(path(`packages/client/dist/${name}.js.map`), map);
    if (file && what !== "--package") writeFileSync(path(`../../serve/static/${file}`), text);
  }
  run("node_modules/typescript/bin/tsc", "-p", "packages/client/tsconfig.types.json");
}
