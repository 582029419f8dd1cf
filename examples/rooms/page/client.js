// A token, and a socket that lives by it. How to come back after a lost connection: examples/chat.
//
// The token is in this page's memory only: not in a URL, which servers log, nor in a storage, which
// any script of the site can read.

const $ = (id) => document.getElementById(id);

let token = null; // { text, user, expiresAt } or null
let socket = null; // open, or null
let refreshing = null; // the timer
const positions = new Map(); // by room: the last position that was read

// --- 1. A token --------------------------------------------------------------------------------------

$("sign-in").onsubmit = async (submitted) => {
  submitted.preventDefault();
  const user = $("user").value;
  const given = await post("/token", { user, password: $("password").value });
  if (given) hold(user, given, "Signed in");
};

function hold(user, given, what) {
  token = { text: given.token, user, expiresAt: Date.now() + given.expires_in * 1000 };
  $("whose").textContent = user;
  $("refresh").disabled = false;
  $("cap").replaceChildren(
    ...Object.entries(given.cap).map(([room, actions]) => element("li", {}, `${room}: ${actions.join(", ")}`)),
  );
  showExpiry();
  event(`${what}: a token of ${user} that is good for ${given.expires_in} s.`);
  clearTimeout(refreshing);
  // Well before it expires, for the network may be slow.
  refreshing = setTimeout(() => $("keep").checked && refresh(), given.expires_in * 600);
}

// A new token for the old one, which the open socket then goes on with.
async function refresh() {
  if (token === null) return;
  const { user } = token;
  const given = await post("/token/refresh", {}, token.text);
  if (!given || token?.user !== user) return;
  hold(user, given, "Refreshed");
  socket?.send(JSON.stringify({ type: "auth.refresh", token: given.token }));
}

$("refresh").onclick = refresh;
$("keep").onchange = () => $("keep").checked && refresh();

function showExpiry() {
  if (token === null) return;
  const left = Math.ceil((token.expiresAt - Date.now()) / 1000);
  $("expires").textContent = left > 0 ? `in ${left} s` : "has expired";
}
setInterval(showExpiry, 250);

$("user").onchange = () => {
  $("password").value = $("user").value;
  $("whom").textContent = $("user").value;
};

// --- 2. A room ---------------------------------------------------------------------------------------

$("connect").onsubmit = (submitted) => {
  submitted.preventDefault();
  if (token === null) return event("There is no token yet.");
  disconnect();
  const room = $("room").value;
  const url = new URL(`/rooms/${room}`, location.href.replace(/^http/, "ws"));
  url.searchParams.set("after", positions.get(room) ?? "0");
  if (!positions.has(room)) $("messages").replaceChildren();
  const bySubprotocol = $("by").value === "subprotocol";
  const opening = bySubprotocol ? new WebSocket(url, ["bearer", token.text]) : new WebSocket(url);
  setState("connecting", `Connecting to ${room} …`);
  opening.onopen = () => {
    if (!bySubprotocol) opening.send(JSON.stringify({ type: "auth", token: token.text }));
  };
  opening.onmessage = ({ data }) => received(opening, room, JSON.parse(data));
  opening.onclose = ({ code, reason }) => {
    if (opening !== current) return;
    closed(code === 1006 ? "Refused, or lost." : `Closed with ${code}${reason && `: ${reason}`}.`);
  };
  current = opening;
  $("disconnect").hidden = false;
};

let current = null; // also while it is not open yet

function received(from, room, message) {
  if (from !== current) return;
  if ("data" in message) return show(room, message);
  switch (message.type) {
    case "position": // after messages that the server has kept to itself
      return positions.set(room, message.position);
    case "welcome":
      socket = from;
      setState("live", `In ${room}, as ${message.user}`);
      return event(`Connected to ${room} as ${message.user}.`);
    case "auth.refreshed":
      return event(`The socket goes on until ${time(message.expires_at)}.`);
    case "error":
      if (message.code === "unknown_position") positions.delete(room); // from the beginning, next time
      return event(`The server says: ${message.detail} (${message.code}).`, "bad");
  }
}

function disconnect() {
  if (current === null) return;
  const old = current;
  closed("Disconnected.");
  old.close(1000);
}
$("disconnect").onclick = disconnect;

function closed(text) {
  current = socket = null;
  $("disconnect").hidden = true;
  setState("out", text);
  event(text);
}

function show(room, { data, position, created_at }) {
  positions.set(room, position);
  if (data.type !== "said") return;
  $("messages").append(
    element("li", {}, [
      element("b", {}, data.from),
      element("span", {}, data.text), // as text: what others write is never markup
      element("small", {}, `${room}, ${time(created_at)}`),
    ]),
  );
  $("messages").scrollTop = $("messages").scrollHeight;
}

$("say").onsubmit = (submitted) => {
  submitted.preventDefault();
  if (socket === null) return event("There is no connection.");
  socket.send(JSON.stringify({ text: $("text").value }));
  $("text").value = "";
};

// --- Revocation --------------------------------------------------------------------------------------

$("revoke").onsubmit = async (submitted) => {
  submitted.preventDefault();
  const user = $("user").value;
  const admin = await post("/token", { user: "admin", password: $("admin").value });
  if (admin && (await post("/admin/revocations", { user_id: user }, admin.token))) {
    event(`The tokens of ${user} have been revoked.`);
  }
};

// --- The page ----------------------------------------------------------------------------------------

// What it answers; null if that is an error, which is shown.
async function post(url, body, bearer) {
  const headers = { "Content-Type": "application/json" };
  if (bearer) headers.Authorization = `Bearer ${bearer}`;
  try {
    const response = await fetch(url, { method: "POST", headers, body: JSON.stringify(body) });
    const answer = await response.json();
    if (response.ok) return answer ?? {};
    event(`${url}: ${response.status}, ${words(answer.detail)}.`, "bad");
  } catch (error) {
    event(`${url}: ${error.message}.`, "bad");
  }
  return null;
}

const words = (detail) => (typeof detail === "string" ? detail : (detail?.detail ?? JSON.stringify(detail)));

function setState(state, text) {
  $("state").dataset.state = state;
  $("state").textContent = text;
}

function event(text, kind = "") {
  const row = element("li", { className: kind }, [
    element("small", {}, time(new Date())),
    element("span", {}, text),
  ]);
  $("events").prepend(row);
  while ($("events").children.length > 50) $("events").lastChild.remove();
}

function element(tag, properties, content) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...(Array.isArray(content) ? content : [content]));
  return made;
}

const time = (when) => new Date(when).toLocaleTimeString([], { hour12: false });
