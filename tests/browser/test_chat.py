"""The chat in a browser: what its page promises, also of what is written to do harm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import psycopg
import pytest
from playwright.sync_api import Page, WebSocketRoute

from tests.browser.conftest import OpenPage
from tests.support.demo import request, until
from tests.support.examples import Server

pytestmark = pytest.mark.browser

EXAMPLE = "chat"
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
EVIL = "<img src=x onerror=\"document.title='owned'\"><b>bold</b>"
# As slow as a loaded machine may be.
PATIENCE = 60_000

Enter = Callable[..., "Visitor"]


class Visitor:
    """Somebody's page."""

    def __init__(self, page: Page) -> None:
        page.set_default_timeout(PATIENCE)
        self.page = page

    def is_live(self) -> None:
        self.page.wait_for_selector("#state[data-state=live]")
        # Its room has been opened, too.
        self.page.wait_for_selector("#present:not(.old) li", state="attached")

    def say(self, text: str) -> None:
        self.page.fill("#text", text)
        self.page.press("#text", "Enter")

    def types_until(self, other: Visitor, text: str) -> None:
        """What is told of typing may be lost: it is typed again until *other* sees it."""

        def is_seen() -> bool:
            self.page.type("#text", "x")
            return text in other.page.inner_text("#typing")

        until(is_seen, timeout=PATIENCE / 1000)

    def texts(self) -> list[str]:
        return self.page.locator("#messages ol:not(.waiting) p").all_inner_texts()

    def shows(self, *texts: str) -> None:
        """Wait until exactly these are on screen, in this order."""
        until(lambda: self.texts() == list(texts), timeout=PATIENCE / 1000)
        assert not self.page.locator("#messages ol.waiting li").count()

    @contextmanager
    def its_clock_stopped(self) -> Iterator[None]:
        """No timer of the page fires, that for reconnecting either. Needs ``clock=True``."""
        self.page.clock.pause_at(self.page.evaluate("Date.now()") / 1000 + 1)
        yield
        self.page.clock.resume()

    def has(self, count: int) -> None:
        """Wait until so many messages are on screen."""
        until(lambda: len(self.texts()) == count, timeout=PATIENCE / 1000)

    def goes_to(self, conversation: str) -> None:
        self.page.locator("nav li button", has_text=conversation).click()

    def sees(self, *people: str) -> None:
        """Wait until exactly these are in the room."""
        present = self.page.locator("#present li")
        until(lambda: present.all_inner_texts() == list(people), timeout=PATIENCE / 1000)


@pytest.fixture
def enter(open_page: OpenPage) -> Enter:
    def enter(name: str, **options: Any) -> Visitor:
        visitor = Visitor(open_page(**options))
        visitor.page.fill("#name", name)
        visitor.page.press("#name", "Enter")
        visitor.is_live()
        return visitor

    return enter


def test_what_one_says_the_other_reads_and_both_see_who_is_there(enter: Enter) -> None:
    ada, bob = enter("Ada"), enter("Bob")
    for visitor in (ada, bob):
        visitor.sees("Ada", "Bob")
    ada.say("hello")
    bob.shows("hello")
    bob.say("hello, Ada")
    ada.shows("hello", "hello, Ada")
    bob.page.close()
    ada.sees("Ada")


def test_markup_in_names_texts_and_files_is_text(enter: Enter, tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)>"
    eve, bob = enter(name), enter("Bob")
    eve.say(EVIL)
    bob.shows(EVIL)
    assert bob.page.inner_text("#messages b") == name
    bob.sees("<img src=x onerror=alert(1)>", "Bob")
    eve.types_until(bob, f"{name} is typing")
    eve.page.fill("#text", "")
    eve.page.fill("#person", "Bob")
    eve.page.press("#person", "Enter")
    eve.say(EVIL)
    bob.page.locator("#people button", has_text=name).click()
    bob.shows(EVIL)
    assert bob.page.inner_text("#title") == f"@{name}"
    for visitor in (eve, bob):
        # The only elements are those that the page makes.
        assert visitor.page.locator("img, #messages :is(b b, i, script)").count() == 0
        assert "owned" not in visitor.page.title()


def test_the_page_s_policy_refuses_what_would_get_in(open_page: OpenPage) -> None:
    page = open_page(expect="TrustedHTML")
    refused = page.evaluate("""() => {
        const made = document.createElement("div");
        try {
            made.innerHTML = "<img src=x onerror='document.title = 1'>";
        } catch (error) {
            return `${error}`;
        }
    }""")
    assert "TrustedHTML" in refused


def test_typing_is_shown_and_gone(enter: Enter) -> None:
    ada, bob = enter("Ada", clock=True), enter("Bob")
    bob.types_until(ada, "Bob is typing")
    bob.say("hello")  # which is then not being typed any more
    ada.shows("hello")
    until(lambda: ada.page.inner_text("#typing") == "")
    bob.types_until(ada, "Bob is typing")
    ada.page.clock.fast_forward(6000)
    until(lambda: ada.page.inner_text("#typing") == "")
    assert bob.page.inner_text("#typing") == ""


def test_a_private_message_reaches_both_tabs_of_a_user_and_nobody_else(enter: Enter) -> None:
    ada, bob, tablet, eve = enter("Ada"), enter("Bob"), enter("Bob"), enter("Eve")
    ada.page.locator("#present button", has_text="Bob").click()
    ada.say("psst")
    ada.shows("psst")
    for visitor in (bob, tablet):
        badge = visitor.page.locator("#people button", has_text="@Ada").locator("b")
        badge.wait_for()
        assert badge.inner_text() == "1"
        visitor.goes_to("@Ada")
        visitor.shows("psst")
        assert badge.is_hidden()
    tablet.say("yes?")
    for visitor in (ada, bob, tablet):
        visitor.shows("psst", "yes?")
    ada.goes_to("#lobby")
    ada.say("to all")
    eve.shows("to all")
    assert eve.page.locator("#people li").count() == 0


def test_a_private_message_waits_for_who_is_away(enter: Enter) -> None:
    ada = enter("Ada")
    ada.page.fill("#person", "Grace")
    ada.page.press("#person", "Enter")
    ada.say("when you are back")
    ada.shows("when you are back")
    grace = enter("Grace")
    grace.page.locator("#people button", has_text="@Ada").click()
    grace.shows("when you are back")


def test_a_file_is_only_ever_saved(enter: Enter, tmp_path: Path) -> None:
    ada, bob = enter("Ada"), enter("Bob")
    content = b"<script>document.title = 'owned'</script>" + bytes(range(256))
    path = tmp_path / "do not open;.html"
    path.write_bytes(content)
    ada.page.set_input_files("#file", path)
    ada.page.locator("#chosen", has_text="do not open").wait_for()
    ada.say("look")
    bob.shows("look")
    with bob.page.expect_download() as download:
        bob.page.locator("#messages li button").click()
    assert download.value.suggested_filename == "do not open_.html"
    assert Path(download.value.path()).read_bytes() == content
    assert ada.page.locator("#chosen").is_hidden()


def test_a_file_that_is_too_large_is_not_sent(enter: Enter, tmp_path: Path) -> None:
    ada = enter("Ada")
    path = tmp_path / "large"
    path.write_bytes(bytes(200_001))
    ada.page.set_input_files("#file", path)
    ada.page.click("#say button")
    ada.page.locator("#notice", has_text="up to 200 kB").wait_for()
    ada.page.locator("#chosen button").click()
    ada.say("without")
    ada.shows("without")


def test_history_is_there_and_goes_on_backwards(enter: Enter) -> None:
    ada = enter("Ada")
    texts = [str(number) for number in range(65)]
    # Faster than the rate that is allowed: it waits, and goes on, in order.
    for text in texts:
        ada.say(text)
    ada.shows(*texts)
    bob = enter("Bob")
    bob.shows(*texts[-30:])
    for first in (5, 0):
        bob.page.click("#earlier")
        bob.shows(*texts[first:])
    assert bob.page.locator("#earlier").is_hidden()


def test_a_server_that_is_killed_and_comes_back_costs_nothing(enter: Enter, server: Server) -> None:
    ada, bob = enter("Ada", clock=True), enter("Bob")
    ada.say("before")
    bob.shows("before")
    server.kill()
    for visitor in (ada, bob):
        visitor.page.wait_for_selector("#state[data-state=connecting]")
    with ada.its_clock_stopped():  # so that she cannot be back before she has missed something
        ada.say("from Ada, meanwhile")
        bob.say("from Bob")
        server.start()
        bob.is_live()
        bob.say("and again")
        bob.shows("before", "from Bob", "and again")
        bob.page.fill("#person", "Ada")
        bob.page.press("#person", "Enter")
        bob.say("where are you?")
        bob.shows("where are you?")
        bob.goes_to("#lobby")
        assert ada.texts() == ["before"]
    ada.is_live()
    for visitor in (ada, bob):
        visitor.shows("before", "from Bob", "and again", "from Ada, meanwhile")
    bob.say("after")
    for visitor in (ada, bob):
        visitor.shows("before", "from Bob", "and again", "from Ada, meanwhile", "after")
    ada.goes_to("@Bob")
    ada.shows("where are you?")


def test_what_comes_twice_is_shown_once(enter: Enter) -> None:
    def twice(page: WebSocketRoute) -> None:
        server = page.connect_to_server()

        def forward(message: str | bytes) -> None:
            page.send(message)
            if '"position"' in str(message):
                page.send(message)

        server.on_message(forward)

    ada, bob = enter("Ada"), enter("Bob", route=twice)
    ada.page.locator("#present button", has_text="Bob").click()
    ada.say("private")
    ada.goes_to("#lobby")
    for text in ("one", "two", "three"):
        ada.say(text)
    bob.say("four")
    for visitor in (ada, bob):
        visitor.has(4)
    assert sorted(bob.texts()) == ["four", "one", "three", "two"]
    bob.goes_to("@Ada")
    bob.shows("private")


def test_what_was_lost_on_its_way_back_is_stored_once(enter: Enter) -> None:
    losses: list[str] = []

    def lossy(page: WebSocketRoute) -> None:
        server = page.connect_to_server()

        def forward(message: str | bytes) -> None:
            # It has been stored, and the page is not to know.
            if '"said"' in str(message) and len(losses) < 3:
                losses.append(str(message))
                page.close(code=3999)
                server.close()
            else:
                page.send(message)

        server.on_message(forward)

    ada, bob = enter("Ada", route=lossy), enter("Bob")
    ada.say("once")
    ada.say("and this")
    for visitor in (ada, bob):
        visitor.shows("once", "and this")
    assert len(losses) == 3


def test_it_comes_back_when_the_server_says_so(enter: Enter) -> None:
    opened: list[WebSocketRoute] = []

    def count(page: WebSocketRoute) -> None:
        opened.append(page)
        page.connect_to_server()

    ada = enter("Ada", clock=True, route=count)
    with ada.its_clock_stopped():
        opened[0].send('{"type": "reconnect", "reconnect_in": 60}')
        opened[0].close(code=1012)
        ada.page.wait_for_selector("#state[data-state=connecting]")
        # Short of what would be taken for silence.
        ada.page.clock.run_for(40_000)
        assert len(opened) == 1
        ada.page.clock.run_for(21_000)
        until(lambda: len(opened) == 2)
    ada.is_live()


def test_who_missed_what_is_no_longer_retained_reads_everything_anew(
    enter: Enter, server: Server, database_url: str
) -> None:
    ada, bob = enter("Ada", clock=True), enter("Bob")
    ada.say("old")
    bob.shows("old")
    server.kill()
    for visitor in (ada, bob):
        visitor.page.wait_for_selector("#state[data-state=connecting]")
    with ada.its_clock_stopped():
        server.start()
        bob.is_live()
        for text in ("missed", "still there"):
            bob.say(text)
        bob.shows("old", "missed", "still there")
        page = request(f"{server.url}/channels/room:lobby/messages?order=desc&limit=1")
        (last,) = page["messages"]
        # As the pruner does: all but the newest.
        with psycopg.connect(database_url, autocommit=True) as connection:
            connection.execute("update pgchannels.log set floor = %s", [last["id"] - 1])
    ada.is_live()
    ada.shows("still there")
    ada.say("go on")
    ada.shows("still there", "go on")


def test_a_server_that_shuts_down_says_when_to_come_back(enter: Enter, server: Server) -> None:
    ada, bob = enter("Ada"), enter("Bob")
    server.stop()
    server.start()
    for visitor in (ada, bob):
        visitor.is_live()
    ada.say("back")
    bob.shows("back")


@pytest.mark.parametrize("server", [{"PGCHANNELS_BACKEND": "memory"}], indirect=True)
def test_with_another_log_it_reads_everything_anew(enter: Enter, server: Server) -> None:
    ada, bob = enter("Ada"), enter("Bob")
    ada.say("forgotten")
    bob.shows("forgotten")
    server.kill()  # and with it what it kept in memory
    for visitor in (ada, bob):
        visitor.page.wait_for_selector("#state[data-state=connecting]")
    ada.say("remembered")
    server.start()
    for visitor in (ada, bob):
        visitor.is_live()
        visitor.shows("remembered")


def test_rooms_can_be_opened_and_left(enter: Enter) -> None:
    ada, bob = enter("Ada"), enter("Bob")
    for visitor in (ada, bob):
        visitor.page.fill("#room", "attic")
        visitor.page.press("#room", "Enter")
        visitor.is_live()
    ada.sees("Ada", "Bob")
    bob.say("dusty")
    ada.shows("dusty")
    bob.page.click("#leave")
    ada.sees("Ada")
    ada.say("alone")
    ada.goes_to("#lobby")
    ada.say("over here")
    bob.shows("over here")
    assert bob.page.locator("#rooms li").count() == 2


def test_a_reload_keeps_the_name_and_reads_what_there_is(enter: Enter) -> None:
    ada = enter("Ada")
    ada.say("still here")
    ada.shows("still here")
    ada.page.reload()
    ada.is_live()
    ada.shows("still here")


def test_it_fits_and_can_be_read(enter: Enter) -> None:
    page = enter("A" * 40).page
    page.fill("#text", "x" * 300)
    page.press("#text", "Enter")
    page.wait_for_selector("#messages li")
    for width in (1200, 600, 360):
        page.set_viewport_size({"width": width, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("document.documentElement.scrollHeight") <= 700
    for scheme in SCHEMES:
        page.emulate_media(color_scheme=scheme)
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(int, ground.removeprefix("rgb(").removesuffix(")").split(",")))
        assert (brightness < 200) == (scheme == "dark")
    # Whatever can be used has a name that a screen reader can say.
    for control in page.locator("button, input").all():
        if control.is_visible():
            assert control.evaluate("e => e.labels?.[0]?.textContent || e.textContent")
