// Markdown as elements. A model's words are never parsed as HTML: all text goes through text nodes, addresses are
// checked, and no picture is fetched.
"use strict";

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const WORDS = new Set(("abstract and as assert async await bool break case catch class const continue def default del do double elif " +
  "else enum except export extends false False final finally float fn for from function global if impl import in int " +
  "interface is lambda let long loop match mod mut namespace new nil None nonlocal not null or package pass private " +
  "protected pub public raise return select self static str string struct super switch this throw trait true True try " +
  "type typeof undefined union unsigned use using var virtual void where while with yield SELECT FROM WHERE JOIN GROUP " +
  "BY ORDER INSERT UPDATE DELETE CREATE TABLE AND OR NOT NULL echo fi then done esac").split(" "));
const HASHES = /^(py|python|sh|bash|zsh|shell|console|ruby|rb|perl|r|yaml|yml|toml|make|makefile|dockerfile|ini|conf)$/i;

function highlight(code, language) {
  const found = document.createDocumentFragment();
  if (code.length > 40000 || /^(text|txt|plain|output|markdown|md)$/i.test(language)) {
    found.append(code);
    return found;
  }
  const comment = HASHES.test(language) ? "#[^\\n]*" : /^(sql|lua|haskell)$/i.test(language) ? "--[^\\n]*"
    : /^(json|html|xml|diff)$/i.test(language) ? "<!--[\\s\\S]*?(?:-->|$)" : "//[^\\n]*|/\\*[\\s\\S]*?(?:\\*/|$)" + (language ? "" : "|#[^\\n]*");
  const string = '"""[\\s\\S]*?(?:"""|$)|"(?:\\\\.|[^"\\\\\\n])*"?|\'(?:\\\\.|[^\'\\\\\\n])*\'?|`(?:\\\\.|[^`\\\\])*`?';
  const parts = new RegExp(`(${comment})|(${string})|\\b(\\d[\\w.]*)|([A-Za-z_$][\\w$]*)(?=(\\s*\\()?)`, "g");
  let at = 0;
  for (const match of code.matchAll(parts)) {
    const kind = match[1] ? "c" : match[2] ? "s" : match[3] ? "n" : WORDS.has(match[4]) ? "k" : match[5] ? "f" : "";
    if (!kind || !match[0]) continue;
    found.append(code.slice(at, match.index), make("span", { class: kind }, match[0]));
    at = match.index + match[0].length;
  }
  found.append(code.slice(at));
  return found;
}

function codeBlock(code, language) {
  const copy = make("button", { class: "copy", type: "button" }, "Copy");
  copy.addEventListener("click", () => copyText(code, copy));
  return make("div", { class: "code" }, make("div", {}, make("span", {}, language || "code"), copy),
    make("pre", { tabindex: "0" }, make("code", {}, highlight(code, language))));
}

async function copyText(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // no permission, or no secure page
    const area = make("textarea", {});
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const before = [...button.childNodes];
  button.replaceChildren("Copied");
  setTimeout(() => button.replaceChildren(...before), 1200);
}

const INLINE = /(`+)([\s\S]*?[^`])\1(?!`)|!?\[([^\[\]]*)\]\(\s*<?([^\s()<>]*(?:\([^\s()<>]*\)[^\s()<>]*)*)>?(?:\s+"[^"]*")?\s*\)|\*\*(?=\S)([\s\S]*?\S)\*\*(?!\*)|__(?=\S)([\s\S]*?\S)__(?!\w)|\*(?=[^\s*])([\s\S]*?[^\s*])\*(?!\*)|(?<!\w)_(?=[^\s_])([\s\S]*?[^\s_])_(?!\w)|~~(?=\S)([\s\S]*?\S)~~|\\([\\`*_{}\[\]()#+\-.!|~>])|(https?:\/\/[^\s<>"')\]]*[^\s<>"')\].,;:!?])|( {2,}\n|\\\n)/;

function inline(text, depth = 0) {
  const found = document.createDocumentFragment();
  while (text) {
    const match = depth < 12 && text.length < 6000 ? INLINE.exec(text) : null;
    if (!match) {
      found.append(text);
      break;
    }
    found.append(text.slice(0, match.index));
    const [whole, , code, label, address, bold, bold2, italic, italic2, struck, escaped, bare, line] = match;
    if (code !== undefined) found.append(make("code", {}, code.replace(/^ ([\s\S]*\S[\s\S]*) $/, "$1")));
    else if (address !== undefined) found.append(link(address, label || address, depth, whole));
    else if (bold ?? bold2) found.append(make("strong", {}, inline(bold ?? bold2, depth + 1)));
    else if (italic ?? italic2) found.append(make("em", {}, inline(italic ?? italic2, depth + 1)));
    else if (struck) found.append(make("del", {}, inline(struck, depth + 1)));
    else if (escaped) found.append(escaped);
    else if (bare) found.append(link(bare, bare, 99, bare));
    else if (line) found.append(make("br"));
    text = text.slice(match.index + whole.length);
  }
  return found;
}

function link(address, label, depth, whole) {
  if (!/^(https?:\/\/|mailto:)[^\s]+$/i.test(address)) return document.createTextNode(whole);
  return make("a", { href: address, target: "_blank", rel: "noopener noreferrer nofollow" }, depth > 12 ? label : inline(label, depth + 12));
}

const FENCE = /^( {0,12})(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/, ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(\s+|$)/, RULE = /^ {0,3}([-*_])\s*(\1\s*){2,}$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/, QUOTE = /^ {0,3}> ?/, CELLS = /^\s*\|?(\s*:?-+:?\s*\|)+\s*:?-*:?\s*$/;

// The text cut into blocks that stand alone: what has been written stays as it is while more comes.
function blocks(text) {
  const found = [];
  let open = [], fence = null;
  const close = () => { if (open.length) found.push(open.join("\n")); open = []; };
  for (const given of text.split("\n")) {
    const line = fence ? given : given.replace(/^[ \t]+/, (spaces) => spaces.replace(/\t/g, "    "));
    const mark = FENCE.exec(line);
    if (fence) {
      open.push(line);
      if (new RegExp(`^\\s*${fence.sign[0]}{${fence.sign.length},}\\s*$`).test(line)) {
        if (fence.alone) close();
        fence = null;
      }
      continue;
    }
    const inList = ITEM.test(open[0] || "");
    if (inList && line.trim() && !open[open.length - 1].trim() && !ITEM.test(line) && !/^\s/.test(line)) close();
    if (mark && (!mark[1] || !inList)) close();
    if (mark) {
      fence = { sign: mark[2], alone: !open.length };
      open.push(line);
    } else if (!line.trim()) {
      if (ITEM.test(open[0] || "")) open.push(line); else close();
    } else {
      if (HEADING.test(line)) close();
      open.push(line);
      if (HEADING.test(line)) close();
    }
  }
  close();
  return found;
}

function block(source, depth = 0) {
  const lines = source.split("\n"), found = document.createDocumentFragment();
  let at = 0;
  const paragraph = [];
  const flush = () => { if (paragraph.length) found.append(make("p", {}, inline(paragraph.splice(0).join("\n")))); };
  while (at < lines.length) {
    const line = lines[at], fence = FENCE.exec(line), heading = HEADING.exec(line);
    if (depth > 8) { paragraph.push(line); at += 1; continue; }
    if (fence) {
      flush();
      const end = new RegExp(`^\\s*${fence[2][0]}{${fence[2].length},}\\s*$`), code = [];
      while (++at < lines.length && !end.test(lines[at])) code.push(lines[at].replace(new RegExp(`^ {0,${fence[1].length}}`), ""));
      found.append(codeBlock(code.join("\n"), fence[3].slice(0, 30)));
      at += 1;
    } else if (heading) {
      flush();
      found.append(make("h" + heading[1].length, {}, inline(heading[2])));
      at += 1;
    } else if (RULE.test(line)) {
      flush();
      found.append(make("hr"));
      at += 1;
    } else if (QUOTE.test(line)) {
      flush();
      const inner = [];
      while (at < lines.length && QUOTE.test(lines[at])) inner.push(lines[at++].replace(QUOTE, ""));
      found.append(make("blockquote", {}, ...rendered(inner.join("\n"), depth + 1)));
    } else if (line.includes("|") && at + 1 < lines.length && CELLS.test(lines[at + 1])) {
      flush();
      at = table(lines, at, found);
    } else if (ITEM.test(line) && (!paragraph.length || !/^\s*\d/.test(line) || /^\s*1[.)]/.test(line))) {
      flush();
      at = list(lines, at, found, depth);
    } else {
      if (line.trim()) paragraph.push(line.trimStart()); else flush();
      at += 1;
    }
  }
  flush();
  return found;
}

function rendered(text, depth) {
  return blocks(text).map((each) => block(each, depth));
}

function list(lines, at, found, depth) {
  const first = ITEM.exec(lines[at]), indent = first[1].length, ordered = /\d/.test(first[2]);
  const start = parseInt(first[2]), box = make(ordered ? "ol" : "ul", ordered && start !== 1 ? { start } : {});
  while (at < lines.length) {
    const item = ITEM.exec(lines[at]);
    if (!item || item[1].length > indent + 1 || item[1].length < indent || /\d/.test(item[2]) !== ordered) break;
    const width = item[0].length, inner = [lines[at++].slice(width)];
    while (at < lines.length) {
      const next = lines[at], deep = next.length - next.trimStart().length, mark = ITEM.exec(next);
      if (next.trim() && (mark ? deep <= indent + 1 : deep <= indent && !lines[at - 1].trim())) break;
      inner.push(deep >= width ? next.slice(width) : next.trimStart());
      at += 1;
    }
    const task = /^\[([ xX])\]\s+/.exec(inner[0]);
    if (task) inner[0] = (task[1] === " " ? "☐ " : "☑ ") + inner[0].slice(task[0].length);
    const text = inner.join("\n").replace(/\s+$/, "");
    const loose = /\n\s*\n/.test(text);
    const parts = make("li", {}, ...rendered(text, depth + 1));
    if (!loose && parts.firstElementChild?.tagName === "P") parts.firstElementChild.replaceWith(...parts.firstElementChild.childNodes);
    box.append(parts);
  }
  found.append(box);
  return at;
}

function table(lines, at, found) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replace(/\\\|/g, "|"));
  const sides = cells(lines[at + 1]).map((cell) => (/^-+:$/.test(cell) ? "right" : /^:-+:$/.test(cell) ? "center" : ""));
  const row = (line, tag) => make("tr", {}, ...sides.map((side, column) => make(tag, side ? { class: side } : {}, inline(cells(line)[column] ?? ""))));
  const body = make("tbody"), box = make("table", {}, make("thead", {}, row(lines[at], "th")), body);
  at += 2;
  while (at < lines.length && lines[at].includes("|")) body.append(row(lines[at++], "td"));
  found.append(make("div", { class: "table" }, box));
  return at;
}

// Writes a text into an element, block by block; blocks that have not changed stay as they are, selections in them too.
function renderInto(element, text) {
  const sources = blocks(text.replace(/\r\n?/g, "\n"));
  const shown = element.shown ?? (element.shown = []);
  let same = 0;
  while (same < shown.length && same < sources.length && shown[same].source === sources[same]) same += 1;
  for (const old of shown.splice(same)) old.nodes.forEach((node) => node.remove());
  for (const source of sources.slice(same)) {
    const nodes = [...block(source).childNodes];
    element.append(...nodes);
    shown.push({ source, nodes });
  }
}
