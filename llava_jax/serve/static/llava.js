// A conversation as LLaVA's JSON, with its images beside it, and back.

import { unzip, zip } from "./zip.js";

const MARK = "<image>";
const MAX_JSON_BYTES = 16 << 20;
const [USER, ASSISTANT, SYSTEM] = ["user", "assistant", "system"];
const ROLES = { human: USER, user: USER, gpt: ASSISTANT, assistant: ASSISTANT, system: SYSTEM, developer: SYSTEM };

const baseOf = (path) => path.split("/").at(-1);
const suffixOf = (name) => /\.[a-z0-9]{1,5}$/i.exec(name)?.[0].toLowerCase() ?? "";

export const makeImage = (name, blob) => ({ id: crypto.getRandomValues(new Uint32Array(4)).join("-"), name, blob });

/** Text that stands for itself, as the server writes it, too: no image's mark, and no half of a character. */
const plain = (text) => text.toWellFormed().replaceAll(MARK, "< image>");

/** The text of a question, marks included: each part on a line, unless a text has space of its own beside a mark. */
function textOf(parts) {
  const texts = parts.map((part) => (part.image ? MARK : plain(part.text)));
  if (texts.every((text) => text === MARK)) texts.push("");
  return texts.reduce((before, text, i) => {
    const beside = (texts[i - 1] === MARK) !== (text === MARK);
    return before + (beside && (/\s$/.test(before.slice(-1)) || /^\s/.test(text)) ? "" : "\n") + text;
  });
}

/** -> a ZIP file of conversation.json and the images. */
export function pack({ system, messages }, id) {
  const images = messages.flatMap((m) => m.parts ?? []).flatMap((part) => part.image ?? []);
  const ids = [...new Set(images.map((image) => image.id))];
  const nameOf = (image) => `${ids.indexOf(image.id) + 1}${suffixOf(image.name)}`;
  const names = images.map(nameOf);
  const sample = {
    id,
    ...(names.length && { image: names.length === 1 ? names[0] : names }),
    ...(system !== null && { system }),
    conversations: messages.map(({ parts, text }) =>
      parts ? { from: "human", value: textOf(parts) } : { from: "gpt", value: plain(text) },
    ),
  };
  const json = { name: "conversation.json", blob: new Blob([JSON.stringify([sample], null, 2), "\n"]) };
  const files = new Map(images.map((image) => [image.id, { name: nameOf(image), blob: image.blob }]));
  return zip([json, ...files.values()]);
}

/** The conversation in files that were chosen: a ZIP file, or JSON and its images. Throws Error. */
export async function unpack(files) {
  const archive = files.find((file) => suffixOf(file.name) === ".zip");
  let entries = new Map(files.map((file) => [file.name, async () => file]));
  try {
    if (archive) entries = await unzip(archive);
    const jsons = [...entries.keys()].filter((name) => suffixOf(name) === ".json");
    const name = jsons.find((path) => baseOf(path) === "conversation.json") ?? jsons[0];
    if (!name) throw new Error("has no conversation.json in it");
    const json = await entries.get(name)();
    if (json.size > MAX_JSON_BYTES) throw new Error(`${name} has more than ${MAX_JSON_BYTES >> 20} MiB`);
    return await parse(await json.text(), name.slice(0, -baseOf(name).length), entries);
  } catch (error) {
    throw new Error(`${(archive ?? files.find((file) => suffixOf(file.name) === ".json")).name}: ${error.message}.`);
  }
}

async function parse(text, folder, entries) {
  let samples;
  try {
    samples = [JSON.parse(text)].flat();
  } catch {
    throw new Error("is no JSON");
  }
  const [sample] = samples;
  if (samples.length !== 1) throw new Error(`holds ${samples.length} samples: one conversation was expected`);
  const read = (turn) => ({ role: ROLES[turn?.from ?? turn?.role], text: turn?.value ?? turn?.content });
  const turns = [sample?.conversations ?? sample?.messages ?? []].flat().map(read);
  if (!turns.length || turns.some(({ role, text }) => !role || typeof text !== "string")) {
    throw new Error("is no conversation of LLaVA: `conversations`, a list of `from` and `value`");
  }
  const first = turns[0].role === SYSTEM ? turns.shift().text : null;
  const system = sample.system ?? sample.system_prompt ?? first;
  if (system !== null && typeof system !== "string") throw new Error("`system` is no text");
  if (turns.length % 2 || turns.some(({ role }, i) => role !== (i % 2 ? ASSISTANT : USER))) {
    throw new Error("questions and answers have to take turns, from a question to an answer");
  }
  const names = [sample.image ?? sample.images ?? []].flat();
  if (names.some((name) => typeof name !== "string")) throw new Error("`image` is neither a name nor a list of names");
  if (turns.some(({ text }, i) => i % 2 && text.includes(MARK))) throw new Error(`an answer has ${MARK}`);
  const marks = turns.reduce((sum, turn) => sum + turn.text.split(MARK).length - 1, 0);
  if (marks !== names.length) throw new Error(`has ${marks} ${MARK} for ${names.length} images`);
  const images = new Map();
  for (const name of new Set(names)) {
    const file = entries.get(folder + name) ?? entries.get(baseOf(name));
    if (!file) throw new Error(`names ${name}, which is not here: load the ZIP file, or JSON and images at once`);
    const type = `image/${suffixOf(name).slice(1).replace(/^jpg$/, "jpeg").replace(/^tif$/, "tiff")}`;
    images.set(name, makeImage(baseOf(name), new Blob([await file()], { type })));
  }
  const placed = names.map((name) => images.get(name));
  const message = ({ role, text }) => (role === USER ? { role, parts: split(text, placed) } : { role, text });
  return { system, messages: turns.map(message) };
}

/** The parts of a question: an `<image>` of the text is the place of an image, and further images come before it. */
export function place(text, images) {
  const others = images.length - text.split(MARK).length + 1;
  if (others < 0) return [...images.map((image) => ({ image })), { text }]; // marks of nothing are text
  return split(MARK.repeat(others) + (text.trim() ? text : ""), [...images]);
}

/** The text of a question as it was typed. */
export function typed(parts) {
  const inText = parts.some((part, i) => part.image && parts[i - 1]?.text !== undefined);
  return inText ? textOf(parts) : parts.flatMap((part) => part.text ?? []).join("\n");
}

/** The parts of a question, which takes its images from `images`. A line break beside a mark belongs to the mark. */
function split(text, images) {
  return text.split(MARK).flatMap((piece, i, { length }) => {
    const words = piece.replace(i ? /^\n/ : "", "").replace(i < length - 1 ? /\n$/ : "", "");
    return [...(i ? [{ image: images.shift() }] : []), ...(words ? [{ text: words }] : [])];
  });
}
