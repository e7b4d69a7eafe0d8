// The guidelines beside a task: a small part of Markdown, made of elements whose text is only ever text.

import { make } from "./talk.js";

function words(line) {
  return line.split(/(\*\*[^*]+\*\*|\*[^*\s][^*]*\*|`[^`]+`)/).map((part) => {
    if (/^\*\*.+\*\*$/.test(part)) return make("strong", { text: part.slice(2, -2) });
    if (/^\*.+\*$/.test(part)) return make("em", { text: part.slice(1, -1) });
    if (/^`.+`$/.test(part)) return make("code", { text: part.slice(1, -1) });
    return document.createTextNode(part);
  });
}

// Headings (#), lists (-, * or 1.), paragraphs, **bold**, *emphasis* and `code`; all else stands as it is written.
function blocks(text) {
  const made = [];
  let list = null;
  let paragraph = null;
  for (const line of text.split(/\r?\n/)) {
    const heading = /^#{1,6}\s+(.*)$/.exec(line);
    const item = /^\s*(?:[-*]|\d+[.)])\s+(.*)$/.exec(line);
    if (item) {
      if (!list) made.push((list = make("ul")));
      list.append(make("li", {}, ...words(item[1])));
      paragraph = null;
    } else if (heading) {
      made.push(make("h3", {}, ...words(heading[1])));
      list = paragraph = null;
    } else if (!line.trim()) {
      list = paragraph = null;
    } else if (paragraph) {
      paragraph.append(" ", ...words(line));
    } else if (list) {
      list.lastChild.append(" ", ...words(line.trim()));
    } else {
      made.push((paragraph = make("p", {}, ...words(line))));
    }
  }
  return made;
}

export function guide(text) {
  if (!text.trim()) return null;
  const wide = window.matchMedia("(min-width: 62rem)").matches;
  const inside = make("div", { class: "guide", tabindex: "0", role: "region", "aria-label": "Guidelines" }, ...blocks(text));
  return make("section", { class: "beside" }, make("details", { open: wide }, make("summary", { text: "Guidelines" }), inside));
}
