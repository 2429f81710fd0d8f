// A conversation as LLaVA's JSON, with its images beside it, and back.

import { BAD, GOOD, learnable, pairs, said } from "./judging.js";
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

const imagesOf = (messages) => messages.flatMap((m) => m.parts ?? []).flatMap((part) => part.image ?? []);
const jsonFile = (name, ...texts) => ({ name, blob: new Blob(texts.map((text) => `${text}\n`)) });

/** -> a ZIP file of conversation.json and the images; of judged answers also what can be learned from them. */
export function pack({ system, messages }, id) {
  const ids = [...new Set(imagesOf(messages).map((image) => image.id))];
  const nameOf = (image) => `${ids.indexOf(image.id) + 1}${suffixOf(image.name)}`;
  const [learned, compared] = [learnable(messages), pairs(messages)];
  const write = (name, own, turn) => {
    const names = imagesOf(own).map(nameOf);
    const image = names.length && { image: names.length === 1 ? names[0] : names };
    const sample = { id, ...image, ...(system !== null && { system }), conversations: own.map(turn) };
    return jsonFile(name, JSON.stringify([sample], null, 2));
  };
  const files = [write("conversation.json", messages, (message) => ({ ...turnOf(message), ...judgementOf(message) }))];
  if (learned.length) files.push(write("chosen.json", learned, turnOf));
  const seen = compared.some((pair) => imagesOf(pair.messages).length); // TRL takes `images` for a model that sees
  const lines = compared.map((pair) => {
    const images = seen && { images: imagesOf(pair.messages).map(nameOf) };
    return JSON.stringify({ ...images, ...preference(system, pair) });
  });
  if (lines.length) files.push(jsonFile("preferences.jsonl", ...lines));
  const images = new Map(imagesOf(messages).map((image) => [image.id, { name: nameOf(image), blob: image.blob }]));
  return zip([...files, ...images.values()]);
}

/** A message in LLaVA's format. */
function turnOf(message) {
  const { parts } = message;
  return parts ? { from: "human", value: textOf(parts) } : { from: "gpt", value: plain(said(message)) };
}

/** What is thought of an answer, as keys that LLaVA's format does not have. */
function judgementOf({ text, better, rating, model, others }) {
  const also = others?.map((answer) => ({ value: plain(said(answer)), ...judgementOf(answer) }));
  const rejected = better === undefined ? undefined : plain(text);
  return { model, rating, rejected, others: also?.length ? also : undefined };
}

/** A pair as TRL's preference trainers read it. */
function preference(system, { messages, chosen, rejected }) {
  const textPart = (text) => ({ type: "text", text: plain(text) });
  const answer = (text) => ({ role: ASSISTANT, content: [textPart(text)] });
  const question = ({ role, parts }) => {
    return { role, content: parts.map(({ image, text }) => (image ? { type: "image" } : textPart(text))) };
  };
  const prompt = system ? [{ role: SYSTEM, content: [textPart(system)] }] : [];
  prompt.push(...messages.map((message) => (message.parts ? question(message) : answer(said(message)))));
  return { prompt, chosen: [answer(chosen)], rejected: [answer(rejected)] };
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
  const read = (turn) => ({ role: ROLES[turn?.from ?? turn?.role], text: turn?.value ?? turn?.content, judged: turn });
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
  const message = ({ role, text, judged }) => {
    return role === USER ? { role, parts: split(text, placed) } : { role, ...answerOf(text, judged) };
  };
  return { system, messages: turns.map(message) };
}

/** An answer with what is thought of it. Throws Error. */
function answerOf(text, { model, rating, rejected, others }) {
  const isText = (value) => typeof (value ?? "") === "string";
  if (![undefined, null, GOOD, BAD].includes(rating)) throw new Error(`\`rating\` is neither ${GOOD} nor ${BAD}`);
  if (![text, model, rejected].every(isText)) throw new Error("`value`, `model` or `rejected` of an answer is no text");
  const several = others ?? [];
  if (!Array.isArray(several) || several.some((other) => other?.value == null)) {
    throw new Error("`others` of an answer is no list of answers");
  }
  const also = several.map((other) => answerOf(other.value, { ...other, others: null }));
  const given = { rating: rating ?? undefined, model: model ?? undefined, others: also };
  return rejected == null ? { text, ...given } : { text: rejected, better: text, ...given };
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
