// How messages and images look. What their buttons do is main.js's.

import { element, render } from "./markdown.js";

const articles = new WeakMap();
const urls = new WeakMap();

const action = (name, text, more = "") => element("button", { type: "button", className: `${name} ${more}`, textContent: text });

/** The element of a message: always the same one, until `forget`. */
export function articleOf(message) {
  if (!articles.has(message)) articles.set(message, message.role === "user" ? question(message) : answer(message));
  return articles.get(message);
}

/** The message has changed. */
export const forget = (message) => articles.delete(message);

function question({ parts }) {
  const body = parts.map((part) => (part.image ? picture(part.image) : element("div", { className: "text" }, part.text)));
  return article("question", "Question", body, [action("copy", "Copy"), action("edit", "Edit")]);
}

function answer({ text, note, figures, partial }) {
  const buttons = [action("copy", "Copy"), action("retry", "Retry", "last-only"), action("undo", "Undo", "last-only")];
  const made = article("answer", "Answer", render(text), [...buttons, element("span", { className: "figures" }, figures ?? "")]);
  if (note) made.querySelector(".body").after(element("p", { className: "note" }, note));
  made.classList.toggle("streaming", Boolean(partial));
  return made;
}

function article(kind, title, body, actions) {
  const [head, foot] = [element("h2", { className: "unseen" }, title), element("div", { className: "actions" }, actions)];
  return element("article", { className: kind }, head, element("div", { className: "body" }, body), foot);
}

/** A button that shows an image, or its name where the browser cannot draw it. */
export function picture(image) {
  const shown = element("img", { alt: image.name, src: urlOf(image) });
  const made = element("button", { type: "button", className: "picture", title: image.name, image }, shown);
  shown.onerror = () => {
    made.classList.add("undrawn");
    made.replaceChildren(`${image.name}: no preview`);
  };
  return made;
}

export function urlOf(image) {
  if (!urls.has(image)) urls.set(image, URL.createObjectURL(image.blob));
  return urls.get(image);
}
