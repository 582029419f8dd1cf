// How this page stays complete, whatever happens to servers and networks:
//
// 1. It loads a room's history over REST, and follows after the position that came with it: no gap.
// 2. It keeps the last position of each channel. When its socket is lost it connects again, after a
//    while that is different for each page, and resumes after them. Any server will do.
// 3. It drops what it has had already, by id.
// 4. What it sends has an id of its own, and is sent again until it comes back: stored once.
// 5. When it is told that it asks for what is not there any more, it reads everything anew.
//
// Nothing that others write becomes markup: it is only ever given to textContent and its like.

const $ = (id) => document.getElementById(id);
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

const ROOMS = ["lobby", "kitchen"];
const HISTORY = 30; // messages that are loaded at once
const CONNECT_TIME = 5000; // milliseconds, as all below
const SILENCE = 45_000; // the server says something every 15 s
const BACKOFF = { first: 250, most: 10_000 };
const TYPING = { every: 2000, shown: 5000 };

const conversations = new Map(); // by "#room" and "@person"
let shown = null; // the one on screen
let name = "";
let maxFile = 200_000; // bytes; the server says
let socket = null; // one that has been welcomed, or null

// What is sent to this user, whoever from: one channel for all.
const privately = { position: "0", ids: new Set() };

// --- Following ---------------------------------------------------------------------------------------

async function run() {
  for (let attempt = 0; ; attempt += 1) {
    let wait = null; // seconds, as the server says
    try {
      const open = await connect();
      const end = await follow(open);
      if (end.welcomed) attempt = 0;
      wait = end.wait;
    } catch (error) {
      if (!(error instanceof Unreachable)) throw error;
    }
    setState("connecting", `Connecting as ${name} …`);
    // With jitter, or all the pages that a server leaves behind would come back at once.
    const most = Math.min(BACKOFF.most, BACKOFF.first * 2 ** attempt);
    await sleep(wait === null ? most * (0.5 + Math.random() / 2) : wait * 1000);
  }
}

class Unreachable extends Error {}
class Outdated extends Error {} // what it asks for is of another log: see startOver()

function connect() {
  const url = new URL("/live", location.href.replace(/^http/, "ws"));
  url.searchParams.set("name", name);
  url.searchParams.set("after", privately.position);
  const opening = new WebSocket(url);
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => opening.close(), CONNECT_TIME);
    opening.onopen = () => (clearTimeout(timer), resolve(opening));
    opening.onclose = () => (clearTimeout(timer), reject(new Unreachable()));
  });
}

// Until the socket is closed; then, whether it served, and when to come back if the server said so.
function follow(open) {
  const end = { welcomed: false, wait: null };
  return new Promise((resolve) => {
    let silence = null;
    const heard = () => {
      clearTimeout(silence);
      silence = setTimeout(() => (open.close(), closed()), SILENCE);
    };
    heard();
    open.onmessage = ({ data }) => {
      heard();
      const message = JSON.parse(data);
      if ("data" in message) return receive(message);
      switch (message.type) {
        case "position":
          return passed(message);
        case "welcome":
          end.welcomed = true;
          return welcome(open, message);
        case "room.opened":
          return opened(message);
        case "ping":
          return open.send(JSON.stringify({ type: "pong" }));
        case "reconnect": // this server shuts down
          end.wait = message.reconnect_in;
          return;
        case "truncated":
          return startOver(open);
        case "error":
          return refused(open, message, end);
      }
    };
    open.onclose = closed;
    function closed() {
      // A close may take its time when nobody answers: this socket is not listened to any more.
      open.onmessage = open.onclose = null;
      clearTimeout(silence);
      socket = sending = null;
      for (const room of rooms()) Object.assign(room, { isOpen: false, early: [] });
      showPresent();
      resolve(end);
    }
  });
}

function welcome(open, message) {
  socket = open;
  maxFile = message.max_file;
  setState("live", `Signed in as ${name}`);
  notice("");
  for (const room of rooms()) openRoom(room);
  sendNext();
}

function send(content) {
  socket.send(JSON.stringify(content));
}

function refused(open, { code, detail, retry_after }, end) {
  if (code === "unknown_position") return startOver(open); // another database, or one set back
  notice(`The server says: ${detail}`);
  if (code === "too_many_connections" || code === "draining") end.wait = retry_after ?? null;
  if (!sending) return;
  if (retry_after !== undefined) setTimeout(sendAgain, retry_after * 1000, open);
  else if (/^invalid_|too_large/.test(code)) dropSending();
}

// The server does not have what this page would have to read to be complete.
function startOver(open) {
  for (const each of conversations.values()) {
    Object.assign(each, { position: null, earlier: null, ids: new Set() });
    each.list.replaceChildren();
  }
  Object.assign(privately, { position: "0", ids: new Set() });
  showEarlier();
  open.onmessage = null;
  open.close();
}

// --- Messages ----------------------------------------------------------------------------------------

function receive(message) {
  const { channel, data, ephemeral } = message;
  if (channel.startsWith("presence:room:")) {
    presence(conversations.get(`#${channel.slice(14)}`), message);
  } else if (channel.startsWith("room:")) {
    const room = conversations.get(`#${channel.slice(5)}`);
    if (room === undefined) return; // it was left
    if (ephemeral) typing(room, data.from);
    else take(room, room, message);
  } else if (data.type === "said") {
    const other = data.from === name ? data.to : data.from;
    take(privately, conversation("@", other), message);
  }
}

// The server has kept some messages to itself. They are not to come again.
function passed({ channel, position }) {
  if (channel.startsWith("presence:")) return;
  const read = channel.startsWith("room:") ? conversations.get(`#${channel.slice(5)}`) : privately;
  if (read) read.position = position;
}

// *read* says how far that channel has been read.
function take(read, where, message) {
  if (read.ids.has(message.id)) return;
  read.ids.add(message.id);
  read.position = message.position;
  const { data } = message;
  confirm(data);
  typing(where, data.from, false);
  const atEnd = isAtEnd();
  where.list.append(row(message));
  if (where === shown) atEnd && scrollToEnd();
  else if (data.from !== name) unread(where, where.unread + 1);
}

function row({ id, data, attachments, created_at }) {
  const when = created_at ? new Date(created_at).toLocaleTimeString([], { hour12: false }) : "";
  const made = element("li", { className: data.from === name ? "own" : "" }, [
    element("b", {}, data.from),
    element("p", {}, data.text),
    element("small", {}, when),
  ]);
  if (id) made.dataset.id = id;
  if (data.file) made.append(fileButton(data.file, attachments?.["/file/data"]));
  return made;
}

// A file is only ever saved: whatever it is, the browser is told that it is just bytes.
function fileButton(file, base64) {
  const safe = file.name.replace(/[^\p{L}\p{N}_.() -]/gu, "_").replace(/^\.+/, "") || "file";
  const size = file.size < 1000 ? `${file.size} B` : `${Math.round(file.size / 1000)} kB`;
  const button = element("button", { type: "button", disabled: !base64 }, `⤓ ${safe}, ${size}`);
  button.onclick = () => {
    const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
    const url = URL.createObjectURL(new Blob([bytes], { type: "application/octet-stream" }));
    element("a", { href: url, download: safe }, "").click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  };
  return button;
}

async function loadHistory(room, before = null) {
  const query = new URLSearchParams({ order: "desc", limit: HISTORY });
  if (before !== null) query.set("before", before);
  const page = await get(`/channels/room:${room.name}/messages?${query}`);
  const added = page.messages.filter(({ id }) => !room.ids.has(id)).reverse();
  for (const { id } of added) room.ids.add(id);
  room.list.prepend(...added.map(row));
  room.earlier = page.next;
  if (before === null) {
    room.position = page.position;
    if (room === shown) scrollToEnd();
  }
  showEarlier();
}

$("earlier").onclick = async () => {
  const room = shown;
  const fromEnd = $("scroll").scrollHeight - $("scroll").scrollTop;
  $("earlier").disabled = true;
  try {
    await loadHistory(room, room.earlier);
    if (room === shown) $("scroll").scrollTop = $("scroll").scrollHeight - fromEnd;
  } catch (error) {
    if (error instanceof Outdated && socket) return startOver(socket);
    if (!(error instanceof Unreachable)) throw error;
    notice("The server does not answer. Try again in a moment.");
  } finally {
    $("earlier").disabled = false;
  }
};

// --- Sending: one after the other, so that the order stays, and each until it has come back ---------

const waiting = []; // { id, content, where, row }
let sending = null; // the one that is on its way

$("say").onsubmit = async (submitted) => {
  submitted.preventDefault();
  const where = shown;
  const text = $("text").value.trim();
  const [file] = $("file").files;
  if (!text && !file) return;
  if (file && file.size > maxFile) {
    return notice(`A file may have up to ${Math.round(maxFile / 1000)} kB.`);
  }
  $("text").value = "";
  typedAt = -Infinity; // what is typed from now on is another message
  chooseFile(null);
  notice("");
  const id = crypto.randomUUID?.() ?? uuid();
  const content = { id, text, ...where.address };
  if (file) content.file = { name: file.name, data: await base64(file) };
  const shownFile = file && { name: file.name, size: file.size };
  const made = row({ data: { from: name, text, file: shownFile } });
  waiting.push({ id, content, where, row: made });
  where.waiting.append(made);
  if (where === shown) scrollToEnd();
  sendNext();
};

function sendNext() {
  const next = waiting[0];
  if (!socket || sending || !next) return;
  if (next.where.isRoom && !next.where.isOpen) return; // as soon as it is
  sending = next;
  send(next.content);
}

function sendAgain(open) {
  if (socket !== open) return;
  sending = null;
  sendNext();
}

function confirm(data) {
  if (data.from !== name || data.id !== waiting[0]?.id) return;
  dropSending();
}

function dropSending() {
  waiting.shift().row.remove();
  sending = null;
  sendNext();
}

function base64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

// Where the page is served neither by HTTPS nor from this machine, the browser has no other.
function uuid() {
  const hex = [...crypto.getRandomValues(new Uint8Array(16))].map((b) => b.toString(16).padStart(2, "0"));
  return hex.join("").replace(/(.{8})(.{4})(.{4})(.{4})/, "$1-$2-$3-$4-");
}

// --- Rooms: who is there, who is typing -------------------------------------------------------------

async function openRoom(room) {
  const open = socket;
  try {
    if (room.position === null) await loadHistory(room);
  } catch (error) {
    if (!(error instanceof Unreachable)) throw error;
    return open.close(); // what does not answer is not connected either
  }
  if (socket !== open || !conversations.has(`#${room.name}`)) return;
  send({ type: "room.open", room: room.name, after: room.position });
}

function opened({ room: roomName, present }) {
  const room = conversations.get(`#${roomName}`);
  if (room === undefined) return;
  room.isOpen = true;
  room.present = new Set(present);
  // What was told before this answer may be older than it, or newer: the last word on each counts.
  for (const message of room.early.splice(0)) count(room, message);
  showPresent();
  sendNext();
}

function presence(room, message) {
  if (room === undefined) return;
  if (!room.isOpen) return room.early.push(message);
  count(room, message);
  showPresent();
}

function count(room, { data }) {
  if (data.type === "presence.joined") room.present.add(data.user_id);
  else room.present.delete(data.user_id);
}

function typing(where, who, is = true) {
  clearTimeout(where.typing.get(who));
  where.typing.delete(who);
  if (is) where.typing.set(who, setTimeout(() => typing(where, who, false), TYPING.shown));
  showTyping();
}

let typedAt = -Infinity;

$("text").oninput = () => {
  if (!socket || !shown.isOpen || performance.now() - typedAt < TYPING.every) return;
  typedAt = performance.now();
  send({ type: "typing", room: shown.name });
};

// --- Conversations -----------------------------------------------------------------------------------

const rooms = () => [...conversations.values()].filter(({ isRoom }) => isRoom);

function conversation(sign, called) {
  const known = conversations.get(sign + called);
  if (known) return known;
  const isRoom = sign === "#";
  const made = {
    name: called,
    isRoom,
    address: isRoom ? { type: "room.say", room: called } : { type: "private.say", to: called },
    position: null, // of a room: after which to go on
    ids: new Set(), // of a room: what has come
    earlier: null, // of a room: where what is before it begins
    isOpen: false, // the server has said so
    present: new Set(),
    early: [], // who came and went before it was open
    typing: new Map(),
    unread: 0,
    list: element("ol", {}, []),
    waiting: element("ol", { className: "waiting" }, []),
    badge: element("b", { hidden: true }, ""),
    button: element("button", { type: "button" }, [element("span", {}, sign + called)]),
  };
  made.button.append(made.badge);
  made.button.onclick = () => show(made);
  conversations.set(sign + called, made);
  $(isRoom ? "rooms" : "people").append(element("li", {}, [made.button]));
  return made;
}

function show(which) {
  shown = which;
  for (const each of conversations.values()) each.button.setAttribute("aria-current", each === which);
  unread(which, 0);
  $("title").textContent = (which.isRoom ? "#" : "@") + which.name;
  $("leave").hidden = !which.isRoom || rooms().length < 2;
  $("messages").replaceChildren(which.list, which.waiting);
  showEarlier();
  showPresent();
  showTyping();
  scrollToEnd();
}

function unread(where, number) {
  where.unread = number;
  where.badge.textContent = number;
  where.badge.hidden = !number;
}

$("open").onsubmit = (submitted) => {
  submitted.preventDefault();
  const isNew = !conversations.has(`#${$("room").value}`);
  const room = conversation("#", $("room").value);
  $("room").value = "";
  show(room);
  if (isNew && socket) openRoom(room); // connecting opens all
};

$("write").onsubmit = (submitted) => {
  submitted.preventDefault();
  const called = $("person").value.trim();
  $("person").value = "";
  if (called) show(conversation("@", called));
};

$("leave").onclick = () => {
  const room = shown;
  if (socket) send({ type: "room.leave", room: room.name });
  conversations.delete(`#${room.name}`);
  room.button.parentElement.remove();
  waiting.splice(0, Infinity, ...waiting.filter(({ where }) => where !== room));
  if (sending?.where === room) sending = null;
  sendNext();
  show(rooms()[0]);
};

// --- The page ----------------------------------------------------------------------------------------

$("enter").onsubmit = (submitted) => {
  submitted.preventDefault();
  const given = $("name").value.trim();
  if (given) enter(given);
};

function enter(given) {
  name = given;
  sessionStorage.setItem("name", name);
  $("enter").hidden = true;
  $("chat").hidden = false;
  for (const room of ROOMS) conversation("#", room);
  show(rooms()[0]);
  setState("connecting", `Connecting as ${name} …`);
  run();
}

async function get(url) {
  let response;
  try {
    response = await fetch(url);
    if (response.ok) return await response.json();
  } catch (error) {
    throw new Unreachable(url, { cause: error });
  }
  if (response.status === 410) throw new Outdated(url);
  if (response.status >= 500) throw new Unreachable(url);
  throw new Error(`${url}: ${response.status}`);
}

$("file").onchange = () => chooseFile($("file").files[0]);
$("chosen").querySelector("button").onclick = () => chooseFile(null);

function chooseFile(file) {
  if (!file) $("file").value = "";
  $("chosen").hidden = !file;
  $("chosen").querySelector("span").textContent = file ? file.name : "";
}

function showEarlier() {
  $("earlier").hidden = !shown?.earlier;
}

function showPresent() {
  $("present").hidden = !shown.isRoom;
  $("present").className = shown.isOpen ? "" : "old";
  const people = [...shown.present].sort((a, b) => a.localeCompare(b));
  $("present").replaceChildren(
    ...people.map((person) => {
      const button = element("button", { type: "button", title: "Write to them" }, person);
      button.onclick = () => show(conversation("@", person));
      return element("li", {}, [button]);
    }),
  );
}

function showTyping() {
  const people = [...shown.typing.keys()];
  const verb = people.length === 1 ? "is" : "are";
  $("typing").textContent = people.length ? `${people.join(", ")} ${verb} typing …` : "";
}

function setState(state, text) {
  $("state").dataset.state = state;
  $("state").textContent = text;
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

const isAtEnd = () => {
  const { scrollHeight, scrollTop, clientHeight } = $("scroll");
  return scrollHeight - scrollTop - clientHeight < 40;
};

function scrollToEnd() {
  $("scroll").scrollTop = $("scroll").scrollHeight;
}

function element(tag, properties, content) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...(Array.isArray(content) ? content : [content]));
  return made;
}

if (sessionStorage.getItem("name")) enter(sessionStorage.getItem("name"));
