// The places that answers are dragged to, by mouse, finger or keyboard; several in one place are tied.

import { make } from "./talk.js";

export const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";

// places: for each answer its place from 1, or 0 while it has none. move(answer, place) is called on a change.
export function rankingBoard(places, move) {
  const count = places.length;
  const names = ["Not yet", ...Array.from(places, (_, k) => (k === 0 ? "1 · best" : k === count - 1 ? `${k + 1} · worst` : `${k + 1}`))];
  const rows = names.map((name, place) =>
    make("li", { class: "place", "data-place": String(place), "aria-label": place ? `Place ${name}` : "Not ranked yet" }, make("span", { text: name })),
  );
  const chips = places.map((_, answer) => chip(answer, places, move));
  const list = make("ol", { class: "places", "aria-label": "Ranking" }, ...rows.slice(1), rows[0]);
  const draw = () => {
    const focused = document.activeElement;
    chips.forEach((one, answer) => {
      if (one.parentElement !== rows[places[answer]]) rows[places[answer]].append(one);
      const at = places[answer] ? `in place ${places[answer]} of ${count}` : "not ranked yet";
      one.setAttribute("aria-label", `Answer ${LETTERS[answer]}, ${at}. Up and down arrows move it.`);
    });
    rows[0].hidden = !places.includes(0) && count > 0;
    if (focused instanceof HTMLElement && chips.includes(focused)) focused.focus();
  };
  draw();
  return { list, draw };
}

function chip(answer, places, move) {
  const button = make("button", { type: "button", class: "chip", text: LETTERS[answer], "data-answer": String(answer) });
  let start = null;
  const under = (event) => {
    button.style.pointerEvents = "none"; // what lies below it
    const row = document.elementFromPoint(event.clientX, event.clientY)?.closest(".place") ?? null;
    button.style.pointerEvents = "";
    return row;
  };
  const light = (row) => document.querySelectorAll(".place").forEach((one) => one.classList.toggle("over", one === row));
  const drop = () => {
    start = null;
    button.classList.remove("held");
    button.style.transform = "";
    light(null);
  };
  button.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    start = [event.clientX, event.clientY];
    button.setPointerCapture(event.pointerId);
  });
  button.addEventListener("pointermove", (event) => {
    if (start === null) return;
    const [x, y] = [event.clientX - start[0], event.clientY - start[1]];
    if (!button.classList.contains("held") && Math.hypot(x, y) < 4) return;
    button.classList.add("held");
    button.style.transform = `translate(${x}px, ${y}px)`;
    light(under(event));
  });
  button.addEventListener("pointerup", (event) => {
    const row = start !== null && button.classList.contains("held") ? under(event) : null;
    drop();
    if (row !== null) move(answer, Number(row.dataset.place));
  });
  button.addEventListener("pointercancel", drop);
  button.addEventListener("keydown", (event) => {
    const by = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    const now = places[answer];
    // From the tray, which stands below the last place, up leads to the last one and down to the first.
    const next = now === 0 ? (by < 0 ? places.length : 1) : Math.min(Math.max(now + by, 1), places.length);
    move(answer, next);
    button.focus();
  });
  return button;
}

// Places as ranks from 0 without gaps: 1, 1, 4 are 0, 0, 1.
export function ranks(places) {
  const order = [...new Set(places)].sort((a, b) => a - b);
  return places.map((place) => order.indexOf(place));
}
