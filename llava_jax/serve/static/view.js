// How messages and images look. What their buttons do is in main.js.

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

function answer({ text, note, figures = "", partial }) {
  const buttons = [act("copy", "Copy"), act("retry", "Retry", "last"), act("undo", "Undo", "last")];
  const more = [...buttons, element("span", { className: "figures" }, figures), note ? element("p", { className: "note" }, note) : []];
  return article(partial ? "answer streaming" : "answer", "Answer", render(text), more);
}

function article(className, title, body, actions) {
  const [head, foot] = [element("h2", { className: "unseen" }, title), element("div", { className: "actions" }, actions)];
  return element("article", { className }, head, element("div", { className: "body" }, body), foot);
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
