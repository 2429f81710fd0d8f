// The page: what is asked, what is shown, and what each control does.

import { chat, modelName, unready, useKey } from "./api.js";
import { makeImage, pack, unpack } from "./llava.js";
import { Growing, element } from "./markdown.js";
import * as store from "./store.js";
import { articleOf, forget, picture, urlOf } from "./view.js";

const $ = (id) => document.getElementById(id);
const MAX_BODY = Number(document.querySelector("meta[name=max-body-bytes]").content);
const IMAGE_NAMES = /\.(jpe?g|png|webp|gif|bmp|tiff?|p[bgnp]m)$/i;
const SAMPLING = { temperature: 0.2, top_p: 0.7, longest: 512 };
const megabytes = (bytes) => `${(bytes / 2 ** 20).toFixed(1)} MB`;

const tabs = new BroadcastChannel("llava_jax");
let conversation = { system: null, messages: [] }; // an empty system prompt means none, null the model's own
let attached = []; // images of the next question
let editing = null; // number of the message that the next question replaces, with all after it
let busy = null; // AbortController of the answer that is coming
let model = null; // its name, while the server is ready
let connecting = false;
let sampling = { ...SAMPLING, ...JSON.parse(localStorage.getItem("llava_jax.sampling") ?? "{}") };

// The server.

/** Waits until the server is ready and knows the key. */
async function connect(keyWasWrong = false) {
  if (connecting) return;
  [connecting, model] = [true, null];
  for (let reason; (reason = await unready()); await new Promise((resolve) => setTimeout(resolve, 1500))) {
    tell($("state"), `Waiting: ${reason.replace(/: try again later$/, "")}. This page continues by itself.`);
  }
  try {
    model = await modelName();
    tell($("state"), "");
    document.title = `${($("model").textContent = model)} · LLaVA`;
  } catch (error) {
    tell($("state"), error.message);
    if (error.status === 401) askKey(keyWasWrong);
  }
  connecting = false;
}

function askKey(wasWrong) {
  $("key").querySelector("[role=alert]").textContent = wasWrong ? "The server does not know this key." : "";
  $("key").showModal();
}

$("key").querySelector("form").onsubmit = (event) => {
  event.preventDefault();
  useKey($("secret").value, $("remember").checked);
  $("key").close();
  connect(true);
};

// Questions and answers.

/** Asks a question after the messages of `head`. What cannot be answered at all is undone, and `giveBack` called. */
async function ask(head, question, giveBack = () => {}) {
  const before = conversation.messages;
  const reply = { role: "assistant", text: "", partial: true };
  const mine = (conversation.messages = [...head, question, reply]);
  const control = (busy = new AbortController());
  draw();
  scrollTo(0, document.documentElement.scrollHeight);
  save();
  const [paint, begun] = [painter(reply), performance.now()];
  try {
    for await (const { choices, usage } of chunks(await requestFor([...head, question]), control.signal)) {
      if (usage) {
        const [tokens, seconds] = [usage.completion_tokens, (performance.now() - begun) / 1000];
        reply.figures = `${tokens} tokens in ${seconds.toFixed(1)} s · ${(tokens / seconds).toFixed(1)} tokens/s`;
      }
      if (choices[0]?.finish_reason === "length") reply.note = "The answer was cut at the longest length (see Settings).";
      if (!choices[0]?.delta.content) continue;
      reply.text += choices[0].delta.content;
      paint();
      saveSoon();
    }
  } catch (error) {
    const reason = control.signal.aborted ? "" : explain(error, [...head, question]);
    if (reply.text) reply.note = reason;
    else if (conversation.messages === mine) {
      conversation.messages = before;
      giveBack();
      if (reason) complain(reason);
    }
    if ([0, 401, 503].includes(error.status)) connect(error.status === 401);
  }
  delete reply.partial;
  forget(reply);
  if (busy === control) busy = null;
  if (conversation.messages === mine) tell($("spoken"), `Answer: ${reply.text} ${reply.note ?? ""}`);
  draw();
  save();
}

/** The chunks of an answer, which may be as long as the context has room for, if that is less than what was wanted. */
async function* chunks(request, signal) {
  const body = JSON.stringify(request);
  const size = new Blob([body]).size;
  if (size > MAX_BODY) {
    const limit = `the server takes ${megabytes(MAX_BODY)}: remove images, or begin a new conversation`;
    throw new Error(`The conversation with its images is ${megabytes(size)}; ${limit}.`);
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
  const contentOf = async ({ image, text }) =>
    image ? { type: "image_url", image_url: { url: await dataUrl(image.blob) } } : { type: "text", text };
  const written = messages.map(async ({ role, parts, text }) => ({
    role,
    content: parts ? await Promise.all(parts.map(contentOf)) : text,
  }));
  const system = conversation.system === null ? [] : [{ role: "system", content: conversation.system }];
  return {
    model,
    messages: [...system, ...(await Promise.all(written))],
    stream: true,
    stream_options: { include_usage: true },
    temperature,
    top_p,
    ...(longest && { max_completion_tokens: longest }),
  };
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
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
      following(() => growing.show(reply.text));
      [timer, wait] = [0, Math.max(16, 10 * (performance.now() - begun))];
    }, wait);
  };
}

// What is shown and kept.

/** Changes what is shown. Who has the end in view has it in view afterwards. */
function following(change) {
  const page = document.documentElement;
  const atEnd = innerHeight + scrollY > page.scrollHeight - 90;
  change();
  if (atEnd) scrollTo(0, page.scrollHeight);
}

function draw() {
  const shown = $("conversation");
  const wanted = conversation.messages.map(articleOf);
  let same = 0;
  while (same < wanted.length && shown.children[same] === wanted[same]) same++;
  following(() => {
    while (shown.children.length > same) shown.lastChild.remove();
    for (const article of wanted.slice(same)) shown.append(article);
  });
  wanted.forEach((article, i) => article.classList.toggle("replaced", editing !== null && i >= editing));
  document.body.classList.toggle("busy", Boolean(busy));
  [$("empty").hidden, $("editing").hidden] = [wanted.length > 0, editing === null];
  [$("send").hidden, $("stop").hidden] = [Boolean(busy), !busy];
  const remove = (image) => element("button", { type: "button", className: "remove", ariaLabel: `Remove ${image.name}`, image }, "✕");
  $("attached").replaceChildren(...attached.map((image) => element("li", {}, picture(image), remove(image))));
}

function tell(line, text) {
  line.textContent = text;
  line.hidden = !text;
}

/** Says something above the text box, which may be undone. */
function say(text, undo = null, bad = false) {
  $("notice").firstChild.textContent = text;
  $("notice").className = bad ? "bad" : "";
  [$("notice").hidden, $("restore").hidden, $("restore").onclick] = [!text, !undo, undo];
}

const complain = (text) => say(text, null, true);

let saving = 0;
function save() {
  clearTimeout(saving);
  saving = 0;
  const told = () => busy || tabs.postMessage("changed");
  return store.save(conversation).then(told, (error) => complain(`This browser does not keep the conversation: ${error.message}`));
}

function saveSoon() {
  saving ||= setTimeout(save, 400);
}

/** The conversation as it was kept. What was asked without getting any answer goes back to the text box. */
async function restore() {
  const kept = await store.load().catch((error) => complain(`This browser keeps no conversation: ${error.message}`));
  if (!kept) return;
  [conversation, editing] = [kept, null];
  const last = kept.messages.at(-1);
  if (last?.partial && !last.text) putInBox(kept.messages.splice(-2)[0]);
  else if (last?.partial) Object.assign(last, { partial: false, note: "The answer was interrupted." });
  draw();
}

/** Puts a message into the text box, before what has been written there meanwhile. */
function putInBox({ parts }) {
  const text = parts.flatMap((part) => part.text ?? []).join("\n");
  $("box").value = [text, $("box").value].filter(Boolean).join("\n");
  attached = [...parts.flatMap((part) => part.image ?? []), ...attached];
  fit();
}

function fit() {
  $("box").style.height = "auto";
  $("box").style.height = `${$("box").scrollHeight}px`;
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

// Images and files.

async function attach(files) {
  say("");
  for (const file of files) {
    if (!file.type.startsWith("image/") && !IMAGE_NAMES.test(file.name)) {
      complain(`${file.name} is no image: the server reads JPEG, PNG, WebP, GIF, BMP, TIFF and PPM.`);
    } else if ((file.size * 4) / 3 > MAX_BODY - 1024) {
      complain(`${file.name} has ${megabytes(file.size)}, too much for the server, which takes requests of ${megabytes(MAX_BODY)}.`);
    } else attached.push(makeImage(file.name, new Blob([await file.arrayBuffer()], { type: file.type })));
  }
  draw();
  $("box").focus();
}

async function open(files) {
  if (!files.some((file) => /\.(zip|json)$/i.test(file.name))) return attach(files);
  try {
    replace(await unpack(files), `Loaded ${files[0].name}.`);
  } catch (error) {
    complain(error.message);
  }
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const field = element("textarea", { value: text }); // over http from elsewhere there is no clipboard
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  const before = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = before), 1500);
}

const ACTIONS = {
  picture: (_, button) => {
    $("viewer").querySelector("img").src = urlOf(button.image);
    $("viewer").showModal();
  },
  remove: (_, button) => {
    attached = attached.filter((image) => image !== button.image);
    draw();
    $("box").focus();
  },
  copy: (i, button) => {
    const { parts, text } = conversation.messages[i];
    copy(parts ? parts.flatMap((part) => part.text ?? []).join("\n") : text, button);
  },
  "copy-code": (_, button) => copy(button.closest(".code").querySelector("code").textContent, button),
  edit: (i) => {
    [editing, attached, $("box").value] = [i, [], ""];
    putInBox(conversation.messages[i]);
    draw();
    $("box").focus();
  },
  undo: (i) => {
    const question = conversation.messages[i - 1];
    [conversation.messages, editing] = [conversation.messages.slice(0, i - 1), null];
    putInBox(question);
    draw();
    save();
    $("box").focus();
  },
  retry: (i) => {
    $("box").focus();
    if (model) ask(conversation.messages.slice(0, i - 1), conversation.messages[i - 1]);
    else connect();
  },
};

document.addEventListener("click", (event) => {
  const button = event.target.closest("article button, #attached button");
  const act = ACTIONS[[...(button?.classList ?? [])].find((name) => name in ACTIONS)];
  act?.([...$("conversation").children].indexOf(button.closest("article")), button);
});

// Controls.

$("composer").onsubmit = (event) => {
  event.preventDefault();
  const [text, images, replaced] = [$("box").value.toWellFormed(), attached, editing];
  if (busy || !(text.trim() || images.length)) return;
  if (!model) return void connect();
  const parts = [...images.map((image) => ({ image })), ...(text.trim() ? [{ text }] : [])];
  [attached, editing, $("box").value] = [[], null, ""];
  fit();
  say("");
  ask(conversation.messages.slice(0, replaced ?? undefined), { role: "user", parts }, () => {
    editing = replaced;
    putInBox({ parts });
  });
};
$("box").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || matchMedia("(pointer: coarse)").matches) return;
  event.preventDefault();
  $("composer").requestSubmit();
};
$("box").oninput = fit;
$("stop").onclick = () => busy?.abort();
$("cancel-edit").onclick = () => {
  [editing, attached, $("box").value] = [null, [], ""];
  fit();
  draw();
  $("box").focus();
};
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (busy) busy.abort();
  else if (editing !== null) $("cancel-edit").click();
});

$("dismiss").onclick = () => say("");
$("new").onclick = () => replace({ system: conversation.system, messages: [] }, conversation.messages.length ? "The conversation was removed." : "");
$("load").onclick = () => $("files").click();
$("choose").onclick = () => $("images").click();
$("files").onchange = $("images").onchange = ({ target }) => {
  const files = [...target.files];
  target.value = ""; // so that the same file can be chosen again
  if (files.length) open(files);
};
$("download").onclick = async () => {
  const messages = conversation.messages.slice(0, busy ? -2 : undefined);
  if (!messages.length) return complain("There is nothing to download yet.");
  const time = new Date(Date.now() - 60_000 * new Date().getTimezoneOffset()).toISOString();
  const id = `llava-${time.slice(0, 19).replace(/[-:]/g, "").replace("T", "-")}`;
  const href = URL.createObjectURL(await pack({ ...conversation, messages }, id));
  element("a", { href, download: `${id}.zip` }).click();
};
$("theme").onclick = () => {
  const root = document.documentElement;
  const dark = getComputedStyle(root).colorScheme === "dark" || (!root.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  localStorage.setItem("llava_jax.theme", (root.dataset.theme = dark ? "light" : "dark"));
};

$("open-settings").onclick = () => {
  for (const name of Object.keys(SAMPLING)) $(name).value = sampling[name] ?? "";
  $("system").value = conversation.system ?? "";
  $("system").placeholder = conversation.system === "" ? "None" : "The model's own";
  $("settings").oninput();
  $("settings").showModal();
};
$("settings").oninput = ({ target } = {}) => {
  for (const output of $("settings").querySelectorAll("output")) output.value = output.htmlFor.value && $(output.htmlFor.value).value;
  if (target?.id === "system") conversation.system = target.value.toWellFormed() || null;
  else if (target?.validity.valid) sampling[target.id] = target.value === "" ? null : Number(target.value);
};
$("settings").onclose = () => {
  localStorage.setItem("llava_jax.sampling", JSON.stringify(sampling));
  save();
};

$("photograph").onclick = async () => {
  const [dialog, video] = [$("camera"), $("camera").querySelector("video")];
  const trouble = dialog.querySelector("[role=alert]");
  [trouble.textContent, $("shoot").disabled] = ["", true];
  dialog.showModal();
  try {
    if (!navigator.mediaDevices) throw new Error("browsers give it only to pages at https or at 127.0.0.1");
    video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment", width: { ideal: 1920 } } });
    if (!dialog.open) return dialog.onclose();
    await video.play();
    $("shoot").disabled = false;
  } catch (error) {
    trouble.textContent = `There is no camera: ${error.message}.`;
  }
};
$("shoot").onclick = () => {
  const video = $("camera").querySelector("video");
  const canvas = element("canvas", { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext("2d").drawImage(video, 0, 0);
  canvas.toBlob((blob) => attach([new File([blob], "photo.png", { type: "image/png" })]));
  $("camera").close();
};
$("camera").onclose = () => {
  const video = $("camera").querySelector("video");
  for (const track of video.srcObject?.getTracks() ?? []) track.stop();
  video.srcObject = null;
};

document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  if (!files.length || document.querySelector("dialog[open]")) return;
  event.preventDefault();
  open(files);
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    const isText = event.target === $("box") && !event.dataTransfer.types.some((type) => /^(Files|text\/uri-list)$/.test(type));
    document.body.classList.toggle("dropping", kind === "dragover" && !isText);
    if (isText || kind === "dragleave") return;
    event.preventDefault();
    if (kind !== "drop") return;
    if (event.dataTransfer.files.length) open([...event.dataTransfer.files]);
    else complain("That is no file: save the image first, then drop the file.");
  });
}

addEventListener("pagehide", () => saving && save());
tabs.onmessage = () => busy || restore();
restore().then(connect);
