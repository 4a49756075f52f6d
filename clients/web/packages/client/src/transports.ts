/**
 * What a transport is, and the WebSocket. Thin: a transport hands over frames and says how it ended; what follows from
 * them is decided in core.ts. The other two are in fallback.ts, which is loaded when it is needed.
 */

import type { Http } from "./http.ts";
import { CarillonError } from "./protocol.ts";
import type { ClientFrame, Position, ServerFrame } from "./protocol.ts";
import type { Timing } from "./core.ts";

/** A connection, open or on its way. After `close` it calls nothing any more. */
export interface Wire {
  send(frame: ClientFrame): void;
  close(): void;
}

export interface Dial {
  /** Of the WebSocket. */
  url: string;
  token: string;
  deviceId: string;
  position: Position | null;
  http: Http;
  timing: Timing;
  WebSocket: typeof WebSocket | undefined;
  onFrame(frame: ServerFrame): void;
  onClose(code: number, reason: string): void;
}

/** Position in the URL, token in the first frame: URLs are logged by what stands between. */
export function websocket(dial: Dial): Wire {
  const { WebSocket, position, token, deviceId } = dial;
  if (!WebSocket) throw new CarillonError("network", "no WebSocket");
  const url = new URL(dial.url, globalThis.location?.href);
  for (const [name, value] of Object.entries(position ?? {})) url.searchParams.set(name, String(value));
  const socket = new WebSocket(url, ["carillon.v1.json"]);
  let over = false;
  socket.onopen = () => wire.send({ type: "AUTH", token, deviceId });
  socket.onmessage = (event) => {
    if (over) return;
    let frame;
    try {
      frame = JSON.parse(event.data as string) as ServerFrame;
    } catch {
      return dial.onClose(1007, "not JSON");
    }
    dial.onFrame(frame);
  };
  socket.onerror = () => {}; // close follows; Node's `ws` throws what nobody listens to
  socket.onclose = (event) => {
    if (!over) dial.onClose(event.code, event.reason);
  };
  const wire = {
    send: (frame: ClientFrame) => {
      if (!over && socket.readyState === 1) socket.send(JSON.stringify(frame));
    },
    close: () => {
      over = true;
      socket.close(1000);
    },
  };
  return wire;
}
