// Markdown as elements. Text only ever becomes text nodes, and the work is proportional to the text, whatever it holds.

const MAX_DEPTH = 8; // of lists and quotes, and of emphasis, within each other; what is deeper stays text
const ITEM = /^( *)([-*+]|\d{1,9}[.)]) +(?=\S)/;
const RULE = /^ {0,3}([-*_])(?: ?\1){2,} *$/;
const QUOTE = /^ {0,3}> ?/;
const INLINE = new RegExp(
  [
    /\\(?<escaped>[!-/:-@[-`{-~])/,
    /(?<ticks>`+)/,
    /!?\[(?<label>[^[\]\n]{1,500})\]\(<?(?<address>[^()\s<>]{1,2000})>?\)/,
    /(?<bare>https?:\/\/[^\s<>"'`*\\]{1,2000})/,
    /(?<marks>\*+|_+|~+)/,
  ].map((part) => part.source).join("|"),
  "g",
);

/** An element with properties and children: nodes, texts, or lists of them. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  for (const child of children.flat()) made.append(child); // one by one: arguments are limited in number
  return made;
}

/** The elements of a text. */
export function render(text, depth = 0) {
  return [...blocks(text.split("\n"), depth)].map(({ make }) => make());
}

/** Shows a text that grows: of the blocks that are in `parent` already, only the last is made again. */
export class Growing {
  #start = 0; // of the last block

  constructor(parent) {
    this.parent = parent;
  }

  show(text) {
    const lines = text.slice(this.#start).split("\n");
    const found = [...blocks(lines, 0)];
    this.parent.lastChild?.remove();
    for (const { make } of found) this.parent.append(make());
    for (const line of lines.slice(0, found.at(-1)?.first ?? 0)) this.#start += line.length + 1;
  }
}

/** Yields the blocks of lines: the number of the first, and what makes the element. */
function* blocks(lines, depth) {
  for (let i = 0; i < lines.length; ) {
    if (!lines[i].trim()) i++;
    else {
      const first = i;
      const kinds = [...INTERRUPTING, table, paragraph];
      let make;
      for (const kind of kinds) if (([i, make] = kind(lines, first, depth) ?? [])[0]) break;
      yield { first, make };
    }
  }
}

// Each kind of block: the line after it, and what makes its element; undefined where none begins at line i.

const INTERRUPTING = [fence, heading, rule, quote, list];
const interrupts = (line, depth) => INTERRUPTING.some((kind) => kind([line], 0, depth));

function endOf(lines, i, belongs) {
  while (i < lines.length && belongs(lines[i])) i++;
  return i;
}

function fence(lines, i) {
  const [, mark, language] = /^ {0,3}(`{3,}|~{3,}) *([\w+#.-]*)/.exec(lines[i]) ?? [];
  if (!mark) return undefined;
  const closes = (line) => line.startsWith(mark) && !line.replaceAll(mark[0], "");
  const end = endOf(lines, i + 1, (line) => !closes(line.trim()));
  const make = () => {
    const copy = element("button", { type: "button", className: "copy-code", textContent: "Copy code" });
    const code = element("code", {}, lines.slice(i + 1, end).join("\n"));
    const head = element("div", { className: "code-head" }, element("span", {}, language || "code"), copy);
    return element("div", { className: "code" }, head, element("pre", { tabIndex: 0 }, code));
  };
  return [end + 1, make];
}

function heading(lines, i) {
  const [, marks, title] = /^ {0,3}(#{1,6}) +(.*)/.exec(lines[i]) ?? [];
  return marks && [i + 1, () => element(`h${Math.min(6, marks.length + 2)}`, {}, inline(title))];
}

function rule(lines, i) {
  return RULE.test(lines[i]) ? [i + 1, () => element("hr")] : undefined;
}

function quote(lines, i, depth) {
  if (depth === MAX_DEPTH || !QUOTE.test(lines[i])) return undefined;
  const end = endOf(lines, i, (line) => QUOTE.test(line));
  const inner = () => lines.slice(i, end).map((line) => line.replace(QUOTE, "")).join("\n");
  return [end, () => element("blockquote", {}, render(inner(), depth + 1))];
}

/** Items are of one kind and equally indented; what is indented more belongs to the item before it. */
function list(lines, i, depth) {
  const [start, { length: indent } = "", mark] = ITEM.exec(lines[i]) ?? [];
  if (depth === MAX_DEPTH || !start) return undefined;
  const ordered = /\d/.test(mark);
  const items = [];
  const end = endOf(lines, i, (line) => {
    const item = ITEM.exec(line);
    const deeper = line.search(/\S/) - indent; // below 2 also where nothing is in the line
    if (item && deeper < 2) {
      if (/\d/.test(item[2]) !== ordered || RULE.test(line)) return false;
      return items.push([line.slice(item[0].length)]);
    }
    const after = items.at(-1);
    if (line.trim() && deeper < 2 && (after.at(-1) === "" || interrupts(line, depth))) return false;
    return after.push(line.trim() && line.slice(Math.min(Math.max(deeper, 0) + indent, indent + mark.length + 1)));
  });
  const make = () => {
    const entries = items.map((item) => element("li", {}, tight(render(item.join("\n"), depth + 1))));
    return element(ordered ? "ol" : "ul", ordered ? { start: parseInt(mark, 10) } : {}, entries);
  };
  return [end, make];
}

/** An item's first paragraph is in the item itself. */
const tight = ([first, ...rest]) => [first?.tagName === "P" ? [...first.childNodes] : (first ?? []), rest].flat();

const cells = (row) => row.trim().replace(/^\|/, "").replace(/\|$/, "").split("|").map((cell) => cell.trim());

function table(lines, i) {
  const [head, rule = ""] = lines.slice(i, i + 2);
  if (!head.includes("|") || !cells(rule).every((cell) => /^:?-+:?$/.test(cell))) return undefined;
  const end = endOf(lines, i + 2, (line) => line.includes("|"));
  const row = (tag) => (line) => element("tr", {}, cells(line).map((cell) => element(tag, {}, inline(cell))));
  const make = () => {
    const parts = [element("thead", {}, row("th")(head)), element("tbody", {}, lines.slice(i + 2, end).map(row("td")))];
    return element("div", { className: "table", tabIndex: 0 }, element("table", {}, parts));
  };
  return [end, make];
}

function paragraph(lines, i, depth) {
  const end = endOf(lines, i + 1, (line) => line.trim() && !interrupts(line, depth));
  return [end, () => element("p", {}, inline(lines.slice(i, end).join("\n")))];
}

/** The nodes of a text within a block. */
function inline(text) {
  const [tokens, open] = [[], []]; // texts, nodes and marks; marks that may be closed yet
  const [closings, next] = [new Map(), {}]; // where code that begins at a run of backticks ends
  for (const { index, 0: { length } } of [...text.matchAll(/`+/g)].reverse()) {
    closings.set(index, next[length]);
    next[length] = index;
  }
  let from = 0; // what is before is in tokens
  const add = (token, at, end) => {
    tokens.push(text.slice(from, at), token);
    from = INLINE.lastIndex = end;
    return token;
  };
  INLINE.lastIndex = 0;
  for (let found; (found = INLINE.exec(text)); ) {
    const { index: at, 0: whole, groups } = found;
    const { escaped, ticks, label, address, bare, marks } = groups;
    const end = at + whole.length;
    if (escaped) add(escaped, at, end);
    else if (marks) emphasize(marks, at, end);
    else if (ticks) {
      const closing = closings.get(at);
      if (closing) add(element("code", {}, text.slice(end, closing).replaceAll("\n", " ")), at, closing + ticks.length);
    } else {
      const href = address ?? bare.replace(/[.,;:!?)\]]{1,9}$/, "");
      if (/^https?:\/\//i.test(href) && URL.canParse(href)) {
        const link = { href, title: href, target: "_blank", rel: "noopener noreferrer" }; // followed by a click alone
        add(element("a", link, label ?? href), at, address ? end : at + href.length);
      }
    }
  }
  return tree([...tokens, text.slice(from)]);

  /** Marks close what they can, as `***` closes `*` and `**`, and may open something with the rest. */
  function emphasize(marks, at, end) {
    const [before, after, character] = [text[at - 1] ?? " ", text[end] ?? " ", marks[0]];
    const within = character === "_" && /\w/.test(before) && /\w/.test(after);
    if (marks.length > 3 || within || (character === "~" && marks.length !== 2)) return;
    for (let match; /\S/.test(before) && at < end; open.length = match) {
      match = open.findLastIndex(({ mark }) => mark === text.slice(at, end));
      if (match < 0) match = open.findLastIndex(({ mark }) => mark[0] === character && mark.length < end - at);
      if (match < 0) break;
      const { mark } = Object.assign(open[match], { role: "open" });
      add({ mark, role: "close" }, at, (at += mark.length));
    }
    if (at < end && /\S/.test(after)) open.push(add({ mark: text.slice(at, end) }, at, end));
    if (open.length > MAX_DEPTH) open.shift();
  }
}

/** The nodes of tokens. Marks that nothing closes are text. */
function tree(tokens) {
  const stack = [document.createDocumentFragment()];
  let words = "";
  for (const token of [...tokens, { role: "end" }]) {
    if (!token.role && !(token instanceof Node)) words += token.mark ?? token;
    else {
      if (words) stack.at(-1).append(words);
      words = "";
      const tags = token.mark?.[0] === "~" ? ["del"] : [[], ["em"], ["strong"], ["em", "strong"]][token.mark?.length ?? 0];
      if (token instanceof Node) stack.at(-1).append(token);
      else if (token.role === "open") stack.push(...tags.map((tag) => element(tag)));
      else for (const _ of tags) stack.at(-2).append(stack.pop());
    }
  }
  return [...stack[0].childNodes];
}
