// The web client, as built, against a running system: `node real_client.mjs WS_URL HTTP_URL TOKEN USER TRANSPORT`.
// One line of JSON per snapshot that differs in what it shows; commands as lines of JSON on stdin.
import { createRequire } from "node:module";
import { createInterface } from "node:readline";
import { CarillonClient } from "../../clients/web/packages/client/dist/index.js";

const require = createRequire(new URL("../../clients/web/package.json", import.meta.url));
const [url, http, token, userId, transport] = process.argv.slice(2);
const client = new CarillonClient({
  url, http, userId, token, deviceId: `node-${transport}`, transports: [transport], env: { WebSocket: require("ws").WebSocket },
  timing: { poll: 200 },
});
const say = (line) => console.log(JSON.stringify(line));
let last = "";
client.subscribe(() => {
  const { items, unreadCount, connection, pending, loaded } = client.getSnapshot();
  const shown = items.map((item) => [item.title, item.read, item.clicked ?? false]);
  const line = JSON.stringify({ items: shown, unreadCount, state: connection.state, pending, loaded });
  if (line !== last) console.log((last = line));
});
client.on("notification", (note) => say({ notification: note.title }));
client.on("error", (error) => say({ error: error.code }));
client.connect();

createInterface({ input: process.stdin }).on("line", (line) => {
  const { do: what, title } = JSON.parse(line);
  const id = client.getSnapshot().items.find((item) => item.title === title)?.id;
  if (what === "connect" || what === "disconnect") client[what]();
  else client[what](id ?? title).then(() => say({ done: what }), (error) => say({ failed: error.code }));
}).on("close", () => client.close());
