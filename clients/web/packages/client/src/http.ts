/** Calls to /api with the user's token; problem documents become errors. */

import { CarillonError } from "./protocol.ts";

/** @param refresh the last token was refused: a kept one will not do. @returns null: there is none any more. */
export type GetToken = (refresh: boolean) => Promise<string>;

export interface Http {
  (method: string, path: string, body?: unknown, more?: { signal?: AbortSignal; headers?: Record<string, string> }): Promise<Response>;
}

/** @param base origin of the ingress, without a slash at the end; "" is the page's own. */
export function httpClient(base: string, fetch: typeof globalThis.fetch, token: GetToken): Http {
  return async (method, path, body, more) => {
    for (let again = false; ; again = true) {
      const headers: Record<string, string> = { Authorization: `Bearer ${await token(again)}`, ...more?.headers };
      if (body) headers["Content-Type"] = "application/json";
      const init = { ...more, method, headers, body: body ? JSON.stringify(body) : undefined };
      const response = await fetch(base + path, init).catch((error) => {
        throw new CarillonError("network", String(error), true);
      });
      if (response.ok) return response;
      const problem = (await response.json().catch(() => ({}))) as Partial<Record<"code" | "detail" | "title", string>> & { temporary?: boolean };
      if (response.status === 401 && !again) continue;
      throw new CarillonError(
        problem.code ?? `http_${response.status}`,
        problem.detail ?? problem.title ?? `HTTP ${response.status}`,
        problem.temporary ?? response.status >= 500,
        response.status,
      );
    }
  };
}
