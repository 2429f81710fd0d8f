// A conversation as LLaVA's JSON, with its images beside it, and back.

import { unzip, zip } from "./zip.js";

const MARK = "<image>";
const MAX_JSON_BYTES = 16 << 20;
const ROLES = { human: "user", user: "user", gpt: "assistant", assistant: "assistant", system: "system", developer: "system" };
const TYPES = { jpg: "jpeg", jpeg: "jpeg", png: "png", webp: "webp", gif: "gif", bmp: "bmp", tif: "tiff", tiff: "tiff" };

const suffix = (name) => /\.([a-z0-9]{1,5})$/i.exec(name)?.[1].toLowerCase() ?? "";
const hasSpace = (character) => /^\s/.test(character ?? "");

export const makeImage = (name, blob) => ({ id: crypto.getRandomValues(new Uint32Array(4)).join("-"), name, blob });

/** Text that stands for itself, as the server writes it, too: no image's mark, and no half of a character. */
const plain = (text) => text.toWellFormed().replaceAll(MARK, "< image>");

/** The text of a question, marks included: each part on a line, unless a text has space of its own beside a mark. */
function textOf(parts) {
  const texts = parts.map((part) => (part.image ? MARK : plain(part.text)));
  if (texts.every((text) => text === MARK)) texts.push("");
  return texts.reduce((before, text, i) => {
    const beside = (texts[i - 1] === MARK) !== (text === MARK);
    return before + (beside && (hasSpace(before.at(-1)) || hasSpace(text[0])) ? "" : "\n") + text;
  });
}

/** -> a ZIP file of conversation.json and the images. */
export async function pack({ system, messages }, id) {
  const files = new Map();
  const nameOf = ({ image }) => {
    if (!files.has(image.id)) {
      const type = suffix(image.name);
      files.set(image.id, { name: `${files.size + 1}${type && `.${type}`}`, blob: image.blob });
    }
    return files.get(image.id).name;
  };
  const names = messages.flatMap((m) => m.parts ?? []).flatMap((part) => (part.image ? nameOf(part) : []));
  const sample = {
    id,
    ...(names.length && { image: names.length === 1 ? names[0] : names }),
    ...(system !== null && { system: system.toWellFormed() }),
    conversations: messages.map(({ role, parts, text }) =>
      role === "user" ? { from: "human", value: textOf(parts) } : { from: "gpt", value: plain(text) },
    ),
  };
  const json = new Blob([JSON.stringify([sample], null, 2), "\n"]);
  return zip([{ name: "conversation.json", blob: json }, ...files.values()]);
}

/** The conversation in files that were chosen: a ZIP file, or JSON and its images. Throws Error. */
export async function unpack(files) {
  let entries = new Map(files.map((file) => [file.name, async () => file]));
  const archive = files.find((file) => suffix(file.name) === "zip");
  if (archive) {
    entries = await unzip(archive).catch((error) => Promise.reject(new Error(`${archive.name} ${error.message}`)));
  }
  const jsons = [...entries.keys()].filter((name) => suffix(name) === "json");
  const name = jsons.find((path) => path.split("/").at(-1) === "conversation.json") ?? jsons[0];
  if (!name || (jsons.length > 1 && !name.endsWith("conversation.json"))) throw new Error("There is no conversation.json.");
  const json = await entries.get(name)();
  if (json.size > MAX_JSON_BYTES) throw new Error(`${name} has more than ${MAX_JSON_BYTES >> 20} MiB.`);
  return parse(await json.text(), name, entries);
}

async function parse(text, file, entries) {
  const fault = (what) => new Error(`${file}: ${what}.`);
  let samples;
  try {
    samples = [JSON.parse(text)].flat();
  } catch {
    throw fault("is no JSON");
  }
  if (samples.length !== 1) throw fault(`holds ${samples.length} samples: one conversation was expected`);
  const [sample] = samples;
  const turns = (sample?.conversations ?? sample?.messages)?.map?.((turn) => ({
    role: ROLES[turn?.from ?? turn?.role],
    text: turn?.value ?? turn?.content,
  }));
  if (!turns?.length || turns.some(({ role, text }) => !role || typeof text !== "string")) {
    throw fault("is no conversation of LLaVA: `conversations`, a list of `from` and `value`");
  }
  const first = turns[0].role === "system" ? turns.shift().text : null;
  const system = sample.system ?? sample.system_prompt ?? first;
  if (system !== null && typeof system !== "string") throw fault("`system` is no text");
  if (turns.length % 2 || turns.some(({ role }, i) => role !== (i % 2 ? "assistant" : "user"))) {
    throw fault("questions and answers have to take turns, from a question to an answer");
  }
  const names = [sample.image ?? sample.images ?? []].flat();
  if (names.some((name) => typeof name !== "string")) throw fault("`image` is neither a name nor a list of names");
  const marks = turns.reduce((sum, turn) => sum + turn.text.split(MARK).length - 1, 0);
  if (marks !== names.length) throw fault(`has ${marks} ${MARK} for ${names.length} images`);
  const folder = file.slice(0, file.lastIndexOf("/") + 1);
  const images = new Map();
  for (const name of new Set(names)) {
    const read = entries.get(folder + name) ?? entries.get(name.split("/").at(-1));
    if (!read) throw fault(`names ${name}, which is not here: load the ZIP file, or choose the JSON and its images at once`);
    const base = name.split("/").at(-1);
    const type = `image/${TYPES[suffix(base)] ?? "*"}`;
    images.set(name, makeImage(base, (await read()).slice(0, undefined, type)));
  }
  const placed = names.map((name) => images.get(name));
  const messages = turns.map(({ role, text }) => (role === "user" ? { role, parts: split(text, placed) } : { role, text }));
  if (placed.length) throw fault(`an answer has ${MARK}`);
  return { system, messages };
}

/** The parts of a question. Takes its images from `images`. Line breaks around marks belong to the marks. */
function split(text, images) {
  return text.split(MARK).flatMap((piece, i, pieces) => {
    const words = piece.replace(i ? /^\n/ : "", "").replace(i < pieces.length - 1 ? /\n$/ : "", "");
    return [...(i ? [{ image: images.shift() }] : []), ...(words ? [{ text: words }] : [])];
  });
}
