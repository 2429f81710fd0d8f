"use strict";
// The sample browser. Whatever comes from the data is put in as text, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
let shown = [];
let at = 0;

function element(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// Text in which what is searched for and some words are marked.
function marked(className, text, search, words) {
  const escaped = (word) => word.replace(/[^\p{L}\p{N}\s]/gu, "\\$&").replace(/\s+/g, "\\s+");
  const patterns = words.map((word) => `\\b${escaped(word)}\\b`);
  if (search) patterns.push(escaped(search));
  const made = element("div", className);
  const pieces = patterns.length ? text.split(new RegExp(`(${patterns.join("|")})`, "gi")) : [text];
  pieces.forEach((piece, i) => made.append(i % 2 ? element("mark", "", piece) : piece));
  return made;
}

const imagesOf = (entry) => [entry, ...entry.more_images];
const namesOf = (entry) => imagesOf(entry).map(({ image }) => image).join(", ");

function textOf(entry) {
  const { id, group, detail, turns, answer, captions, unsupported } = entry;
  return [id, namesOf(entry), group, detail, answer, ...turns.flat(), ...captions, ...unsupported].join("\n").toLowerCase();
}
for (const entry of data.entries) entry.text = textOf(entry);

function select() {
  const group = byId("group").value;
  const search = byId("search").value.trim().toLowerCase();
  const unsupported = byId("unsupported").checked;
  shown = data.entries.filter(
    (entry) =>
      (!group || entry.group === group || (group === "rejected" && entry.rejected)) &&
      (!unsupported || entry.unsupported.length) &&
      entry.text.includes(search),
  );
  at = 0;
  show();
}

function step(by) {
  if (shown.length) at = (at + by + shown.length) % shown.length;
  show();
}

function show() {
  byId("place").textContent = shown.length ? `${at + 1} / ${shown.length}` : "none";
  byId("sample").replaceChildren();
  if (!shown.length) return;
  const entry = shown[at];
  const figures = element("div", "");
  figures.append(...imagesOf(entry).map(figure));
  byId("sample").append(figures, texts(entry));
}

function figure({ image, boxes }) {
  const uri = data.thumbnails[image];
  if (!uri) return element("div", "image without", `no image: ${image}`);
  const made = element("div", "image");
  const picture = element("img", "");
  picture.src = uri;
  picture.alt = image;
  made.append(picture);
  if (byId("boxes").checked)
    for (const [category, x1, y1, x2, y2] of boxes) {
      const box = element("div", "box");
      box.style.left = `${100 * x1}%`;
      box.style.top = `${100 * y1}%`;
      box.style.width = `${100 * (x2 - x1)}%`;
      box.style.height = `${100 * (y2 - y1)}%`;
      box.append(element("span", "", category));
      made.append(box);
    }
  return made;
}

function texts(entry) {
  const made = element("div", "");
  made.id = "texts";
  made.append(element("div", "context", `${entry.group} · id ${entry.id} · ${namesOf(entry)}`));
  if (entry.rejected) made.append(element("div", "turn rejected", [entry.group, entry.detail].filter(Boolean).join(": ")));
  if (entry.answer) made.append(element("div", "turn", entry.answer));
  const search = byId("search").value.trim().toLowerCase();
  entry.turns.forEach((text, i) =>
    made.append(marked(i % 2 ? "turn" : "turn question", text, search, i % 2 ? entry.unsupported : [])),
  );
  if (entry.unsupported.length)
    made.append(element("div", "context", `named, but in no box or caption: ${entry.unsupported.join(", ")}`));
  if (entry.uncovered.length)
    made.append(element("div", "context", `in a box, but not named: ${entry.uncovered.join(", ")}`));
  if (entry.captions.length) made.append(element("div", "context", `captions:\n${entry.captions.join("\n")}`));
  return made;
}

for (const id of ["group", "search", "unsupported"]) byId(id).addEventListener("input", select);
byId("boxes").addEventListener("input", show);
byId("previous").addEventListener("click", () => step(-1));
byId("next").addEventListener("click", () => step(1));
document.addEventListener("keydown", (event) => {
  if (event.target === byId("search")) return;
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === "ArrowRight") step(1);
});
select();
