// How messages and images look. What their buttons do is in main.js.

import { asCode, looksLikeJson } from "./formats.js";
import { BAD, GOOD, said } from "./judging.js";
import { element, render } from "./markdown.js";

const [articles, urls] = [new WeakMap(), new WeakMap()];
const act = (name, text, more = "") => element("button", { type: "button", className: `${name} ${more}` }, text);

/** The element of a message: always the same one, until `forget`. */
export function articleOf(message) {
  if (!articles.has(message)) articles.set(message, message.parts ? question(message) : answer(message));
  return articles.get(message);
}

/** The message has changed. */
export const forget = (message) => articles.delete(message);

function question({ parts }) {
  const body = parts.map(({ image, text }) => (image ? picture(image) : element("div", { className: "text" }, text)));
  return article("question", "Question", body, [act("copy", "Copy"), act("edit", "Edit")]);
}

function answer(message) {
  const { text, better, rating, others = [], note, figures, model, partial } = message;
  const actions = [act("copy", "Copy"), mark(GOOD, "Good", rating), mark(BAD, "Bad", rating)];
  actions.push(act("improve", "Better text"), act("retry", "Retry", "last"), act("undo", "Undo", "last"));
  actions.push(element("span", { className: "figures" }, [model, figures].filter(Boolean).join(" · ")));
  if (note) actions.push(element("p", { className: "note" }, note));
  const body = render(shown(message));
  if (better !== undefined) body.push(folded("The model's answer", render(shown({ text }))));
  if (others.length) body.push(folded(`Other answers that were judged: ${others.length}`, others.flatMap(other)));
  return article(partial ? "answer streaming" : "answer", "Answer", body, actions);
}

/** The Markdown of an answer. */
export function shown(message) {
  return message.json || looksLikeJson(said(message)) ? asCode(said(message)) : said(message);
}

function other(message) {
  const { better, rating, model } = message;
  const verdict = [model, better === undefined ? (rating === GOOD ? "Good" : "Bad") : "Better text"].filter(Boolean);
  return [element("p", { className: "verdict" }, `${verdict.join(" · ")}:`), ...render(shown(message))];
}

/** A button that says what is thought of an answer, pressed or not. */
function mark(name, text, rating) {
  return Object.assign(act(name, text), { ariaLabel: `${text} answer`, ariaPressed: String(rating === name) });
}

const folded = (title, content) => element("details", {}, element("summary", {}, title), content);

function article(className, title, body, actions) {
  const part = (name, children) => element("div", { className: name }, children);
  const head = element("h2", { className: "unseen" }, title);
  return element("article", { className }, head, part("body", body), part("actions", actions));
}

/** A button with an image, or its name where the browser cannot draw it. */
export function picture(image) {
  const failed = ({ target }) => target.replaceWith(`${image.name}: no preview`);
  const shown = element("img", { alt: image.name, src: urlOf(image), onerror: failed });
  return element("button", { type: "button", className: "picture", title: image.name, image }, shown);
}

export function urlOf(image) {
  if (!urls.has(image)) urls.set(image, URL.createObjectURL(image.blob));
  return urls.get(image);
}
