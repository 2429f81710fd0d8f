// The format that answers are asked for: text, JSON, JSON of a schema, or one of some choices. And how JSON is shown.

import { recall, remember } from "./store.js";

const $ = (id) => document.getElementById(id);
const KEY = "llava_jax.format";
const MAX_DEPTH = 12; // of the indentation
const state = { kind: "text", schema: "", choices: "", ...JSON.parse(recall(KEY)) };
const linesOf = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);

// The fields of a request that ask for a format. They throw Error that says what is wrong.
const FIELDS = {
  text: () => ({}),
  json: () => ({ response_format: { type: "json_object" } }),
  schema: ({ schema }) => ({
    response_format: { type: "json_schema", json_schema: { name: "answer", schema: parsed(schema) } },
  }),
  choice: ({ choices }) => {
    if (!linesOf(choices).length) throw new Error("Write at least one choice.");
    return { structured_outputs: { choice: linesOf(choices) } };
  },
};

function parsed(schema) {
  let value = null;
  try {
    value = JSON.parse(schema);
  } catch (error) {
    throw new Error(`The schema is no JSON: ${error.message}.`);
  }
  if (Array.isArray(value) || typeof (value ?? 0) !== "object") throw new Error("The schema has to be a JSON object.");
  return value;
}

/** -> the fields of a request that ask for the format. */
export const requested = () => FIELDS[state.kind](state);

/** Whether answers are JSON. */
export const isJson = () => ["json", "schema"].includes(state.kind);

/** Whether a text is a JSON object or list. */
export function looksLikeJson(text) {
  try {
    return /^\s*[{[]/.test(text) && Boolean(JSON.parse(text));
  } catch {
    return false;
  }
}

/** JSON with a line for each value, as Markdown. Texts and numbers stay as they are, and the end may be missing. */
export function asCode(json) {
  let depth = 0;
  const line = () => `\n${"  ".repeat(Math.min(depth, MAX_DEPTH))}`;
  const laid = json.replace(/"(?:[^"\\]|\\.)*"?|[[{]\s*[\]}]|[[{\]},:]|\s+/gs, (token) => {
    if (token[0] === '"') return token;
    if (/^[[{].*[\]}]$/s.test(token)) return token[0] + token.at(-1);
    const [opens, closes] = ["[{".includes(token), "]}".includes(token)];
    depth = Math.max(0, depth + opens - closes);
    if (closes) return line() + token;
    return opens || token === "," ? token + line() : token === ":" ? ": " : "";
  });
  return `\`\`\`json\n${laid}\n\`\`\``;
}

function show() {
  const name = state.kind === "text" ? "" : $("kind").querySelector(`[value=${state.kind}]`).textContent;
  const label = `Format of the answers${name && `: ${name}`}`;
  Object.assign($("open-format"), { ariaLabel: label, title: label });
  $("shape").textContent = name;
}

function choose() {
  $("schema").parentElement.hidden = $("kind").value !== "schema";
  $("choices").parentElement.hidden = $("kind").value !== "choice";
  $("format").querySelector("[role=alert]").textContent = "";
}

$("open-format").onclick = () => {
  for (const [name, value] of Object.entries(state)) $(name).value = value;
  choose();
  $("format").showModal();
};
$("kind").onchange = choose;
$("format").querySelector("form").onsubmit = (event) => {
  const wanted = Object.fromEntries(Object.keys(state).map((name) => [name, $(name).value.toWellFormed()]));
  try {
    FIELDS[wanted.kind](wanted);
  } catch (error) {
    event.preventDefault();
    $("format").querySelector("[role=alert]").textContent = error.message;
    return;
  }
  Object.assign(state, wanted);
  remember(KEY, JSON.stringify(state));
  show();
};
show();
