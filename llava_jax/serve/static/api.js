// The server, at paths relative to the page: a proxy may serve it under a prefix.

const KEY = "llava_jax.key";
let key = sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY) ?? "";

export class Refusal extends Error {
  constructor(message, { status = 0, param = null, code = null, seconds = null } = {}) {
    super(message);
    Object.assign(this, { status, param, code, seconds });
  }
}

/** Uses a key from now on, and keeps it: in this tab, or in this browser if `remember`. */
export function useKey(text, remember) {
  key = text.trim();
  for (const storage of [sessionStorage, localStorage]) storage.removeItem(KEY);
  (remember ? localStorage : sessionStorage).setItem(KEY, key);
}

/** -> why no answers are given just now, or null. */
export function unready() {
  return request("health", { cache: "no-store" }).then(() => null, (error) => error.message);
}

/** -> the name of the model. Throws Refusal, with status 401 where a key is needed. */
export async function modelName() {
  return (await (await request("v1/models", {})).json()).data[0].id;
}

/** The events of an answer: chunks as OpenAI's API has them. Throws Refusal; AbortError where `signal` says so. */
export async function* chat(body, signal) {
  const headers = { "Content-Type": "application/json" };
  const response = await request("v1/chat/completions", { method: "POST", body, signal, headers });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refusal(chunk.error.message, chunk.error);
    yield chunk;
  }
  throw new Refusal("The connection broke before the answer was complete.");
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { done, value } = await reader.read().catch(unreachable);
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
  }
}

async function request(path, options) {
  if (!/^[!-~]*$/.test(key)) throw new Refusal("A key has only ASCII characters, without spaces.", { status: 401 });
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(new URL(path, document.baseURI), { ...options, headers }).catch(unreachable);
  if (response.ok) return response;
  const { error = {}, status } = await response.json().catch(() => ({}));
  const message = error.message ?? status ?? `The server answered ${response.status} ${response.statusText}.`;
  const seconds = Number(response.headers.get("Retry-After")) || null;
  throw new Refusal(message, { ...error, status: response.status, seconds });
}

function unreachable(error) {
  if (error.name === "AbortError") throw error;
  throw new Refusal("The server cannot be reached: is it running, and is the network up?");
}
