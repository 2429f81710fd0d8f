// Markdown as elements. Text only ever becomes text nodes, and the work is proportional to the text, whatever it holds.

const MAX_DEPTH = 8; // of lists, quotes and emphasis within each other; what is deeper stays text
const ITEM = /^( *)([-*+]|\d{1,9}[.)]) +(?=\S)/;
const FENCE = /^ {0,3}(`{3,}|~{3,}) *([\w+#.-]*)/;
const HEADING = /^ {0,3}(#{1,6}) +(.*)/;
const RULE = /^ {0,3}([-*_])(?: ?\1){2,} *$/;
const LINK = /!?\[([^[\]\n]{1,500})\]\(<?([^()\s<>]{1,2000})>?\)/y;
const ADDRESS = /https?:\/\/[^\s<>"'`*\\]{1,2000}/y;
const SPECIAL = /[\\`*_~[!h]/g; // where something other than plain text may begin

/** An element with properties and children: nodes, texts, or lists of them. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  for (const child of children.flat()) made.append(child); // one by one: arguments are limited in number
  return made;
}

/** The elements of a text. */
export function render(text, depth = 0) {
  return [...blocks(text.split("\n"), depth)].map((block) => block.node());
}

/** Shows a text that grows in an element: of blocks that are there already only the last is made again. */
export class Growing {
  #start = 0; // of the last block
  #element;

  constructor(parent) {
    this.#element = parent;
  }

  show(text) {
    const lines = text.slice(this.#start).split("\n");
    const found = [...blocks(lines, 0)];
    if (this.#element.lastChild) this.#element.lastChild.remove();
    for (const block of found) this.#element.append(block.node());
    const complete = lines.slice(0, found.at(-1)?.line ?? 0);
    this.#start += complete.reduce((sum, line) => sum + line.length + 1, 0);
  }
}

/** Yields the blocks of lines: the number of the first line, and what makes the element. */
function* blocks(lines, depth) {
  for (let i = 0; i < lines.length; ) {
    const line = i;
    if (!lines[i].trim()) i++;
    else {
      const [end, node] = block(lines, i, depth);
      yield { line, node };
      i = end;
    }
  }
}

/** -> the line after a block, and what makes its element. */
function block(lines, i, depth) {
  const line = lines[i];
  let found;
  if ((found = FENCE.exec(line))) return fence(lines, i, found[1], found[2]);
  if ((found = HEADING.exec(line))) {
    const [, marks, title] = found;
    return [i + 1, () => element(`h${Math.min(6, marks.length + 2)}`, {}, inline(title))];
  }
  if (RULE.test(line)) return [i + 1, () => element("hr")];
  if (depth < MAX_DEPTH && /^ {0,3}>/.test(line)) {
    const end = endOf(lines, i, (next) => /^ {0,3}>/.test(next));
    const inner = lines.slice(i, end).map((quoted) => quoted.replace(/^ {0,3}> ?/, "")).join("\n");
    return [end, () => element("blockquote", {}, render(inner, depth + 1))];
  }
  if (depth < MAX_DEPTH && ITEM.test(line)) return list(lines, i, depth);
  if (line.includes("|") && isDelimiter(lines[i + 1])) return table(lines, i);
  const end = endOf(lines, i + 1, (next) => next.trim() && !begins(next, depth));
  return [end, () => element("p", {}, inline(lines.slice(i, end).join("\n")))];
}

function endOf(lines, i, belongs) {
  while (i < lines.length && belongs(lines[i])) i++;
  return i;
}

/** Whether a line ends the paragraph before it. */
function begins(line, depth) {
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || (depth < MAX_DEPTH && (/^ {0,3}>/.test(line) || ITEM.test(line)));
}

function fence(lines, i, mark, language) {
  const closes = (line) => line.trim().startsWith(mark) && new Set(line.trim()).size === 1;
  const end = endOf(lines, i + 1, (line) => !closes(line));
  const code = lines.slice(i + 1, end).join("\n");
  const make = () => {
    const copy = element("button", { type: "button", className: "copy-code", textContent: "Copy code" });
    const head = element("div", { className: "code-head" }, element("span", {}, language || "code"), copy);
    return element("div", { className: "code" }, head, element("pre", { tabIndex: 0 }, element("code", {}, code)));
  };
  return [Math.min(lines.length, end + 1), make];
}

/** Items are of one kind and equally indented; what is indented more belongs to the item before it. */
function list(lines, i, depth) {
  const [, { length: indent }, mark] = ITEM.exec(lines[i]);
  const ordered = /\d/.test(mark);
  const items = [];
  for (; i < lines.length; i++) {
    const line = lines[i];
    const item = ITEM.exec(line);
    const inside = line.search(/\S/) - indent; // how much more it is indented; below -1 where nothing is in the line
    if (item && inside < 2 && /\d/.test(item[2]) === ordered && !RULE.test(line)) items.push([line.slice(item[0].length)]);
    else if (item && inside < 2) break;
    else if (line.trim() && inside < 2 && (begins(line, depth) || !lines[i - 1].trim())) break;
    else items.at(-1).push(line.slice(Math.min(Math.max(inside, 0) + indent, indent + mark.length + 1)));
  }
  const make = () => {
    const entries = items.map((item) => element("li", {}, tight(render(item.join("\n"), depth + 1))));
    return element(ordered ? "ol" : "ul", ordered ? { start: parseInt(mark, 10) } : {}, entries);
  };
  return [i, make];
}

/** The text of an item that begins with a paragraph is in the item itself. */
function tight([first, ...rest]) {
  return first?.tagName === "P" ? [...first.childNodes, ...rest] : [first, ...rest].filter(Boolean);
}

const cells = (row) => row.trim().replace(/^\|/, "").replace(/\|$/, "").split("|").map((cell) => cell.trim());
const isDelimiter = (row) => Boolean(row?.includes("-")) && cells(row).every((cell) => /^:?-+:?$/.test(cell));

function table(lines, i) {
  const end = endOf(lines, i + 2, (line) => line.includes("|"));
  const row = (tag) => (line) => element("tr", {}, cells(line).map((cell) => element(tag, {}, inline(cell))));
  const make = () => {
    const head = element("thead", {}, row("th")(lines[i]));
    const body = element("tbody", {}, lines.slice(i + 2, end).map(row("td")));
    return element("div", { className: "table", tabIndex: 0 }, element("table", {}, head, body));
  };
  return [end, make];
}

/** Nodes of a text within a block: code, links and emphasis. */
function inline(text) {
  const tokens = []; // text, nodes, and marks {mark, tag}, of which those that match are given `role`
  const open = []; // marks that may be closed
  const closings = codeClosings(text);
  let plainFrom = 0;
  const add = (token, from, to) => {
    if (from > plainFrom) tokens.push(text.slice(plainFrom, from));
    tokens.push(token);
    plainFrom = SPECIAL.lastIndex = to;
  };
  SPECIAL.lastIndex = 0;
  for (let found; (found = SPECIAL.exec(text)); ) {
    const [at, character] = [found.index, found[0]];
    if (character === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) add(text[at + 1], at, at + 2);
    else if (character === "`") {
      const [length, closing] = closings.get(at);
      if (closing === undefined) SPECIAL.lastIndex = at + length;
      else add(element("code", {}, text.slice(at + length, closing).replaceAll("\n", " ")), at, closing + length);
    } else if (character === "[" || (character === "!" && text[at + 1] === "[")) {
      LINK.lastIndex = at;
      const link = LINK.exec(text);
      const made = link && anchor(link[2], link[1]);
      if (made) add(made, at, LINK.lastIndex);
    } else if (character === "h") {
      ADDRESS.lastIndex = at;
      const address = ADDRESS.exec(text)?.[0].replace(/[.,;:!?)\]]{1,9}$/, "");
      const made = address && anchor(address, address);
      if (made) add(made, at, at + address.length);
    } else if ("*_~".includes(character)) emphasis(character, at);
  }
  if (plainFrom < text.length) tokens.push(text.slice(plainFrom));
  return tree(tokens);

  /** A run of marks closes what it can, as `***` closes `*` and `**`, and may open something with the rest. */
  function emphasis(character, at) {
    let end = at + 1;
    while (text[end] === character) end++;
    const [before, after, length] = [text[at - 1] ?? " ", text[end] ?? " ", end - at];
    const inWord = character === "_" && /\w/.test(before) && /\w/.test(after);
    if (length > 3 || inWord || (character === "~" && length !== 2)) return void (SPECIAL.lastIndex = end);
    let from = at;
    const mark = (size) => {
      const tags = character === "~" ? ["del"] : [["em"], ["strong"], ["em", "strong"]][size - 1];
      const made = { mark: character.repeat(size), tags };
      add(made, from, (from += size));
      return made;
    };
    for (let match; /\S/.test(before) && from < end; open.length = match) {
      match = open.findLastIndex((other) => other.mark === character.repeat(end - from));
      if (match < 0) match = open.findLastIndex(({ mark }) => mark[0] === character && mark.length < end - from);
      if (match < 0) break;
      open[match].role = "open";
      Object.assign(mark(open[match].mark.length), { role: "close", tags: open[match].tags });
    }
    if (from === end) return;
    const rest = mark(end - from);
    if (/\S/.test(after)) open.push(rest);
    if (open.length > MAX_DEPTH) open.shift();
  }
}

/** Where the code that begins at each run of backticks ends: position -> [length of the run, position of the closing]. */
function codeClosings(text) {
  const runs = [...text.matchAll(/`+/g)].map((run) => [run.index, run[0].length]);
  const next = new Map();
  const closings = new Map();
  for (const [at, length] of runs.reverse()) {
    closings.set(at, [length, next.get(length)]);
    next.set(length, at);
  }
  return closings;
}

/** A link to another server, which is only followed by a click, or null. */
function anchor(address, label) {
  if (!/^https?:\/\//i.test(address) || !URL.canParse(address)) return null;
  return element("a", { href: address, title: address, target: "_blank", rel: "noopener noreferrer" }, label);
}

/** The nodes of tokens. Marks without a match are text. */
function tree(tokens) {
  const stack = [document.createDocumentFragment()];
  let words = "";
  for (const token of [...tokens, { role: "end" }]) {
    if (!(token.role || token instanceof Node)) {
      words += token.mark ?? token;
      continue;
    }
    if (words) stack.at(-1).append(words);
    words = "";
    if (token instanceof Node) stack.at(-1).append(token);
    else if (token.role === "open") stack.push(...token.tags.map((tag) => element(tag)));
    else if (token.role === "close") token.tags.forEach(() => stack.at(-2).append(stack.pop()));
  }
  return [...stack[0].childNodes];
}
