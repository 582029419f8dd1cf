// How this page stays complete, whatever happens to the servers:
//
// 1. It loads history over REST, and follows live after the position that came with it: no gap.
// 2. It keeps the last position of each channel. When its socket is lost, it connects to another
//    server and resumes after them. Any server will do: they all read one log.
// 3. It drops what it has had already, by id. A repeat is rare, and harmless.
// 4. Frames with a type are the server's own. One of them tells the position after messages that
//    the server has kept to itself.
//
// And it does not just claim so: check() compares the board with the table of orders.

const $ = (id) => document.getElementById(id);
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const random = (choices) => choices[Math.floor(Math.random() * choices.length)];

const HISTORY = 50; // messages of a channel that are loaded at first
const ROWS = 200; // that a list keeps on screen
const CONNECT_TIME = 3000; // milliseconds

// What is known of a channel: all ids that came, and after which position to go on.
const channel = (show) => ({ show, position: null, ids: new Set(), lastId: 0 });
const channels = { orders: channel(showOrder), chat: channel(showChat) };

const counts = { received: 0, recovered: 0, repeats: 0, disordered: 0, skipped: 0 };

let nodes = []; // where all servers are
let node = ""; // the one that this page talks to
const away = new Set(); // those that do not answer
let socket = null; // open, or null
let newest = null; // ids up to which this socket brings what was missed; null when it has

// --- Following ---------------------------------------------------------------------------------------

async function run() {
  nodes = (await get(`${location.origin}/node`)).urls;
  node = nodes.find((url) => new URL(url).port === location.port) ?? nodes[0];
  watchTheOthers();
  let attempt = 0;
  let lostAt = null;
  for (;;) {
    try {
      if (channels.orders.position === null) await loadHistory();
      const open = await connect();
      if (await follow(open, lostAt)) {
        attempt = 0;
        lostAt = performance.now();
      }
    } catch (error) {
      if (!(error instanceof Unreachable)) throw error;
      away.add(node);
    }
    node = nodes[(nodes.indexOf(node) + 1) % nodes.length];
    setState("connecting", `Connecting to ${short(node)} …`);
    // With jitter, or all the pages that a server leaves behind would come to the next one at once.
    await sleep(100 + Math.random() * Math.min(3000, 300 * 2 ** attempt));
    attempt += 1;
  }
}

class Unreachable extends Error {}

// Whether the servers that this page is not connected to are there.
async function watchTheOthers() {
  for (;;) {
    for (const url of nodes.filter((url) => url !== node)) {
      try {
        await get(`${url}/node`);
        away.delete(url);
      } catch (error) {
        if (!(error instanceof Unreachable)) throw error;
        away.add(url);
      }
    }
    showNodes();
    await sleep(1500);
  }
}

async function loadHistory() {
  // In this order: whatever is not in the table yet must come by a message.
  const [latest] = await get(`${node}/orders?limit=1`);
  board.start(latest?.number ?? 0);
  for (const [name, channel] of Object.entries(channels)) {
    const page = await get(`${node}/channels/${name}/messages?order=desc&limit=${HISTORY}`);
    for (const message of page.messages.reverse()) take(message);
    channel.position = page.position;
  }
}

function connect() {
  const url = new URL(node.replace(/^http/, "ws") + "/live");
  for (const [name, { position }] of Object.entries(channels)) url.searchParams.set(name, position);
  const opening = new WebSocket(url);
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => opening.close(), CONNECT_TIME);
    opening.onopen = () => (clearTimeout(timer), resolve(opening));
    opening.onclose = () => (clearTimeout(timer), reject(new Unreachable()));
  });
}

// Until the socket is closed; then, whether there was a server behind it that could serve.
function follow(open, lostAt) {
  let replayed = counts.recovered;
  return new Promise((resolve) => {
    open.onmessage = ({ data }) => {
      const message = JSON.parse(data);
      if (message.type === "welcome") welcome(message);
      else if (message.type === "truncated") startOver("Some of what was missed is no longer retained");
      else if (message.type === "error") refused(message);
      else if (message.type === "position") channels[message.channel].position = message.position;
      else if (message.type === undefined) receive(message);
    };
    open.onclose = () => {
      const served = socket !== null;
      if (served) {
        event(`Lost the connection to ${short(node)}.`);
        away.add(node);
      }
      socket = newest = null;
      resolve(served);
    };
  });

  function welcome(message) {
    socket = open;
    newest = message.newest;
    const after = lostAt === null ? "" : `, ${seconds(performance.now() - lostAt)} later`;
    event(`Connected to ${message.node}, process ${message.pid}${after}.`);
    away.delete(node);
    setState("live", `Connected to ${message.node}`);
    catchUp();
  }

  function receive(message) {
    take(message, { missed: message.id <= (newest?.[message.channel] ?? 0) });
    catchUp();
  }

  function catchUp() {
    if (!newest || Object.entries(channels).some(([name, { lastId }]) => lastId < newest[name])) return;
    newest = null;
    replayed = counts.recovered - replayed;
    if (lostAt !== null) event(`Recovered: ${plural(replayed, "message")} replayed.`);
    sendUnconfirmed();
    checkSoon();
  }

  function refused({ code, detail }) {
    // Another database, or one that was put back to an earlier state.
    if (code === "unknown_position") startOver("The history has changed");
    else event(`The server says: ${detail}`);
    if (code === "unavailable") open.close();
  }

  function startOver(why) {
    event(`${why}: loading it anew.`);
    for (const channel of Object.values(channels)) {
      Object.assign(channel, { position: null, ids: new Set(), lastId: 0 });
    }
    $("orders").replaceChildren();
    $("chat").replaceChildren();
    heard.clear();
    open.onmessage = null;
    open.close();
  }
}

function take(message, { missed = false } = {}) {
  const channel = channels[message.channel];
  if (channel.ids.has(message.id)) return count("repeats");
  if (message.id < channel.lastId) count("disordered");
  channel.ids.add(message.id);
  channel.lastId = Math.max(channel.lastId, message.id);
  channel.position = message.position;
  count("received");
  if (missed) count("recovered");
  $("position").textContent = `last position ${message.position}`;
  channel.show(message);
}

// --- Orders ------------------------------------------------------------------------------------------

const MENU = ["Espresso", "Flat white", "Cappuccino", "Croissant", "Cheesecake", "Iced tea", "Bagel"];

function showOrder({ data, created_at }) {
  board.numbers.add(data.number);
  const row = element("li", {}, [
    element("b", {}, `#${data.number}`),
    element("span", {}, data.item),
    element("small", {}, `by ${data.node}, ${time(created_at)}`),
  ]);
  row.dataset.number = data.number;
  $("orders").prepend(row);
  while ($("orders").children.length > ROWS) $("orders").lastChild.remove();
  checkSoon();
}

async function order(path) {
  try {
    return await get(`${node}${path}`, { item: random(MENU) });
  } catch (error) {
    if (!(error instanceof Unreachable)) throw error;
    event(`${short(node)} did not answer. If the order was committed, it will be here.`);
    return null;
  }
}

$("place").onclick = () => order("/orders");

$("fail").onclick = async () => {
  const placed = await order("/orders/rolled-back");
  if (placed) event(`Order #${placed.number} was rolled back, and its message with it.`);
};

let ordering = null;

$("keep").onchange = () => {
  clearInterval(ordering);
  if ($("keep").checked) ordering = setInterval(() => socket && order("/orders"), 500);
};

$("kill").onclick = () => {
  event(`Killing ${short(node)} …`);
  // It dies before it can answer; the socket's end is what tells.
  fetch(`${node}/node/kill`, { method: "POST" }).catch(() => {});
};

// --- Chat --------------------------------------------------------------------------------------------

const TAB = crypto.randomUUID?.() ?? String(Math.random()); // this page, until it is closed
let seq = 0;
let unconfirmed = []; // sent by this page, and not come back through the log yet
const heard = new Map(); // each tab's last sequence number

function showChat({ data, created_at }) {
  if (data.tab === TAB) unconfirmed = unconfirmed.filter((message) => message.seq !== data.seq);
  // A page that is not sure whether a message got through sends it again.
  const last = heard.get(data.tab) ?? data.seq - 1;
  if (data.seq <= last) return count("repeats");
  counts.skipped += data.seq - last - 1;
  heard.set(data.tab, data.seq);
  const row = element("li", data.tab === TAB ? { className: "own" } : {}, [
    element("b", {}, data.name),
    element("span", {}, data.text), // as text: what others write is never markup
    element("small", {}, time(created_at)),
  ]);
  const list = $("chat");
  const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 40;
  list.append(row);
  while (list.children.length > ROWS) list.firstChild.remove();
  if (atEnd) list.scrollTop = list.scrollHeight;
}

$("say").onsubmit = (submitted) => {
  submitted.preventDefault();
  const [name, text] = [$("name").value.trim(), $("text").value.trim()];
  $("text").value = "";
  if (!name || !text) return;
  seq += 1;
  const message = { name, text, tab: TAB, seq };
  unconfirmed.push(message);
  if (socket && !newest) socket.send(JSON.stringify(message));
};

function sendUnconfirmed() {
  for (const message of unconfirmed) socket.send(JSON.stringify(message));
}

$("name").value = random(["Ada", "Alan", "Barbara", "Edsger", "Grace", "Ken", "Margaret", "Tony"]);

// --- Is anything missing? ----------------------------------------------------------------------------

const board = {
  numbers: new Set(), // of the orders that a message has told about
  first: 0, // orders with numbers above this were placed after the page was opened
  start(first) {
    this.numbers = new Set();
    this.first = first;
  },
};

let checking = null;

function checkSoon() {
  checking ??= sleep(700).then(check).finally(() => (checking = null));
}

async function check() {
  try {
    let wrong = await compare();
    if (wrong.length) {
      await sleep(1500); // committed, and on its way
      wrong = await compare();
    }
    const { size } = placed();
    const missing = wrong.length + counts.skipped;
    const ok = missing + counts.disordered === 0;
    $("missing").textContent = missing;
    $("verdict").dataset.verdict = ok ? "ok" : "bad";
    $("check").textContent = ok
      ? `Compared with the table at ${time(new Date())}: ${plural(size, "order")} placed since this page was opened, ` +
        `all here, once each and in order.`
      : `Not as in the table: ${wrong.map((number) => `#${number}`).join(", ")}; ` +
        `${counts.skipped} of the chat skipped, ${counts.disordered} out of order.`;
  } catch (error) {
    if (!(error instanceof Unreachable)) throw error; // the next connection checks again
  }
}

const placed = () => new Set([...board.numbers].filter((number) => number > board.first));

// The numbers that are on one side only: in the table, or on the board.
async function compare() {
  const before = placed();
  const table = new Set();
  for (let after = board.first, page; ; after = page.at(-1).number) {
    page = await get(`${node}/orders?after=${after}&limit=1000`);
    for (const { number } of page) table.add(number);
    if (page.length < 1000) break;
  }
  return [
    ...[...table].filter((number) => !board.numbers.has(number)),
    ...[...before].filter((number) => !table.has(number)),
  ];
}

// --- The page ----------------------------------------------------------------------------------------

async function get(url, body) {
  const options = body && {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  };
  let response;
  try {
    response = await fetch(url, options);
    if (response.ok) return await response.json();
  } catch (error) {
    throw new Unreachable(url, { cause: error });
  }
  if (response.status >= 500) throw new Unreachable(url);
  throw new Error(`${url}: ${response.status}`);
}

function setState(state, text) {
  $("state").dataset.state = state;
  $("state").textContent = text;
  for (const id of ["place", "fail", "kill"]) $(id).disabled = state !== "live";
  document.title = state === "live" ? `${short(node)} · pgchannels demo` : "pgchannels demo";
  showNodes();
}

function showNodes() {
  const { state } = $("state").dataset;
  $("nodes").replaceChildren(
    ...nodes.map((url) => {
      const here = url === node;
      const link = element("a", { href: url, target: "_blank", rel: "noopener" }, "open in a new tab");
      const isAway = !here && away.has(url);
      const note = here ? (state === "live" ? "this page is here" : "trying …") : isAway ? "away" : link;
      const item = element("li", {}, [
        element("b", {}, short(url)),
        element("span", {}, new URL(url).host),
        element("small", {}, [note]),
      ]);
      item.dataset.here = here ? state : isAway ? "away" : "";
      return item;
    }),
  );
}

function event(text) {
  const row = element("li", {}, [element("small", {}, time(new Date())), element("span", {}, text)]);
  $("events").prepend(row);
  while ($("events").children.length > 30) $("events").lastChild.remove();
}

function count(name) {
  counts[name] += 1;
  if ($(name)) $(name).textContent = counts[name];
}

function element(tag, properties, content) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...(Array.isArray(content) ? content : [content]));
  return made;
}

const short = (url) => `node ${nodes.indexOf(url) + 1}`;
const time = (when) => new Date(when).toLocaleTimeString([], { hour12: false });
const seconds = (ms) => `${(ms / 1000).toFixed(1)} s`;
const plural = (n, noun) => `${n} ${noun}${n === 1 ? "" : "s"}`;

run();
