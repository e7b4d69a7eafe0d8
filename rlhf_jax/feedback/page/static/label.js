// A labeller's page: one task at a time, everything kept while it is being thought about.

import { guide } from "./guide.js";
import { LETTERS, rankingBoard, ranks } from "./ranking.js";
import { Refused, ask, flush, hasLink, insist, keep, kept, make, message, newId, send, shelve } from "./talk.js";

const at = (id) => document.getElementById(id);
const MARKS = [[1, "Good"], [0, "Neutral"], [-1, "Bad"]];
let turn = null; // the server's last reply
let begun = null; // what has been said so far of turn.task
let seen = 0; // when the task came into view, or 0 while it is out of it
let sending = false;
let saving = 0;
let waiting = 0; // the timer that looks again
let round = 0; // of looking for what is next: a reply that comes late is not of the last one

function warn(says) {
  at("warning").textContent = says;
  at("warning").hidden = says === "";
}

// What is begun

function fresh(task) {
  const each = (value) => task.answers.map(() => value);
  return { at: 0, seconds: 0, places: each(0), marks: each(null), ratings: each(null), flags: task.answers.map(() => []), rewrites: {}, note: "" };
}

function fits(draft, task) {
  const lists = ["places", "marks", "ratings", "flags"];
  return draft !== null && typeof draft === "object" && lists.every((name) => draft[name]?.length === task.answers.length);
}

// The newest of this browser's draft and the server's, else what was taken back, else nothing. The server may have been
// started with another scale since.
function restored(task) {
  const found = newest(task);
  const fit = (rating) => (Number.isInteger(rating) && rating >= 1 && rating <= turn.scale ? rating : null);
  return { ...found, ratings: found.ratings.map(fit) };
}

function newest(task) {
  const drafts = [kept(`draft:${task.id}`), task.draft].filter((draft) => fits(draft, task));
  if (drafts.length) return drafts.sort((a, b) => b.at - a.at)[0];
  const made = fresh(task);
  const before = task.before;
  if (!before) return made;
  if (before.ranks.length) made.places = before.ranks.map((rank) => ranks(before.ranks)[before.ranks.indexOf(rank)] + 1);
  for (const name of ["marks", "ratings", "flags"]) if (before[name].length) made[name] = before[name];
  return { ...made, note: before.note, rewrites: Object.fromEntries(before.rewrites) };
}

function look() {
  if (seen) begun.seconds += (performance.now() - seen) / 1000;
  seen = document.visibilityState === "visible" ? performance.now() : 0;
}

function changed() {
  look();
  begun.at = Date.now();
  keep(`draft:${turn.task.id}`, begun);
  at("saved").textContent = "Draft kept";
  clearTimeout(saving);
  saving = setTimeout(() => {
    if (!sending) ask("/api/draft", { task: turn.task.id, draft: begun }).catch(() => {}); // this browser has it too
  }, 800);
}

// Saying it

function missing() {
  const task = turn.task;
  const names = task.answers.map((_, k) => (task.kind === "steps" ? `step ${k + 1}` : LETTERS[k]));
  const open = names.filter((_, k) => (task.kind === "steps" ? begun.marks[k] === null : !begun.places[k]));
  if (!open.length) return "";
  return task.kind === "steps" ? `Still to mark: ${open.join(", ")}.` : `Still to rank: ${open.join(", ")}.`;
}

// While something is sent, nothing can be changed that would not be sent with it.
async function held(path, body) {
  clearTimeout(saving);
  const focused = document.activeElement;
  sending = at("main").inert = true;
  try {
    return await send(path, body, warn);
  } finally {
    sending = at("main").inert = false;
    if (focused instanceof HTMLElement) focused.focus({ preventScroll: true });
  }
}

async function finish(kind) {
  if (sending || !begun) return;
  const says = kind === "unsure" ? "" : missing();
  at("missing").textContent = says;
  if (says) return;
  look();
  const task = turn.task;
  const body = {
    id: newId(), task: task.id, kind, replaces: task.replaces, guidelines: turn.guidelines.version,
    seconds: Math.round(10 * begun.seconds) / 10, note: begun.note, flags: begun.flags,
    ratings: turn.scale ? begun.ratings : [],
    ranks: kind === "ranking" ? ranks(begun.places) : [], marks: kind === "steps" ? begun.marks : [],
    rewrites: Object.entries(begun.rewrites).filter(([k, text]) => text.trim() && text !== task.answers[k]).map(([k, text]) => [Number(k), text]),
  };
  try {
    await held("/api/judgement", body);
    keep(`draft:${task.id}`, null);
  } catch (fault) {
    if (!(fault instanceof Refused)) throw fault;
    if (fault.status !== 409) return fault.status === 401 ? unknown() : warn(fault.message);
    keep(`draft:${task.id}`, null); // judged in another window: what is next is said by the server
  }
  await next();
}

async function undo() {
  if (sending || !turn?.undo) return;
  try {
    await held("/api/undo", { last: turn.undo, id: newId() });
  } catch (fault) {
    if (!(fault instanceof Refused)) throw fault;
  }
  await next();
}

// Drawing

function choice(kind, name, value, label, picked, on, flag = "") {
  const input = make("input", { type: kind, name, value: String(value), onchange: on });
  input.checked = picked;
  return make("label", { class: `choice ${flag}` }, input, make("span", { text: label }));
}

function group(legend, hidden, ...choices) {
  return make("fieldset", {}, make("legend", {}, make("span", { text: legend })), ...choices.filter(Boolean), hidden);
}

function prompt(task) {
  const turns = task.prompt.map(({ role, text }) =>
    make("div", { class: "turn" }, role ? make("div", { class: "soft", text: role }) : null, make("div", { class: "text", dir: "auto", text })),
  );
  return make("section", { class: "prompt", tabindex: "-1", "aria-labelledby": "asked" }, make("h2", { id: "asked", text: "Prompt" }), ...turns);
}

function card(task, answer, move) {
  const letter = LETTERS[answer];
  const places = task.answers.map((_, k) =>
    choice("radio", `place-${letter}`, k + 1, String(k + 1), begun.places[answer] === k + 1, () => move(answer, k + 1)),
  );
  const title = make("h2", { id: `answer-${letter}` }, make("span", { class: "letter", text: letter, "aria-label": `Answer ${letter}` }));
  const head = make("header", {}, title, group("Place", null, ...places));
  const box = make("textarea", { rows: "6", "aria-label": `Your own version of answer ${letter}`, dir: "auto" });
  box.value = begun.rewrites[answer] ?? "";
  box.hidden = !(answer in begun.rewrites);
  box.addEventListener("input", () => {
    begun.rewrites[answer] = box.value;
    changed();
  });
  const rewrite = make("button", { type: "button", text: box.hidden ? "Rewrite" : "Drop my version" });
  rewrite.addEventListener("click", () => {
    if (box.hidden) begun.rewrites[answer] = box.value = task.answers[answer];
    else delete begun.rewrites[answer];
    box.hidden = !box.hidden;
    rewrite.textContent = box.hidden ? "Rewrite" : "Drop my version";
    if (!box.hidden) box.focus();
    changed();
  });
  const foot = make("div", { class: "foot" }, flags(answer, letter), rewrite);
  const text = make("div", { class: "text", dir: "auto", text: task.answers[answer] });
  return make(
    "article", { class: "card", tabindex: "-1", "data-answer": String(answer), "aria-labelledby": `answer-${letter}` },
    head, text, box, turn.scale ? rating(answer, letter) : null, foot,
  );
}

function flags(answer, letter) {
  const boxes = turn.flags.map((flag) =>
    choice("checkbox", `flag-${letter}`, flag, flag, begun.flags[answer].includes(flag), (event) => {
      const others = begun.flags[answer].filter((one) => one !== flag);
      begun.flags[answer] = event.target.checked ? [...others, flag] : others;
      changed();
    }, "flag"),
  );
  return group("Flag", null, ...boxes);
}

function rating(answer, letter) {
  const marks = Array.from({ length: turn.scale }, (_, k) =>
    choice("radio", `rating-${letter}`, k + 1, String(k + 1), begun.ratings[answer] === k + 1, () => {
      begun.ratings[answer] = k + 1;
      changed();
    }),
  );
  return group("Rating", null, ...marks);
}

function stepList(task) {
  const rows = task.answers.map((text, k) => {
    const marks = MARKS.map(([mark, name]) =>
      choice("radio", `mark-${k}`, mark, name, begun.marks[k] === mark, () => {
        begun.marks[k] = mark;
        changed();
      }),
    );
    return make("li", {}, make("div", { class: "text", dir: "auto", text }), group(`Step ${k + 1}`, null, ...marks));
  });
  return make("section", { "aria-labelledby": "steps" }, make("h2", { id: "steps", text: "Steps of the answer" }), make("ol", { class: "steps" }, ...rows));
}

function keys(task) {
  const letters = `${LETTERS[0]} – ${LETTERS[task.answers.length - 1]}`;
  const rows = [[letters, "go to an answer"], [`1 – ${task.answers.length}`, "its place; the same place is a tie"], ["0", "no place yet"],
    ["↑ ↓", "move a letter of the ranking"], ["Ctrl + Enter", "save and go on"]];
  const steps = [["Tab", "from step to step"], ["← →", "good, neutral, bad"], ["Ctrl + Enter", "save and go on"]];
  const items = (task.kind === "steps" ? steps : rows).flatMap(([key, does]) => [make("dt", {}, make("kbd", { text: key })), make("dd", { text: does })]);
  return make("details", { class: "keys" }, make("summary", { text: "Keys" }), make("dl", {}, ...items));
}

function draw() {
  const task = turn.task;
  const ranked = task.kind === "ranking";
  let board = null;
  const move = (answer, place) => {
    begun.places[answer] = place;
    for (const input of document.querySelectorAll(`input[name="place-${LETTERS[answer]}"]`)) input.checked = Number(input.value) === place;
    board.draw();
    at("missing").textContent = "";
    changed();
  };
  if (ranked) board = rankingBoard(begun.places, move);
  const note = make("textarea", { rows: "2", "aria-label": "Note, if you like", placeholder: "Note, if you like", maxlength: "2000" });
  note.value = begun.note;
  note.addEventListener("input", () => {
    begun.note = note.value;
    changed();
  });
  const save = make("button", { type: "button", class: "main", id: "save", text: "Save and go on", onclick: () => finish(task.kind) });
  const unsure = make("button", { type: "button", id: "unsure", text: "Can't judge", onclick: () => finish("unsure") });
  const says = make("section", { "aria-label": "Your judgement" });
  says.append(make("h2", { text: ranked ? "Ranking" : "Your judgement" }));
  if (ranked) says.append(make("p", { class: "soft", text: "Drag each letter to its place; letters in one place are tied." }), board.list);
  says.append(make("p", { id: "missing", class: "warning", role: "alert" }), note, make("div", { class: "actions" }, save, unsure));
  const side = make("aside", { class: "side" }, says, guide(turn.guidelines.text), make("section", {}, keys(task)));
  const answers = ranked
    ? make("div", { class: "answers" }, ...task.answers.map((_, k) => card(task, k, move)))
    : stepList(task);
  const left = make("div", { class: "task" }, first(), prompt(task), answers);
  at("main").dataset.says = "";
  at("main").replaceChildren(left, side);
  document.onkeydown = (event) => key(event, task, move);
}

function first() {
  if (!turn.qualifying) return null;
  const [done, of] = turn.qualifying;
  const says = `First round, task ${done + 1} of ${of}. The answers to these tasks are known; they show whether the guidelines are clear to you.`;
  return make("section", { class: "first", role: "status", text: says });
}

function key(event, task, move) {
  if (sending || !begun) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    finish(task.kind);
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || event.target instanceof HTMLTextAreaElement || task.kind === "steps") return;
  const answer = LETTERS.indexOf(event.key.toUpperCase());
  if (event.key.length === 1 && answer >= 0 && answer < task.answers.length) {
    const goal = document.querySelector(`.card[data-answer="${answer}"]`);
    goal.focus({ preventScroll: true });
    goal.scrollIntoView({ block: "nearest" });
  }
  const here = document.activeElement?.closest("[data-answer]");
  const place = /^[0-9]$/.test(event.key) ? Number(event.key) : NaN;
  if (here && place <= task.answers.length) move(Number(here.dataset.answer), place);
}

// What is next

function show(...parts) {
  document.onkeydown = null;
  const says = JSON.stringify(parts);
  if (at("main").dataset.says === says) return; // a screen reader would say it again
  at("main").dataset.says = says;
  at("main").replaceChildren(message(...parts));
}

function unknown() {
  at("undo").hidden = at("progress").hidden = true;
  show("This link does not work", "It may have been replaced by a newer one. Please ask whoever sent it to you.");
}

const MESSAGES = {
  failed: () => ["Thank you for trying", "In the first round your answers and the known ones differed too often, so there are no more tasks here for you.",
    "That says nothing about your judgement: guidelines are easily read in more than one way. Whoever sent you the link can tell you more."],
  wait: () => ["Nothing to do at the moment", "The last tasks are with other people. This page looks again every few seconds."],
  done: () => ["All done", `There are no tasks left for you. You judged ${turn.done}. Thank you!`],
};

async function next() {
  clearTimeout(waiting);
  if (begun) at("main").inert = true; // what is shown is over
  begun = null;
  const own = ++round;
  let found;
  try {
    do found = await insist("/api/turn", undefined, warn);
    while (await arrived(found));
    if (own !== round) return;
    turn = found;
  } catch (fault) {
    if (!(fault instanceof Refused)) throw fault;
    return fault.status === 401 ? unknown() : show("This link is not for labelling", fault.message);
  } finally {
    at("main").inert = false;
  }
  at("who").textContent = turn.name;
  at("count").textContent = turn.task || turn.state === "wait" ? `${turn.done} done · ${turn.left} left` : `${turn.done} done`;
  at("progress").hidden = turn.state === "failed";
  at("progress").value = turn.done + turn.left ? turn.done / (turn.done + turn.left) : 1;
  at("undo").hidden = !turn.undo;
  at("saved").textContent = "";
  if (!turn.task) {
    show(...MESSAGES[turn.state]());
    if (turn.state === "wait") waiting = setTimeout(() => sending || next(), 5000); // whoever sends comes here after it
    return;
  }
  begun = restored(turn.task);
  seen = 0;
  look();
  draw();
  document.querySelector(".prompt").focus({ preventScroll: true }); // what a screen reader goes on with
  window.scrollTo(0, 0);
}

let home = false; // whether what waited in this browser was sent

// The first reply says whose browser this is: then what was left unsent is sent, and asked again what is next.
async function arrived({ shelf }) {
  if (home) return false;
  home = true;
  shelve(shelf);
  return flush(warn);
}

async function start() {
  if (!hasLink) return show("This page needs your own link", "Open the whole link that you were sent, with all that stands behind the # sign.");
  at("undo").addEventListener("click", undo);
  document.addEventListener("visibilitychange", () => begun && look());
  window.addEventListener("hashchange", () => location.reload()); // another link in the same tab
  await next();
}

start();
