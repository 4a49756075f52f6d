/** Carillon's doors in one process, with everything a test wants to go wrong: WebSocket, /api, stream, long poll. */

import { createServer } from "node:http";
import type { IncomingMessage, Server, ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { WebSocketServer } from "ws";
import type { WebSocket } from "ws";
import type { ClientFrame, Op, Position, Presentation, ServerFrame } from "../src/protocol.ts";
import { Model } from "./model.ts";

type Write = (frame: ServerFrame) => void;

export class FakeServer {
  model = new Model();
  token = "t1";
  heartbeatMs = 25_000;
  /** What is switched off. */
  refuse = { websocket: false, sse: false, wait: false, preferences: false };
  /** Notifications in an answer of /api/sync. */
  syncLimit = 200;
  /** Takes PING and says nothing. */
  deaf = false;
  /** Answers changes with this. */
  refusal: { code: string; temporary: boolean; status: number } | null = null;
  /** Told behind each WELCOME. */
  presentation: Presentation | null = null;
  /** The user's own preferences. */
  own: Record<string, unknown> = {};
  version = 0;
  frames: ClientFrame[] = [];
  requests: string[] = [];
  bodies: [path: string, body: Record<string, unknown>][] = [];
  urls: string[] = [];
  queries: string[] = [];
  sockets = new Set<WebSocket>();
  streams = new Set<ServerResponse>();
  #writers = new Set<Write>();
  #waiting = new Set<() => void>();
  #http: Server;

  private constructor() {
    this.model.told = (frame) => {
      for (const write of this.#writers) write(frame);
      for (const wake of this.#waiting) wake();
    };
    this.#http = createServer((request, response) => void this.#answer(request, response));
    const server = new WebSocketServer({ noServer: true, handleProtocols: () => "carillon.v1.json" });
    this.#http.on("upgrade", (request, socket, head) => {
      this.urls.push(request.url!);
      if (this.refuse.websocket) socket.destroy();
      else server.handleUpgrade(request, socket, head, (ws) => this.#socket(ws, new URL(request.url!, "http://x")));
    });
  }

  static async start(): Promise<FakeServer> {
    const fake = new FakeServer();
    await new Promise<void>((resolve) => fake.#http.listen(0, "127.0.0.1", resolve));
    return fake;
  }

  get http(): string {
    return `http://127.0.0.1:${(this.#http.address() as AddressInfo).port}`;
  }

  get ws(): string {
    return `${this.http.replace("http", "ws")}/ws`;
  }

  /** Close every connection with a code (a stream tells it in its last event, if it is one of Carillon's). */
  cut(code: number): void {
    for (const socket of this.sockets) socket.close(code);
    for (const stream of this.streams) stream.end(code < 4000 ? "" : `event: close\ndata: ${JSON.stringify({ type: "CLOSE", code, reason: "" })}\n\n`);
  }

  async stop(): Promise<void> {
    for (const socket of this.sockets) socket.terminate();
    for (const wake of this.#waiting) wake();
    this.#http.closeAllConnections();
    await new Promise((resolve) => this.#http.close(resolve));
  }

  /** Attach a writer at a position, as the session does. */
  #attach(position: Position | null, write: Write): void {
    const known = !!position && this.model.knows(position);
    write({ ...this.model.welcome(position && known), heartbeatMs: this.heartbeatMs } as ServerFrame);
    if (this.presentation) write({ type: "PRESENTATION", ...this.presentation });
    if (position && known) this.model.replay(position).forEach(write);
    this.#writers.add(write);
  }

  #socket(socket: WebSocket, url: URL): void {
    const write: Write = (frame) => socket.send(JSON.stringify(frame));
    const query = url.searchParams;
    const epoch = query.get("epoch");
    const position = epoch === null ? null : { epoch, lastSeq: Number(query.get("lastSeq")), lastRev: Number(query.get("lastRev")) };
    let authenticated = false;
    this.sockets.add(socket);
    socket.on("close", () => {
      this.sockets.delete(socket);
      this.#writers.delete(write);
    });
    socket.on("message", (data) => {
      const frame = JSON.parse(String(data)) as ClientFrame;
      this.frames.push(frame);
      if (!authenticated) {
        if (frame.type !== "AUTH") socket.close(4001, "expected AUTH");
        else if (frame.token !== this.token) socket.close(4101, "the token has expired");
        else {
          authenticated = true;
          this.#attach(position, write);
        }
      } else if (frame.type === "PING") {
        if (!this.deaf) write({ type: "PONG" });
      } else if ("id" in frame && frame.type !== "WATCH_PRESENCE") {
        const error = this.#change(frame);
        write(error ? { type: "ERROR", message: "no", ...error, id: frame.id } : { type: "OK", id: frame.id });
      } else if (frame.type === "WATCH_PRESENCE") {
        for (const userId of frame.userIds) write({ type: "PRESENCE", userId, status: "active", lastSeenAt: null });
      }
    });
  }

  #change(op: Op): { code: string; temporary: boolean; status: number } | null {
    if (this.refusal) return this.refusal;
    try {
      this.model.change(op);
      return null;
    } catch {
      return { code: "not_found", temporary: false, status: 404 };
    }
  }

  async #answer(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const url = new URL(request.url!, this.http);
    const path = url.pathname;
    this.requests.push(`${request.method} ${path}`);
    this.queries.push(url.search);
    const json = (status: number, body: unknown) => {
      response.writeHead(status, { "Content-Type": "application/json" });
      response.end(JSON.stringify(body));
    };
    const problem = (status: number, code: string, temporary = false) => json(status, { code, detail: `${code}!`, temporary });
    const chunks: Buffer[] = [];
    for await (const chunk of request) chunks.push(chunk as Buffer);
    const body = JSON.parse(String(Buffer.concat(chunks)) || "{}") as Record<string, never>;
    if (request.method === "POST") this.bodies.push([path, body]);
    if (request.headers.authorization !== `Bearer ${this.token}`) return problem(401, "token_expired");
    if (path === "/api/notifications") {
      return json(200, this.model.page(Number(url.searchParams.get("limit")), url.searchParams.get("cursor")));
    }
    if (path === "/api/notifications/unread-count") return json(200, { count: this.model.unread, rev: this.model.rev });
    if (path === "/api/notifications/preferences") {
      if (this.refuse.preferences) return problem(503, "unavailable", true);
      const match = request.headers["if-match"];
      if (match !== undefined && match !== `"${this.version}"`) return problem(412, "version_conflict");
      if (request.method === "PATCH") {
        this.version += 1;
        Object.assign(this.own, body);
      }
      response.setHeader("ETag", `"${this.version}"`);
      return json(200, url.searchParams.get("view") === "own" ? this.own : { channels: {}, sound: true, vibration: true, ...this.own });
    }
    if (path === "/api/stream" && !this.refuse.sse) return this.#stream(request, response);
    if (path === "/api/sync") return this.#sync(url, json, problem);
    if (path === "/api/ack" || path === "/api/visibility") return json(200, { success: true });
    const [, , , id, verb] = path.split("/");
    const types = { read: "MARK_READ", seen: "MARK_SEEN", "read-all": "MARK_ALL_READ", archive: "ARCHIVE", dismiss: "DISMISS", click: "CLICK" };
    const type = types[(verb ?? id) as "read"];
    if (!type) return problem(404, "not_found");
    const error = this.#change({ type, id: "", ...(verb && { notificationId: id }), ...body } as unknown as Op);
    if (error) return problem(error.status, error.code, error.temporary);
    return json(200, { success: true });
  }

  #stream(request: IncomingMessage, response: ServerResponse): void {
    response.writeHead(200, { "Content-Type": "text/event-stream" });
    const write: Write = (frame) => {
      const text = `id: ${this.model.epoch}:${this.model.seq}:${this.model.rev}\nevent: message\ndata: ${JSON.stringify(frame)}\n\n`;
      // In two pieces, as a network may cut it.
      response.write(text.slice(0, 20));
      response.write(text.slice(20));
    };
    response.write(": hello\n\n");
    const [, epoch, lastSeq, lastRev] = /^(.*):(\d+):(\d+)$/.exec(String(request.headers["last-event-id"] ?? "")) ?? [];
    this.#attach(epoch === undefined ? null : { epoch, lastSeq: Number(lastSeq), lastRev: Number(lastRev) }, write);
    this.streams.add(response);
    response.on("close", () => {
      this.streams.delete(response);
      this.#writers.delete(write);
    });
  }

  async #sync(url: URL, json: (status: number, body: unknown) => void, problem: (status: number, code: string) => void): Promise<void> {
    const query = url.searchParams;
    const waitS = Number(query.get("waitS") ?? 0);
    if (waitS && this.refuse.wait) return problem(404, "not_found");
    const position = { epoch: query.get("epoch") ?? this.model.epoch, lastSeq: Number(query.get("since")), lastRev: Number(query.get("rev") ?? this.model.rev) };
    if (waitS && this.model.knows(position) && position.lastSeq === this.model.seq && position.lastRev === this.model.rev) {
      await new Promise<void>((resolve) => {
        const timer = setTimeout(resolve, waitS * 1000);
        const wake = () => {
          clearTimeout(timer);
          this.#waiting.delete(wake);
          resolve();
        };
        this.#waiting.add(wake);
      });
    }
    const { epoch, seq: lastSeq, rev, unread: unreadCount } = this.model;
    const recovered = this.model.knows(position);
    const missed = recovered ? this.model.missed(position) : [];
    const notifications = missed.slice(0, this.syncLimit);
    if (notifications.length < missed.length) {
      return json(200, { epoch, lastSeq: notifications.at(-1)!.seq, rev: position.lastRev, unreadCount, recovered, notifications, changes: [], more: true });
    }
    json(200, { epoch, lastSeq, rev, unreadCount, recovered, notifications, changes: recovered ? this.model.changes(position) : [], more: false });
  }
}

/** Poll until it is true. */
export async function eventually(what: string, is: () => unknown, timeoutMs = 20_000): Promise<void> {
  const deadline = Date.now() + timeoutMs;
  while (!is()) {
    if (Date.now() > deadline) throw new Error(`not within ${timeoutMs} ms: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}
