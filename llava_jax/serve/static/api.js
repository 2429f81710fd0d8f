// The server, at paths relative to the page: a proxy may serve it under a prefix.

import { recall, remember } from "./store.js";

const KEY = "llava_jax.key";
let key = recall(KEY, "sessionStorage") ?? recall(KEY) ?? "";

/** Why the server does not answer. `status` is 0 where it cannot be reached. */
export class Refusal extends Error {
  constructor(message, { status = 0, param = null, code = null, seconds = null } = {}) {
    super(message);
    Object.assign(this, { status, param, code, seconds });
  }
}

/** Uses a key from now on, and keeps it: in this tab, or in this browser if `stays`. */
export function useKey(text, stays) {
  key = text;
  remember(KEY, stays ? null : key, "sessionStorage");
  remember(KEY, stays ? key : null);
}

/** -> why no answers are given just now, or null. */
export const unready = () => request("health", { cache: "no-store" }).then(() => null, (error) => error.message);

/** -> {id, parent} of the base and of its adapters. Throws Refusal, with status 401 where a key is needed. */
export async function models() {
  return (await (await request("v1/models")).json()).data;
}

/** The chunks of an answer, as OpenAI's API has them. Throws Refusal; AbortError where `signal` says so. */
export async function* chat(body, signal) {
  const options = { method: "POST", body, signal, headers: { "Content-Type": "application/json" } };
  const response = await request("v1/chat/completions", options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { done, value } = await reader.read().catch(unreachable);
    if (done) throw new Refusal("The connection broke before the answer was complete.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines.filter((text) => text.startsWith("data:"))) {
      if (line.endsWith(" [DONE]")) return;
      const chunk = JSON.parse(line.slice(5));
      if (chunk.error) throw new Refusal(chunk.error.message, { ...chunk.error, status: 500 });
      yield chunk;
    }
  }
}

async function request(path, options = {}) {
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(new URL(path, document.baseURI), { ...options, headers }).catch(unreachable);
  if (response.ok) return response;
  const { error = {}, status } = await response.json().catch(() => ({})); // /health says `status`
  const message = error.message ?? status ?? `The server answered ${response.status} ${response.statusText}.`;
  throw new Refusal(message, { ...error, status: response.status, seconds: response.headers.get("Retry-After") });
}

function unreachable(error) {
  if (error.name === "AbortError") throw error;
  throw new Refusal("The server cannot be reached.");
}
