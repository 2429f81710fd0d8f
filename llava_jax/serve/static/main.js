// The page: what is asked, what is shown and kept, and what each control does.

import { chat, models, unready, useKey } from "./api.js";
import * as formats from "./formats.js";
import { asOther, isJudged, said, unpaired } from "./judging.js";
import { makeImage, pack, place, typed, unpack } from "./llava.js";
import { Growing, element } from "./markdown.js";
import * as store from "./store.js";
import { articleOf, forget, picture, shown, urlOf } from "./view.js";

const $ = (id) => document.getElementById(id);
const MAX_BODY = Number(document.querySelector("meta[name=max-body-bytes]").content);
const IMAGE_NAMES = /\.(jpe?g|png|webp|gif|bmp|tiff?|p[bgnp]m)$/i;
const PAIRS = "write a better text for it, or retry and judge the other answer, too";
const megabytes = (bytes) => `${(bytes / 2 ** 20).toFixed(1)} MB`;
const textOf = (message) => message.parts?.flatMap((part) => part.text ?? []).join("\n") ?? said(message);
const imagesOf = ({ parts }) => parts.flatMap((part) => part.image ?? []);

const kept = JSON.parse(store.recall("llava_jax.sampling"));
const sampling = { temperature: 0.2, top_p: 0.7, longest: 512, ...kept };
let conversation = { system: null, messages: [] }; // an empty system prompt means none, null the model's own
let attached = []; // images of the next question
let editing = null; // number of the message that the next question replaces, with all after it
let busy = null; // AbortController of the answer that is coming
let model = null; // its name, while the server is ready
let wanted = store.recall("llava_jax.model"); // the one that was chosen
let connecting = false;
let saving = 0; // a timer
let unfinished = 0; // calls of `save` that have not finished

/** Waits until the server is ready and knows the key. */
async function connect(keyWasWrong = false) {
  if (connecting) return;
  [connecting, model] = [true, null];
  for (let reason; (reason = await unready()); await new Promise((resolve) => setTimeout(resolve, 1500))) {
    tell($("state"), `Waiting: ${reason.split(": try again")[0]} (this page continues by itself)`);
  }
  try {
    offer(await models());
    tell($("state"), "");
  } catch (error) {
    tell($("state"), error.message);
    $("key").querySelector("[role=alert]").textContent = keyWasWrong ? "The server does not know this key." : "";
    if (error.status === 401) $("key").showModal();
  }
  connecting = false;
}

/** Shows a choice of the models where there are several, and uses the chosen one, or the first. */
function offer(cards) {
  const names = cards.map(({ id }) => id);
  const gone = model !== null && !names.includes(model) ? model : null;
  if (String(names) !== String([...$("models").options].map(({ value }) => value))) {
    const options = (some) => some.map(({ id }) => element("option", { value: id }, id));
    const adapters = options(cards.filter(({ parent }) => parent));
    const group = adapters.length ? [element("optgroup", { label: "Adapters" }, adapters)] : [];
    $("models").replaceChildren(...options(cards.filter(({ parent }) => !parent)), ...group);
    [$("model").hidden, $("models").hidden] = [names.length > 1, names.length < 2];
  }
  use(names.includes(wanted) ? wanted : names[0]);
  if (gone) complain(`${gone} is not served any more: ${model} answers now.`);
}

function use(name) {
  [model, $("model").textContent, $("models").value] = [name, name, name];
  document.title = `${model} · LLaVA`;
}

/** Adapters may have been loaded or unloaded meanwhile. */
function refresh() {
  if (model === null || connecting) return;
  models().then((cards) => model !== null && offer(cards), () => {}); // the next question says what is wrong
}

/** Asks a question after the messages of `head`. What cannot be answered at all is undone, and `giveBack` called. */
async function ask(head, question, giveBack = () => {}, others = []) {
  const [before, control, begun] = [conversation.messages, new AbortController(), performance.now()];
  const several = $("models").options.length > 1;
  const reply = { role: "assistant", text: "", partial: true, json: formats.isJson(), others };
  if (several) reply.model = model;
  const mine = (conversation.messages = [...head, question, reply]);
  busy = control;
  draw();
  scrollTo(0, document.documentElement.scrollHeight);
  save();
  const paint = painter(reply);
  try {
    for await (const { choices, usage } of chunks(await requestFor([...head, question]), control.signal)) {
      if (usage) reply.figures = figures(usage.completion_tokens, (performance.now() - begun) / 1000);
      if (choices[0]?.finish_reason === "length") reply.note = "The answer was cut at its longest length.";
      if (!choices[0]?.delta.content) continue;
      reply.text += choices[0].delta.content;
      paint();
      saving ||= setTimeout(save, 400);
    }
  } catch (error) {
    const reason = control.signal.aborted ? "" : explain(error, [...head, question]);
    if (reply.text) reply.note = reason;
    else mine.splice(-2);
    if (!reply.text && conversation.messages === mine) {
      conversation.messages = before;
      giveBack();
      if (reason) complain(reason);
    }
    if ([0, 401, 404, 503].includes(error.status)) connect(); // 404: the model was unloaded
  }
  delete reply.partial;
  forget(reply);
  if (busy === control) busy = null;
  if (several) refresh();
  if (conversation.messages === mine) $("spoken").textContent = `Answer: ${reply.text} ${reply.note ?? ""}`;
  draw();
  save();
}

function figures(tokens, seconds) {
  return `${tokens} tokens in ${seconds.toFixed(1)} s · ${(tokens / seconds).toFixed(1)} tokens/s`;
}

/** The chunks of an answer, which may be as long as the context has room for, if that is less than what was wanted. */
async function* chunks(request, signal) {
  const body = JSON.stringify(request);
  const size = new Blob([body]).size;
  if (size > MAX_BODY) {
    const way = "remove images, or begin a new conversation";
    throw new Error(`With its images this is ${megabytes(size)}, and the server takes ${megabytes(MAX_BODY)}: ${way}.`);
  }
  try {
    yield* chat(body, signal);
  } catch (error) {
    if (error.code !== "context_length_exceeded" || !request.max_completion_tokens) throw error;
    yield* chat(JSON.stringify({ ...request, max_completion_tokens: undefined }), signal);
  }
}

async function requestFor(messages) {
  const { temperature, top_p, longest } = sampling;
  const read = (blob) => new Promise((onload) => Object.assign(new FileReader(), { onload }).readAsDataURL(blob));
  const write = async ({ image, text }) =>
    image ? { type: "image_url", image_url: { url: (await read(image.blob)).target.result } } : { type: "text", text };
  const written = conversation.system === null ? [] : [{ role: "system", content: conversation.system }];
  for (const message of messages) {
    const { role, parts } = message;
    written.push({ role, content: parts ? await Promise.all(parts.map(write)) : said(message) });
  }
  const options = { ...formats.requested(), temperature, top_p, ...(longest && { max_completion_tokens: longest }) };
  return { model, messages: written, stream: true, stream_options: { include_usage: true }, ...options };
}

/** The reason for a refusal, with the name of the image that it is about. */
function explain({ message, param, seconds }, messages) {
  const [, i, j] = /^messages\.(\d+)\.content\.(\d+)/.exec(param ?? "") ?? [];
  const name = messages[i - (conversation.system !== null)]?.parts?.[j]?.image?.name;
  const reason = message.replace(param ? `${param}: ` : "", name ? `${name}: ` : "");
  return seconds ? `${reason} (Try again in ${seconds} s.)` : reason;
}

/** -> a function that shows an answer as it has grown, for which it takes at most a tenth of the time. */
function painter(reply) {
  const growing = new Growing(articleOf(reply).querySelector(".body"));
  let [timer, wait] = [0, 16];
  return () => {
    timer ||= setTimeout(() => {
      const begun = performance.now();
      following(() => growing.show(shown(reply)));
      [timer, wait] = [0, Math.max(16, 10 * (performance.now() - begun))];
    }, wait);
  };
}

/** Changes what is shown. Who has the end in view has it in view afterwards. */
function following(change) {
  const page = document.documentElement;
  const atEnd = innerHeight + scrollY > page.scrollHeight - 90;
  change();
  if (atEnd) scrollTo(0, page.scrollHeight);
}

function draw() {
  const [shown, wanted] = [$("conversation"), conversation.messages.map(articleOf)];
  const same = [...wanted, null].findIndex((article, i) => shown.children[i] !== article);
  following(() => {
    while (shown.children.length > same) shown.lastChild.remove();
    for (const article of wanted.slice(same)) shown.append(article);
    const label = (image) => ({ type: "button", className: "remove", ariaLabel: `Remove ${image.name}`, image });
    const item = (image) => element("li", {}, picture(image), element("button", label(image), "✕"));
    $("attached").replaceChildren(...attached.map(item));
  });
  wanted.forEach((article, i) => article.classList.toggle("replaced", editing !== null && i >= editing));
  document.body.classList.toggle("busy", busy !== null);
  [$("send").hidden, $("stop").hidden] = [busy !== null, busy === null];
  [$("empty").hidden, $("editing").hidden] = [wanted.length > 0, editing === null];
}

function tell(line, text) {
  [line.textContent, line.hidden] = [text, !text];
}

/** Says something above the text box, which may be undone. */
function say(text, undo = null, className = "") {
  tell($("notice").firstChild, text);
  Object.assign($("notice"), { className, hidden: !text });
  Object.assign($("restore"), { onclick: undo, hidden: !undo });
}

const complain = (text) => say(text, null, "bad");

function save() {
  clearTimeout(saving);
  saving = 0;
  unfinished += 1;
  const failed = (error) => complain(`This browser does not keep the conversation: ${error.message}`);
  const done = () => busy || store.tabs.postMessage("saved");
  return store.save(conversation).finally(() => (unfinished -= 1)).then(done, failed);
}

/** The conversation as it was kept. What was asked without getting any answer goes back to the text box. */
async function restore() {
  const kept = await store.load().catch((error) => complain(`This browser keeps no conversation: ${error.message}`));
  if (!kept) return;
  [conversation, editing] = [kept, null];
  const last = kept.messages.at(-1);
  if (last?.partial && !last.text) fill(...kept.messages.splice(-2));
  else if (last?.partial) Object.assign(last, { partial: false, note: "The answer was interrupted." });
  draw();
}

/** Another conversation takes the place of this one. */
function replace(next, said) {
  const before = conversation;
  busy?.abort();
  [conversation, editing] = [next, null];
  draw();
  save();
  say(said, before.messages.length ? () => replace(before, "") : null);
}

function empty() {
  [attached, editing, $("box").value] = [[], null, ""];
  draw();
  $("box").focus();
}

/** Puts a question into the text box, before what has been written there meanwhile. */
function fill(question) {
  $("box").value = [typed(question.parts), $("box").value].filter(Boolean).join("\n");
  attached = [...imagesOf(question), ...attached];
  draw();
  $("box").focus();
}

async function attach(files) {
  for (const file of files) {
    if (!file.type.startsWith("image/") && !IMAGE_NAMES.test(file.name)) {
      complain(`${file.name} is no image: the server reads JPEG, PNG, WebP, GIF, BMP, TIFF and PPM.`);
    } else if ((file.size * 4) / 3 > MAX_BODY - 1024) {
      const limit = `the server takes ${megabytes(MAX_BODY)}, and files grow by a third on the way`;
      complain(`${file.name} has ${megabytes(file.size)}: ${limit}.`);
    } else attached.push(makeImage(file.name, new Blob([await file.arrayBuffer()], { type: file.type })));
  }
  draw();
  $("box").focus();
}

/** Takes what was chosen, dropped or pasted: a conversation, or images. */
async function take(files) {
  say("");
  if (!files.some((file) => /\.(zip|json)$/i.test(file.name))) return attach(files);
  const done = (loaded) => replace(loaded, "The conversation was loaded.");
  await unpack(files).then(done, (error) => complain(error.message));
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const field = document.body.appendChild(element("textarea", { value: text })); // over http there is no clipboard
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  const label = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = label), 1500);
}

function rate(i, rating) {
  const message = conversation.messages[i];
  judge(message, { rating: message.rating === rating ? undefined : rating }, rating);
}

/** Changes what is thought of an answer, and keeps the focus on one of its buttons. */
function judge(message, changes, button) {
  Object.assign(message, changes);
  forget(message);
  draw();
  articleOf(message).querySelector(`.actions .${button}`).focus();
  save();
}

/** Asks for a better text of an answer. */
function improve(message) {
  $("better").value = said(message);
  $("original").hidden = message.better === undefined;
  $("improve").returnValue = "";
  $("improve").showModal();
  $("improve").onclose = () => {
    const [wanted, text] = [$("improve").returnValue, $("better").value.toWellFormed()];
    if (!wanted) return;
    if (!conversation.messages.includes(message)) return complain("Another tab has changed the conversation.");
    judge(message, { better: wanted === "original" || text === message.text ? undefined : text }, "improve");
  };
}

// What the buttons of messages and images do, by their class. `i` is the message's number.
const ACTIONS = {
  copy: (button, i) => copy(textOf(conversation.messages[i]), button),
  "copy-code": (button) => copy(button.closest(".code").querySelector("code").textContent, button),
  picture: ({ image }) => {
    $("viewer").querySelector("img").src = urlOf(image);
    $("viewer").showModal();
  },
  remove: ({ image }) => {
    attached = attached.filter((other) => other !== image);
    draw();
    $("box").focus();
  },
  good: (_, i) => rate(i, "good"),
  bad: (_, i) => rate(i, "bad"),
  improve: (_, i) => improve(conversation.messages[i]),
  edit: (_, i) => {
    empty();
    editing = i;
    fill(conversation.messages[i]);
  },
  undo: (_, i) => {
    editing = null;
    fill(conversation.messages.splice(i - 1)[0]);
    save();
  },
  retry: (_, i) => {
    $("box").focus();
    if (!model) return void connect();
    const [question, answer] = conversation.messages.slice(i - 1);
    const others = [...(isJudged(answer) ? [asOther(answer)] : []), ...(answer.others ?? [])];
    ask(conversation.messages.slice(0, i - 1), question, undefined, others);
  },
};
document.onclick = ({ target }) => {
  const button = target.closest("article button, #attached button");
  const number = [...$("conversation").children].indexOf(button?.closest("article"));
  if (button) ACTIONS[button.classList[0]](button, number);
};

$("composer").onsubmit = (event) => {
  event.preventDefault();
  const [text, images, replaced] = [$("box").value.toWellFormed(), attached, editing];
  if (busy || !(text.trim() || images.length)) return;
  if (!model) return void connect();
  const question = { role: "user", parts: place(text, images) };
  empty();
  say("");
  ask(conversation.messages.slice(0, replaced ?? undefined), question, () => {
    editing = replaced;
    fill(question);
  });
};
$("box").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || matchMedia("(pointer: coarse)").matches) return;
  event.preventDefault();
  $("composer").requestSubmit();
};
document.onkeydown = ({ key }) => {
  if (key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (busy) busy.abort();
  else if (editing !== null) empty();
};
$("stop").onclick = () => busy?.abort();
$("cancel-edit").onclick = empty;
$("dismiss").onclick = () => say("");
$("new").onclick = () => {
  replace({ ...conversation, messages: [] }, conversation.messages.length ? "The conversation was removed." : "");
};
$("load").onclick = () => $("files").click();
$("choose").onclick = () => $("images").click();
$("files").onchange = $("images").onchange = ({ target }) => {
  const files = [...target.files];
  target.value = ""; // so that the same file can be chosen again
  if (files.length) take(files);
};
$("download").onclick = async () => {
  const messages = conversation.messages.slice(0, busy ? -2 : undefined);
  if (!messages.length) return complain("There is nothing to download yet.");
  const id = `llava-${new Date().toLocaleString("sv").replace(/[-:]/g, "").replace(" ", "-")}`;
  const href = URL.createObjectURL(await pack({ ...conversation, messages }, id));
  element("a", { href, download: `${id}.zip` }).click();
  const alone = unpaired(messages);
  if (alone) say(`${alone} of the judged answers ${alone > 1 ? "are" : "is"} in no preference pair: ${PAIRS}.`);
};
$("models").onchange = ({ target }) => {
  store.remember("llava_jax.model", (wanted = target.value));
  if (model) use(wanted);
};
$("theme").onclick = () => {
  const { dataset } = document.documentElement;
  const dark = (dataset.theme || matchMedia("(prefers-color-scheme: dark)").matches) && dataset.theme !== "light";
  store.remember("llava_jax.theme", (dataset.theme = dark ? "light" : "dark"));
};

$("key").querySelector("form").onsubmit = (event) => {
  event.preventDefault();
  useKey($("secret").value, $("remember").checked);
  $("key").close();
  connect(true);
};
$("open-settings").onclick = () => {
  for (const [name, value] of Object.entries(sampling)) $(name).value = value ?? "";
  $("system").value = conversation.system ?? "";
  $("system").placeholder = conversation.system === "" ? "None" : "The model's own";
  $("settings").showModal();
};
$("settings").onchange = ({ target: { id, value, validity } }) => {
  if (id === "system") conversation.system = value.toWellFormed() || null;
  else if (validity.valid) sampling[id] = value === "" ? null : Number(value);
  store.remember("llava_jax.sampling", JSON.stringify(sampling));
  save();
};

const video = $("camera").querySelector("video");
$("photograph").onclick = async () => {
  const trouble = $("camera").querySelector("[role=alert]");
  [trouble.textContent, $("shoot").disabled] = ["", true];
  $("camera").showModal();
  try {
    if (!navigator.mediaDevices) throw new Error("browsers give it only to pages at https or at 127.0.0.1");
    const wanted = { facingMode: "environment", width: { ideal: 1920 } };
    video.srcObject = await navigator.mediaDevices.getUserMedia({ video: wanted });
    if (!$("camera").open) return $("camera").onclose();
    await video.play();
    $("shoot").disabled = false;
  } catch (error) {
    trouble.textContent = `There is no camera: ${error.message}.`;
  }
};
$("shoot").onclick = () => {
  const canvas = element("canvas", { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext("2d").drawImage(video, 0, 0);
  canvas.toBlob((blob) => take([new File([blob], "photo.png", { type: "image/png" })]));
  $("camera").close();
};
$("camera").onclose = () => {
  for (const track of video.srcObject?.getTracks() ?? []) track.stop();
  video.srcObject = null;
};

document.onpaste = (event) => {
  const files = [...event.clipboardData.files];
  if (!files.length || document.querySelector("dialog[open]")) return;
  event.preventDefault();
  take(files);
};
document.ondragover = document.ondragleave = document.ondrop = (event) => {
  const { types, files } = event.dataTransfer;
  const isFile = types.includes("Files") || types.includes("text/uri-list");
  document.body.classList.toggle("dropping", isFile && event.type === "dragover");
  if (!isFile || event.type === "dragleave") return;
  event.preventDefault();
  if (event.type !== "drop") return;
  if (files.length) take([...files]);
  else complain("That is no file: save the image first, then drop the file.");
};
window.onpagehide = () => {
  if (busy || unfinished) store.saveTexts(conversation);
};
window.onfocus = refresh;
store.tabs.onmessage = () => busy || restore();
restore().finally(() => connect());
