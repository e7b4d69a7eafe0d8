// The owner's page: who labels how much, how fast and how well, and the rows to train on.

import { Refused, ask, askJson, hasLink, make, message } from "./talk.js";

const at = (id) => document.getElementById(id);
const percent = (value) => (value === null ? "–" : `${Math.round(100 * value)}%`);
const number = (value, digits = 0) => (value === null ? "–" : value.toFixed(digits));
const sign = (value) => (value === null ? "–" : `${value > 0 ? "+" : ""}${Math.round(100 * value)}%`);

function warn(says) {
  at("warning").textContent = says;
  at("warning").hidden = says === "";
}

// The mean accuracy over the last tests, from 0 below to 1 above, a line at one half.
function drift(values, name) {
  if (values.length < 2) return make("span", { text: "–" });
  const svg = (tag, given) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(given)) element.setAttribute(key, value);
    return element;
  };
  const told = `Accuracy of ${name} over time, from ${percent(values[0])} to ${percent(values[values.length - 1])}`;
  const picture = svg("svg", { class: "drift", viewBox: "0 0 100 24", preserveAspectRatio: "none", role: "img", "aria-label": told });
  const points = values.map((value, k) => `${(100 * k) / (values.length - 1)},${22 - 20 * value}`);
  picture.append(svg("line", { x1: 0, x2: 100, y1: 12, y2: 12 }), svg("polyline", { points: points.join(" ") }));
  return picture;
}

function figures(pairs) {
  return make("dl", { class: "figures" }, ...pairs.map(([name, value]) => make("div", {}, make("dt", { text: name }), make("dd", { text: value }))));
}

function table(people, paid) {
  const columns = [
    ["Who", (one) => one.name], ["Judged", (one) => one.judgements], ["Can't judge", (one) => percent(one.unsure)],
    ["Taken back", (one) => one.taken_back], ["Seconds each", (one) => number(one.seconds)], ["Hours", (one) => number(one.hours, 2)],
    ...(paid ? [["Cost", (one) => number(one.cost, 2)]] : []),
    ["Tests", (one) => one.tests], ["Right", (one) => percent(one.accuracy)], ["Change", (one) => sign(one.change)],
    ["Drift", (one) => drift(one.drift, one.name)], ["Agrees", (one) => percent(one.agreement)],
    ["Flags", (one) => Object.values(one.flags).reduce((a, b) => a + b, 0)],
  ];
  const cell = (tag, value, more = {}) => (value instanceof Element ? make(tag, more, value) : make(tag, { ...more, text: String(value) }));
  const head = make("tr", {}, ...columns.map(([name]) => make("th", { scope: "col", text: name, class: name === "Drift" ? "left" : "" })));
  const rows = people.map((one) => make("tr", {}, ...columns.map(([name, of], k) => (k ? cell("td", of(one), { class: name === "Drift" ? "left" : "" }) : cell("th", of(one), { scope: "row" })))));
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Labellers" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)));
}

async function save(kind) {
  try {
    const reply = await ask(`/api/rows/${kind}`);
    const address = URL.createObjectURL(await reply.blob());
    make("a", { href: address, download: `${kind}.jsonl` }).click();
    setTimeout(() => URL.revokeObjectURL(address), 10000);
    warn("");
  } catch (fault) {
    warn(fault instanceof Refused ? fault.message : "The server can't be reached; start it again with the same command.");
  }
}

function draw(found) {
  const { tasks } = found;
  at("count").textContent = `${tasks.complete} of ${tasks.all} complete`;
  const summary = [
    ["Tasks complete", `${tasks.complete} / ${tasks.all}`], ["Tests", String(tasks.tests)], ["Judgements", String(found.judgements)],
    ["Two people agree", percent(found.agreement)], ["Hours", number(found.hours, 2)],
  ];
  if (found.cost !== null) summary.push(["Cost", number(found.cost, 2)], ["Cost a label", number(found.cost_per_label, 2)]);
  const people = make("section", {}, make("h2", { text: "Labellers" }));
  if (found.labellers.length) people.append(table(found.labellers, found.cost !== null));
  else people.append(make("p", { class: "soft", text: "Nobody has a link yet." }));
  people.append(
    make("p", { class: "soft", text: "Right: share of the known order that was found, 50% by chance. Drift: the same over the last 10 tests, at each test. Change: the later half of the tests less the earlier. Agrees: how often somebody else says the same of the same two answers." }),
  );
  const buttons = found.exports.map((kind) => make("button", { type: "button", text: kind[0].toUpperCase() + kind.slice(1), onclick: () => save(kind) }));
  at("main").replaceChildren(
    make("section", {}, figures(summary)),
    people,
    make("section", {}, make("h2", { text: "Rows to train on" }), make("div", { class: "buttons" }, ...buttons)),
  );
}

async function load() {
  if (!hasLink) return at("main").replaceChildren(message("This page needs its own link", "Open the whole link that the program printed, with all that stands behind the # sign."));
  try {
    draw(await askJson("/api/overview"));
    warn("");
  } catch (fault) {
    if (fault instanceof Refused) at("main").replaceChildren(message("This link does not work", fault.message));
    else warn("The server can't be reached; start it again with the same command.");
  }
}

at("again").addEventListener("click", load);
window.addEventListener("hashchange", () => location.reload());
load();
