// Markdown as elements. Text only ever becomes text nodes and attributes that are set here, so nothing
// in it can run; pictures are not loaded, links go to http, https and mailto alone.

const DEEPEST = 8;
const ITEM = /^( {0,3})([-*+]|(\d{1,9})[.)])( +|$)/;
const FENCE = /^ {0,3}(```+|~~~+)/;
const STARTS = /^ {0,3}(#{1,6} |>|```|~~~|([-*+]|1[.)]) +\S)/;
const INLINE = new RegExp([
  String.raw`\\([!-/:-@[-\x60{-~])`, // 1: escaped
  String.raw`(\x60+)([^]{1,2000}?[^\x60])\2(?!\x60)`, // 2, 3: code
  String.raw`!?\[([^\]\n]{0,500})\]\(<?([^)\s>]{1,2000})>?(?: "[^"\n]{0,200}")?\)`, // 4, 5: link, picture
  String.raw`(\*\*|__|~~)(?=\S)([^]{0,1000}?\S)\6(?![*_])`, // 6, 7: strong, struck out
  String.raw`(\*|(?<![\p{L}\p{N}])_)(?=[^\s*_])([^*_]{0,1000}?[^\s*_])\8(?![\p{L}\p{N}]*_)`, // 8, 9: emphasis
  String.raw`(https?:\/\/[^\s<>"')\]]{1,2000}[^\s<>"')\].,;:!?])`, // 10: bare link
].join("|"), "gu");

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === true) made.setAttribute(key, "");
    else if (value !== false && value != null) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

export function markdown(text) {
  const out = document.createDocumentFragment();
  blocks(text.replace(/\r\n?/g, "\n").split("\n"), out, 0);
  return out;
}

function blocks(lines, out, depth) {
  let at = 0;
  const while_ = (fits) => {
    const from = at;
    while (at < lines.length && fits(lines[at], at - from)) at += 1;
    return lines.slice(from, at);
  };
  while (at < lines.length) {
    const line = lines[at];
    const fence = line.match(FENCE);
    const heading = line.match(/^ {0,3}(#{1,6}) +(.*?)(?: +#+)?$/);
    if (!line.trim()) at += 1;
    else if (depth > DEEPEST) {
      out.append(element("p", { dir: "auto" }, lines.slice(at).join("\n")));
      return;
    } else if (fence) {
      at += 1;
      const code = while_((next) => !next.trim().startsWith(fence[1]));
      at += 1;
      out.append(element("pre", { tabindex: "0" }, element("code", {}, code.join("\n"))));
    } else if (heading) {
      at += 1;
      out.append(inline(heading[2], element("p", { class: "h", dir: "auto" }), depth));
    } else if (/^ {0,3}([-*_])( *\1){2,} *$/.test(line)) {
      at += 1;
      out.append(element("hr"));
    } else if (/^ {0,3}>/.test(line)) {
      const quoted = while_((next) => /^ {0,3}>/.test(next)).map((next) => next.replace(/^ {0,3}> ?/, ""));
      const quote = element("blockquote", { dir: "auto" });
      blocks(quoted, quote, depth + 1);
      out.append(quote);
    } else if (ITEM.test(line)) out.append(list(lines, while_, depth));
    else if (/\|/.test(line) && /^ *\|?[ :|-]*-[ :|-]*$/.test(lines[at + 1] ?? "") && /\|/.test(lines[at + 1])) {
      out.append(table(while_((next) => /\|/.test(next)), depth));
    } else {
      const said = while_((next, n) => next.trim() && !(n && STARTS.test(next)));
      out.append(inline(said.join("\n"), element("p", { dir: "auto" }), depth));
    }
  }
}

function list(lines, while_, depth) {
  let out = null;
  for (;;) {
    let found = null;
    const own = while_((next, n) => {
      if (n === 0) return (found = next.match(ITEM)) && (!out || (out.tagName === "OL") === !!found[3]);
      return /^ {2,}\S/.test(next) || (!next.trim() ? false : !STARTS.test(next) && !ITEM.test(next));
    });
    if (!own.length) return out;
    const first = found[3] && found[3] !== "1" ? found[3] : null;
    out ??= element(found[3] ? "ol" : "ul", { start: first, dir: "auto" });
    const inner = [own[0].slice(found[0].length), ...own.slice(1).map((next) => next.replace(/^ {1,4}/, ""))];
    const item = element("li", { dir: "auto" });
    if (inner.length === 1) inline(inner[0], item, depth);
    else blocks(inner, item, depth + 1);
    out.append(item);
  }
}

function table(lines, depth) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const row = (line, name) =>
    element("tr", {}, ...cells(line).map((cell) => inline(cell, element(name, { dir: "auto" }), depth)));
  const body = lines.slice(2).map((line) => row(line, "td"));
  return element("div", { class: "scroll", tabindex: "0" },
    element("table", {}, element("thead", {}, row(lines[0], "th")), element("tbody", {}, ...body)));
}

function inline(text, out, depth) {
  let from = 0;
  for (const found of depth > DEEPEST ? [] : text.matchAll(INLINE)) {
    plain(text.slice(from, found.index), out);
    from = found.index + found[0].length;
    const [whole, escaped, , code, label, link, mark, strong, , soft, bare] = found;
    if (escaped) out.append(escaped);
    else if (code) out.append(element("code", {}, code.replace(/^ (.*) $/s, "$1")));
    else if (link) out.append(anchor(link, label || link, whole));
    else if (strong) out.append(inline(strong, element(mark === "~~" ? "s" : "strong"), depth + 1));
    else if (soft) out.append(inline(soft, element("em"), depth + 1));
    else out.append(anchor(bare, bare, bare));
  }
  plain(text.slice(from), out);
  return out;
}

function plain(text, out) {
  text.split("\n").forEach((line, n) => out.append(...(n ? [element("br")] : []), line));
}

function anchor(link, label, whole) {
  if (!/^(https?:\/\/|mailto:)/i.test(link)) return whole;
  return element("a", { href: link, title: link, target: "_blank", rel: "noopener noreferrer nofollow" }, label);
}
