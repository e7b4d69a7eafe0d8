// The secret of the link, requests with it, and answers that wait for the server to come back.

const secret = location.hash.slice(1);
let shelf = "label::";

// Several people in one browser keep apart, and somebody with a new link finds what the old one left.
export function shelve(name) {
  shelf = `label:${name}:`;
}

export class Refused extends Error {
  constructor(status, says) {
    super(says);
    this.status = status;
  }
}

export const hasLink = secret !== "";

// An id that no other judgement has; crypto.randomUUID is missing where the page is not on the same machine.
export function newId() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

// What the server replies. A network fault throws TypeError, a refusal Refused with the server's sentence.
export async function ask(path, body) {
  const headers = { authorization: `Bearer ${secret}` };
  if (body !== undefined) headers["content-type"] = "application/json";
  const reply = await fetch(path, {
    method: body === undefined ? "GET" : "POST",
    headers,
    body: body === undefined ? undefined : JSON.stringify(body),
    cache: "no-store",
    credentials: "omit",
  });
  if (reply.status >= 500) throw new TypeError("the server has a fault");
  if (!reply.ok) {
    const told = await reply.json().catch(() => ({}));
    throw new Refused(reply.status, told.error ?? `the server replied ${reply.status}`);
  }
  return reply;
}

export const askJson = async (path, body) => (await ask(path, body)).json();

// Kept in this browser. Storage may be full or switched off: then the server's copy is the only one.
export function keep(name, value) {
  try {
    if (value === null) localStorage.removeItem(shelf + name);
    else localStorage.setItem(shelf + name, JSON.stringify(value));
  } catch {
    return;
  }
}

export function kept(name) {
  try {
    return JSON.parse(localStorage.getItem(shelf + name));
  } catch {
    return null;
  }
}

const pause = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));

// Repeats a request until the server has taken it or refuses it; tells how it stands.
export async function insist(path, body, tell) {
  for (let wait = 0.5; ; wait = Math.min(2 * wait, 8)) {
    try {
      const reply = await askJson(path, body);
      tell("");
      return reply;
    } catch (fault) {
      if (fault instanceof Refused) {
        tell("");
        throw fault;
      }
      tell("The server can't be reached. What you did is kept in this browser and sent as soon as it is back.");
      await pause(wait);
    }
  }
}

// An answer is put down here before it is sent, so that a closed tab or a crash loses nothing. It stays until it stands
// in the record: a link that has ended, or a server that was started otherwise, refuses it for a while only.
export async function send(path, body, tell) {
  keep(`outbox:${body.id}`, { path, body }); // each its own: two windows must not drop each other's
  try {
    const reply = await insist(path, body, tell);
    drop(body);
    return reply;
  } catch (fault) {
    if (fault instanceof Refused && fault.status === 409) drop(body); // judged in another window
    throw fault;
  }
}

// Takes away what was sent, and what was refused of the same task before it was mended.
function drop(body) {
  for (const name of waiting()) {
    const left = kept(name)?.body;
    if (!left || left.id === body.id || (body.task && left.task === body.task)) keep(name, null);
  }
}

// Sends what waits; tells whether there was something.
export async function flush(tell) {
  const names = waiting();
  for (const name of names) {
    const left = kept(name);
    if (left === null) continue;
    try {
      await send(left.path, left.body, tell);
    } catch (fault) {
      if (!(fault instanceof Refused)) throw fault;
    }
  }
  return names.length > 0;
}

function waiting() {
  try {
    return Object.keys(localStorage).filter((key) => key.startsWith(`${shelf}outbox:`)).map((key) => key.slice(shelf.length));
  } catch {
    return [];
  }
}

// Elements: text is only ever text.
export function make(tag, given = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (name === "text") element.textContent = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (typeof value === "boolean") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

export function message(title, ...lines) {
  const parts = lines.map((line) => (typeof line === "string" ? make("p", { text: line }) : line));
  return make("section", { class: "message", role: "status", tabindex: "-1" }, make("h1", { text: title }), ...parts);
}
