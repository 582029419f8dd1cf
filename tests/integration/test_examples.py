"""What the applications in examples/ say over sockets and HTTP, on PostgreSQL and without."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from types import ModuleType
from typing import Any
from urllib.parse import urlencode
from uuid import uuid4

import httpx2
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.support.eventually import eventually
from tests.support.examples import imported
from tests.support.sockets import closed, serve

Client = ClientConnection


@pytest.fixture(params=["postgres", "memory"])
def layer_env(request: pytest.FixtureRequest) -> dict[str, str]:
    if request.param == "memory":
        return {"PGCHANNELS_BACKEND": "memory"}
    return {"PGCHANNELS_DATABASE_URL": request.getfixturevalue("database_url")}


class Running:
    """An example, served."""

    def __init__(self, module: ModuleType, address: str) -> None:
        self.module = module
        self.address = address

    @property
    def http(self) -> str:
        return f"http://{self.address}"

    def socket(self, path: str, **options: Any) -> connect:
        # Without a bound: what is never read would keep a client from hearing that it is closed.
        options = {
            "proxy": None,
            "open_timeout": 30,
            "max_size": 2**22,
            "max_queue": None,
            **options,
        }
        return connect(f"ws://{self.address}{path}", **options)

    async def request(self, method: str, path: str, **options: Any) -> httpx2.Response:
        async with httpx2.AsyncClient(trust_env=False, timeout=30) as client:
            return await client.request(method, f"{self.http}{path}", **options)


@asynccontextmanager
async def running(name: str, env: dict[str, str]) -> AsyncIterator[Running]:
    with imported(name, **env) as module:
        async with serve(module.app) as address:
            yield Running(module, address)


@pytest.fixture
async def chat(layer_env: dict[str, str]) -> AsyncIterator[Running]:
    env = {**layer_env, "PGCHANNELS_PRESENCE_GRACE": "0"}
    async with running("chat", env) as found:
        yield found


@pytest.fixture
async def rooms(layer_env: dict[str, str]) -> AsyncIterator[Running]:
    async with running("rooms", layer_env) as found:
        yield found


async def say(socket: Client, **content: Any) -> None:
    await socket.send(json.dumps(content))


async def hear(socket: Client, wanted: Callable[[Any], object]) -> Any:
    """The next message that is *wanted*; others are passed over."""
    async with asyncio.timeout(30):
        while True:
            message = json.loads(await socket.recv())
            if wanted(message):
                return message


async def hear_type(socket: Client, kind: str) -> Any:
    """The next message of a type: the server's own, or what was published."""
    return await hear(socket, lambda m: kind in (m.get("type"), m.get("data", {}).get("type")))


async def hear_error(socket: Client, code: str) -> Any:
    return await hear(socket, lambda m: m.get("code") == code)


# --- Chat ----------------------------------------------------------------------


@asynccontextmanager
async def user(
    chat: Running, name: str, *rooms: str, after: str = ""
) -> AsyncIterator[ClientConnection]:
    async with chat.socket(f"/live?{urlencode({'name': name, 'after': after})}") as socket:
        await hear_type(socket, "welcome")
        for room in rooms:
            await say(socket, type="room.open", room=room)
            await hear_type(socket, "room.opened")
        yield socket


async def test_what_is_said_in_a_room_is_there_and_in_its_history_page_by_page(
    chat: Running,
) -> None:
    async with user(chat, "Ada", "lobby") as ada, user(chat, "Bob", "lobby") as bob:
        for number in range(5):
            await say(ada, type="room.say", room="lobby", id=str(uuid4()), text=f"{number}")
        heard = [await hear_type(bob, "said") for _ in range(5)]
    assert [each["data"]["text"] for each in heard] == list("01234")
    assert {each["data"]["from"] for each in heard} == {"Ada"}
    texts: list[str] = []
    before = None
    while True:
        query = {"order": "desc", "limit": "2", **({"before": before} if before else {})}
        page = (await chat.request("GET", "/channels/room:lobby/messages", params=query)).json()
        texts += [each["data"]["text"] for each in page["messages"]]
        before = page["next"]
        if before is None:
            break
    assert texts == list("43210")


async def test_what_is_sent_again_is_stored_once(chat: Running) -> None:
    async with user(chat, "Ada", "lobby") as ada, user(chat, "Bob", "lobby") as bob:
        id = str(uuid4())
        for _ in range(3):
            await say(ada, type="room.say", room="lobby", id=id, text="once")
        # The same id is another message if somebody else says it.
        await say(ada, type="room.say", room="lobby", id=str(uuid4()), text="after")
        await hear(ada, lambda m: m.get("data", {}).get("text") == "after")
        await say(bob, type="room.say", room="lobby", id=id, text="mine")
        await hear(ada, lambda m: m.get("data", {}).get("text") == "mine")
    page = (await chat.request("GET", "/channels/room:lobby/messages")).json()
    assert [each["data"]["text"] for each in page["messages"]] == ["once", "after", "mine"]


async def test_a_room_is_resumed_after_a_position(chat: Running) -> None:
    async with user(chat, "Ada", "lobby") as ada:
        async with user(chat, "Bob", "lobby") as bob:
            await say(ada, type="room.say", room="lobby", id=str(uuid4()), text="first")
            position = (await hear_type(bob, "said"))["position"]
            await hear_type(ada, "said")
        for text in ("second", "third"):
            await say(ada, type="room.say", room="lobby", id=str(uuid4()), text=text)
            assert (await hear_type(ada, "said"))["data"]["text"] == text
        async with user(chat, "Bob") as bob:
            await say(bob, type="room.open", room="lobby", after=position)
            heard = [await hear_type(bob, "said") for _ in range(2)]
    assert [each["data"]["text"] for each in heard] == ["second", "third"]


async def test_a_position_of_another_log_is_refused_and_the_socket_stays(chat: Running) -> None:
    async with user(chat, "Ada") as ada:
        await say(ada, type="room.open", room="lobby", after="999-999999")
        await hear_error(ada, "unknown_position")
        await say(ada, type="room.open", room="lobby", after="0")
        await hear_type(ada, "room.opened")


async def test_private_messages_reach_all_devices_of_both_and_wait_for_who_is_away(
    chat: Running,
) -> None:
    async with AsyncExitStack() as stack:
        ada, phone, eve = [
            await stack.enter_async_context(user(chat, name, "lobby"))
            for name in ("Ada", "Ada", "Eve")
        ]
        await say(ada, type="private.say", to="Bob", id=str(uuid4()), text="psst")
        for socket in (ada, phone):
            heard = await hear_type(socket, "said")
            assert (heard["data"]["to"], heard["data"]["text"]) == ("Bob", "psst")
        async with user(chat, "Bob") as bob:
            heard = await hear_type(bob, "said")
            assert (heard["data"]["from"], heard["data"]["text"]) == ("Ada", "psst")
            await say(ada, type="private.say", to="Bob", id=str(uuid4()), text="live")
            assert (await hear_type(bob, "said"))["data"]["text"] == "live"
        # Back again, Bob has had the first one.
        async with user(chat, "Bob", after=heard["position"]) as bob:
            assert (await hear_type(bob, "said"))["data"]["text"] == "live"
        await say(eve, type="room.say", room="lobby", id=str(uuid4()), text="all that Eve hears")
        assert (await hear_type(eve, "said"))["data"]["text"] == "all that Eve hears"


async def test_private_messages_are_in_nobody_s_history(chat: Running) -> None:
    for channel in ("pgchannels:user:Bob", "presence:room:lobby", "elsewhere"):
        response = await chat.request("GET", f"/channels/{channel}/messages")
        assert response.status_code == 403


async def test_typing_is_told_to_the_others_and_stored_nowhere(chat: Running) -> None:
    async with user(chat, "Ada", "lobby") as ada, user(chat, "Bob", "lobby") as bob:
        await say(ada, type="typing", room="lobby")
        heard = await hear_type(bob, "typing")
        assert heard["ephemeral"] is True
        assert heard["data"] == {"type": "typing", "from": "Ada"}
        await say(bob, type="room.say", room="lobby", id=str(uuid4()), text="go on")
        first = await hear(ada, lambda m: m.get("channel") == "room:lobby")
        assert first["data"]["text"] == "go on"
    page = (await chat.request("GET", "/channels/room:lobby/messages")).json()
    assert [each["data"]["type"] for each in page["messages"]] == ["said"]


async def test_who_comes_and_goes_is_told_once_a_user(chat: Running) -> None:
    async with user(chat, "Ada", "lobby") as ada:
        async with user(chat, "Bob") as bob, user(chat, "Bob", "lobby"):
            await say(bob, type="room.open", room="lobby")
            opened = await hear_type(bob, "room.opened")
            assert sorted(opened["present"]) == ["Ada", "Bob"]
            joined = await hear(ada, lambda m: m.get("data", {}).get("user_id") == "Bob")
            assert joined["data"]["type"] == "presence.joined"
        left = await hear(ada, lambda m: m.get("data", {}).get("user_id") == "Bob")
        assert left["data"]["type"] == "presence.left"


async def test_a_room_that_was_left_is_heard_no_more_and_not_spoken_in(chat: Running) -> None:
    async with user(chat, "Ada", "lobby", "kitchen") as ada, user(chat, "Bob", "lobby") as bob:
        await say(ada, type="room.leave", room="lobby")
        await say(ada, type="room.say", room="lobby", id=str(uuid4()), text="x")
        await hear_error(ada, "forbidden")
        await say(ada, type="typing", room="lobby")
        await hear_error(ada, "forbidden")
        await say(bob, type="room.say", room="lobby", id=str(uuid4()), text="unheard")
        await hear_type(bob, "said")
        await say(ada, type="room.say", room="kitchen", id=str(uuid4()), text="here")
        assert (await hear_type(ada, "said"))["data"]["text"] == "here"


async def test_files_come_as_bytes_beside_the_data_with_harmless_names(chat: Running) -> None:
    content = bytes(range(256)) * 100
    file = {"name": "../../\u202eevil\x07<b>.html", "data": base64.b64encode(content).decode()}
    async with user(chat, "Ada", "lobby") as ada, user(chat, "Bob", "lobby") as bob:
        await say(ada, type="room.say", room="lobby", id=str(uuid4()), file=file)
        heard = await hear_type(bob, "said")
    sent = heard["data"]["file"]
    assert sent == {"name": "_evil__b_.html", "size": len(content), "data": None}
    assert base64.b64decode(heard["attachments"]["/file/data"]) == content


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ({"type": "room.say", "room": "lobby", "id": str(uuid4())}, "invalid_content"),
        ({"type": "room.say", "room": "lobby", "id": "1", "text": "x"}, "invalid_content"),
        ({"type": "room.say", "room": "#", "id": str(uuid4()), "text": "x"}, "invalid_content"),
        ({"type": "private.say", "to": "", "id": str(uuid4()), "text": "x"}, "invalid_content"),
        ({"type": "room.open", "room": "lobby", "after": "x"}, "invalid_position"),
        ({"type": "other"}, "unexpected_message"),
        ({"type": "room.say", "room": [[[[[[1]]]]]]}, "invalid_content"),
        (
            {
                "type": "room.say",
                "room": "lobby",
                "id": str(uuid4()),
                "file": {"name": "x", "data": base64.b64encode(bytes(200_001)).decode()},
            },
            "invalid_content",
        ),
        ({"type": "room.say", "text": "x" * 300_000}, "frame_too_large"),
    ],
)
async def test_what_does_not_fit_is_refused_and_the_socket_stays(
    chat: Running, content: dict[str, Any], code: str
) -> None:
    async with user(chat, "Ada", "lobby") as ada:
        await say(ada, **content)
        await hear_error(ada, code)
        await say(ada, type="room.say", room="lobby", id=str(uuid4()), text="still here")
        assert (await hear_type(ada, "said"))["data"]["text"] == "still here"


async def test_who_sends_too_much_is_told_to_wait(chat: Running) -> None:
    async with user(chat, "Ada", "lobby") as ada:
        for _ in range(200):
            await say(ada, type="typing", room="lobby")
        refused = await hear_error(ada, "rate_limited")
        assert refused["retry_after"] > 0


async def test_a_user_has_only_so_many_sockets(chat: Running) -> None:
    async with AsyncExitStack() as stack:
        for _ in range(10):
            await stack.enter_async_context(user(chat, "Ada"))
        socket = await stack.enter_async_context(chat.socket("/live?name=Ada"))
        assert (await hear_error(socket, "too_many_connections"))["retry_after"] > 0
        assert await closed(socket) == 1008


@pytest.mark.parametrize("name", ["", " Ada", "Ada ", "A\nda", "a" * 41])
async def test_a_name_that_is_none_is_refused(chat: Running, name: str) -> None:
    with pytest.raises(InvalidStatus):
        async with chat.socket(f"/live?{urlencode({'name': name})}"):
            pass


async def test_another_site_s_page_is_refused(chat: Running) -> None:
    with pytest.raises(InvalidStatus) as caught:
        async with chat.socket("/live?name=Ada", origin="https://elsewhere.example"):
            pass
    assert caught.value.response.status_code == 403
    async with chat.socket("/live?name=Ada", origin=chat.http) as socket:
        await hear_type(socket, "welcome")


async def test_clients_are_told_when_to_come_back(chat: Running) -> None:
    async with user(chat, "Ada") as ada:
        await chat.module.connections.drain()
        told = await hear_type(ada, "reconnect")
        assert 0 <= told["reconnect_in"] <= 10
        assert await closed(ada) == 1012


# --- Rooms ---------------------------------------------------------------------


async def token(rooms: Running, user: str) -> str:
    given = await rooms.request("POST", "/token", json={"user": user, "password": user})
    assert given.status_code == 200
    return str(given.json()["token"])


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.mark.parametrize("by", ["subprotocol", "header", "message"])
async def test_a_token_may_come_by_any_of_its_ways(rooms: Running, by: str) -> None:
    text = await token(rooms, "ada")
    options: dict[str, Any] = {}
    if by == "subprotocol":
        options = {"subprotocols": ["bearer", text]}
    elif by == "header":
        options = {"additional_headers": bearer(text)}
    async with rooms.socket("/rooms/lobby", **options) as socket:
        if by == "message":
            await say(socket, type="auth", token=text)
        welcome = await hear_type(socket, "welcome")
        assert (welcome["user"], welcome["room"]) == ("ada", "lobby")
        assert socket.subprotocol == ("bearer" if by == "subprotocol" else None)
        await say(socket, text="hello")
        said = await hear_type(socket, "said")
        assert said["data"] == {"type": "said", "from": "ada", "text": "hello"}


@asynccontextmanager
async def member(rooms: Running, text: str, room: str) -> AsyncIterator[ClientConnection]:
    async with rooms.socket(f"/rooms/{room}", subprotocols=["bearer", text]) as socket:
        yield socket


async def test_a_room_that_the_token_does_not_name_is_refused(rooms: Running) -> None:
    async with member(rooms, await token(rooms, "eve"), "lobby") as socket:
        refused = await hear_error(socket, "forbidden")
        assert refused["context"] == {"action": "subscribe", "channel": "room:lobby"}
        assert await closed(socket) == 3003


async def test_who_may_only_read_is_refused_when_writing_and_reads_on(rooms: Running) -> None:
    async with (
        member(rooms, await token(rooms, "eve"), "news") as eve,
        member(rooms, await token(rooms, "ada"), "news") as ada,
    ):
        await hear_type(eve, "welcome")
        await say(eve, text="may I?")
        assert (await hear_error(eve, "forbidden"))["context"]["action"] == "publish"
        await say(eve, nothing="to say")
        await hear_error(eve, "invalid_content")
        await hear_type(ada, "welcome")
        await say(ada, text="news")
        assert (await hear_type(eve, "said"))["data"]["text"] == "news"


async def test_no_token_or_a_bad_one_is_no_way_in(rooms: Running) -> None:
    good = await token(rooms, "ada")
    with pytest.raises(InvalidStatus) as caught:
        async with member(rooms, good[:-4] + "AAAA", "lobby"):
            pass
    assert caught.value.response.status_code == 401
    async with rooms.socket("/rooms/lobby") as socket:
        await say(socket, text="hello")
        await hear_error(socket, "unauthenticated")
        assert await closed(socket) == 3000
    for path in ("/token/refresh", "/admin/revocations"):
        assert (await rooms.request("POST", path, json={"user": "ada"})).status_code == 401


@pytest.mark.parametrize(
    ("user", "channel", "status"),
    [("ada", "room:board", 200), ("bob", "room:lobby", 200), ("bob", "room:board", 403)],
)
async def test_history_goes_by_the_token_too(
    rooms: Running, user: str, channel: str, status: int
) -> None:
    headers = bearer(await token(rooms, user))
    response = await rooms.request("GET", f"/channels/{channel}/messages", headers=headers)
    assert response.status_code == status


async def test_a_wrong_password_gets_no_token_and_ten_no_more_tries(rooms: Running) -> None:
    for user in ("bob", "nobody"):
        for _ in range(10):
            answer = await rooms.request("POST", "/token", json={"user": user, "password": ""})
            if answer.status_code == 429:
                break  # the window began before
            assert answer.status_code == 401
    statuses = [
        (await rooms.request("POST", "/token", json={"user": "bob", "password": "x"})).status_code
        for _ in range(11)
    ]
    assert 429 in statuses


async def test_a_socket_goes_on_with_a_new_token(rooms: Running) -> None:
    first = await token(rooms, "bob")
    async with member(rooms, first, "lobby") as socket:
        await hear_type(socket, "welcome")
        given = await rooms.request("POST", "/token/refresh", json={}, headers=bearer(first))
        await say(socket, type="auth.refresh", token=given.json()["token"])
        assert (await hear_type(socket, "auth.refreshed"))["expires_at"]
        await say(socket, type="auth.refresh", token=await token(rooms, "ada"))
        await hear_error(socket, "other_user")


async def test_a_token_that_expires_ends_its_socket(layer_env: dict[str, str]) -> None:
    async with running("rooms", {**layer_env, "ROOMS_TOKEN_SECONDS": "1"}) as rooms:
        text = await token(rooms, "ada")
        async with rooms.socket("/rooms/lobby") as socket:
            await say(socket, type="auth", token=text)
            await hear_error(socket, "token_expired")
            assert await closed(socket) == 3000
        answer = await rooms.request("POST", "/token/refresh", json={}, headers=bearer(text))
        assert answer.status_code == 401


async def test_revoked_tokens_close_their_sockets_and_are_no_good_any_more(rooms: Running) -> None:
    ada, bob = await token(rooms, "ada"), await token(rooms, "bob")
    admin = bearer(await token(rooms, "admin"))
    revocation = {"user_id": "ada"}
    refused = await rooms.request(
        "POST", "/admin/revocations", json=revocation, headers=bearer(bob)
    )
    assert refused.status_code == 403
    async with member(rooms, ada, "lobby") as hers, member(rooms, bob, "lobby") as his:
        for socket in (hers, his):
            await hear_type(socket, "welcome")
        done = await rooms.request("POST", "/admin/revocations", json=revocation, headers=admin)
        assert done.status_code == 202
        await hear_error(hers, "token_revoked")
        assert await closed(hers) == 3000
        await say(his, text="still here")
        await hear_type(his, "said")
    with pytest.raises(InvalidStatus):
        async with member(rooms, ada, "lobby"):
            pass
    for path in ("/channels/room:lobby/messages", "/token/refresh"):
        method = "GET" if path.startswith("/channels") else "POST"
        answer = await rooms.request(method, path, headers=bearer(ada))
        assert answer.status_code == 401


@pytest.mark.parametrize(
    "body",
    [r'{"user": "\ud800", "password": ""}', r'{"user": "\ud800"}', '{"user": NaN, "password": ""}'],
)
async def test_a_sign_in_that_no_answer_could_repeat(rooms: Running, body: str) -> None:
    headers = {"content-type": "application/json"}
    answer = await rooms.request("POST", "/token", content=body, headers=headers)
    assert answer.status_code == 422
    assert all(each.keys() == {"type", "loc", "msg"} for each in answer.json()["detail"])


async def test_after_a_revocation_a_new_sign_in_is_good(rooms: Running) -> None:
    admin = bearer(await token(rooms, "admin"))
    await rooms.request("POST", "/admin/revocations", json={"user_id": "ada"}, headers=admin)
    issue = rooms.module.issue  # a sign-in without a limit on attempts

    async def comes_in() -> Any:
        try:
            async with member(rooms, issue("ada").token, "lobby") as socket:
                return await hear_type(socket, "welcome")
        except (InvalidStatus, ConnectionClosed):
            return None

    # A token says to the second only when it was issued: one of the same second is revoked, too.
    await eventually(comes_in, timeout=60)


# --- Pages ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chat", "rooms"])
async def test_pages_let_nothing_in_that_is_not_theirs(name: str) -> None:
    async with running(name, {"PGCHANNELS_BACKEND": "memory"}) as example:
        page = await example.request("GET", "/")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert page.headers["x-content-type-options"] == "nosniff"
        # Nothing that the policy would refuse.
        assert "<style" not in page.text
        assert not re.search(r"<[^>]* (style|on\w+)=", page.text)
        script = await example.request("GET", "/client.js")
        assert script.headers["content-type"].startswith("text/javascript")
        for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert sink not in script.text
        for other in ("app.py", "page/client.js", "..%2fapp.py"):
            assert (await example.request("GET", f"/{other}")).status_code in (404, 422)
