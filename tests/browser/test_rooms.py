"""The rooms in a browser: what a token opens, and when it ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
from playwright.sync_api import Page

from tests.browser.conftest import OpenPage
from tests.support.demo import until
from tests.support.examples import Server

pytestmark = pytest.mark.browser

EXAMPLE = "rooms"
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
# As slow as a loaded machine may be.
PATIENCE = 60_000
LONG = {"ROOMS_TOKEN_SECONDS": "600"}
SHORT = {"ROOMS_TOKEN_SECONDS": "2"}

Arrive = Callable[..., "Visitor"]


class Visitor:
    """Somebody's page."""

    def __init__(self, page: Page) -> None:
        page.set_default_timeout(PATIENCE)
        self.page = page

    def sign_in(self, user: str) -> None:
        self.page.select_option("#user", user)
        self.page.click("#sign-in button")
        self.happens(f"Signed in: a token of {user}")

    def enter(self, room: str, by: str = "subprotocol") -> None:
        self.page.select_option("#room", room)
        self.page.select_option("#by", by)
        self.page.click("#connect button[type=submit]")

    def is_in(self, room: str) -> None:
        self.page.locator("#state[data-state=live]", has_text=f"In {room}").wait_for()

    def is_out(self) -> None:
        self.page.wait_for_selector("#state[data-state=out]")

    def happens(self, text: str) -> None:
        self.page.locator("#events li", has_text=text).first.wait_for()

    def say(self, text: str) -> None:
        self.page.fill("#text", text)
        self.page.press("#text", "Enter")

    def hears(self, text: str) -> None:
        self.page.locator("#messages span", has_text=text).wait_for()


@pytest.fixture
def arrive(open_page: OpenPage) -> Arrive:
    def arrive(user: str, **options: bool | str) -> Visitor:
        visitor = Visitor(open_page(**options))
        visitor.sign_in(user)
        return visitor

    return arrive


on_a_server = pytest.mark.parametrize("server", [LONG], indirect=True)


@on_a_server
def test_two_in_a_room_and_markup_is_text(arrive: Arrive) -> None:
    ada, bob = arrive("ada"), arrive("bob")
    ada.enter("lobby")
    bob.enter("lobby", by="message")
    for visitor in (ada, bob):
        visitor.is_in("lobby")
    evil = "<img src=x onerror=\"document.title='owned'\"><b>bold</b>"
    ada.say(evil)
    bob.hears(evil)
    assert bob.page.locator("#messages :is(img, span b)").count() == 0
    assert "owned" not in bob.page.title()


@on_a_server
def test_a_room_that_the_token_does_not_open_is_refused_with_its_error(arrive: Arrive) -> None:
    eve = arrive("eve")
    eve.enter("lobby")
    eve.happens("this is not allowed (forbidden)")
    eve.happens("Closed with 3003")
    eve.is_out()
    eve.enter("news")
    eve.is_in("news")
    eve.say("may I?")
    eve.happens("this is not allowed (forbidden)")
    eve.is_in("news")
    assert eve.page.locator("#messages li").count() == 0


@on_a_server
def test_a_token_is_refreshed_before_it_expires_and_the_socket_goes_on(arrive: Arrive) -> None:
    ada = arrive("ada", clock=True)
    ada.enter("lobby")
    ada.is_in("lobby")
    ada.page.clock.fast_forward(400_000)
    ada.happens("Refreshed: a token of ada")
    ada.happens("The socket goes on until")
    ada.is_in("lobby")
    ada.say("still here")
    ada.hears("still here")
    # Whoever does not want that is left with the old one.
    ada.page.uncheck("#keep")
    ada.page.clock.fast_forward(400_000)
    ada.page.click("#refresh")
    refreshed = ada.page.locator("#events li", has_text="Refreshed")
    until(lambda: refreshed.count() == 2, timeout=PATIENCE / 1000)


@pytest.mark.parametrize("server", [SHORT], indirect=True)
def test_a_token_that_expires_ends_the_connection(arrive: Arrive) -> None:
    bob = arrive("bob")
    bob.page.uncheck("#keep")
    # By message, so that a page is told even if it was slower than the token.
    bob.enter("lobby", by="message")
    bob.happens("the token has expired (token_expired)")
    bob.happens("Closed with 3000")
    bob.is_out()
    bob.page.locator("#expires", has_text="has expired").wait_for()


@on_a_server
def test_revoking_a_user_s_tokens_closes_all_of_their_sockets(arrive: Arrive) -> None:
    # A token that is no good any more is refused when it is to be refreshed, too.
    ada, laptop, bob = arrive("ada", expect="401"), arrive("ada", expect="401"), arrive("bob")
    for visitor in (ada, laptop, bob):
        visitor.enter("lobby")
        visitor.is_in("lobby")
    ada.page.click("#revoke button")
    ada.happens("The tokens of ada have been revoked")
    for visitor in (ada, laptop):
        visitor.happens("the token has been revoked (token_revoked)")
        visitor.is_out()
    ada.enter("lobby", by="message")
    revoked = ada.page.locator("#events li", has_text="(token_revoked)")
    until(lambda: revoked.count() == 2, timeout=PATIENCE / 1000)
    ada.page.click("#refresh")
    ada.happens("/token/refresh: 401")
    bob.say("still here")
    bob.hears("still here")


@on_a_server
def test_only_an_administrator_revokes(arrive: Arrive) -> None:
    eve = arrive("eve", expect="401")
    eve.enter("news")
    eve.is_in("news")
    eve.page.fill("#admin", "wrong")
    eve.page.click("#revoke button")
    eve.happens("/token: 401")
    eve.is_in("news")


@pytest.mark.parametrize("server", [{"ROOMS_SECRET": "s" * 64, **LONG}], indirect=True)
def test_after_a_lost_connection_it_reads_on_from_where_it_was(
    arrive: Arrive, server: Server
) -> None:
    ada = arrive("ada")
    ada.enter("board")
    ada.is_in("board")
    ada.say("before")
    ada.hears("before")
    server.kill()
    ada.is_out()
    server.start()
    ada.enter("board")
    ada.is_in("board")
    ada.say("after")
    ada.hears("after")
    assert ada.page.locator("#messages span").all_inner_texts() == ["before", "after"]


@on_a_server
def test_it_fits_and_can_be_read(arrive: Arrive) -> None:
    ada = arrive("ada")
    ada.enter("lobby")
    ada.is_in("lobby")
    ada.say("x" * 300)
    ada.page.wait_for_selector("#messages li")
    page = ada.page
    for width in (1200, 600, 360):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    for scheme in SCHEMES:
        page.emulate_media(color_scheme=scheme)
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(int, ground.removeprefix("rgb(").removesuffix(")").split(",")))
        assert (brightness < 200) == (scheme == "dark")
    # Whatever can be used has a name that a screen reader can say.
    for control in page.locator("button, input, select").all():
        assert control.evaluate("e => e.labels?.[0]?.textContent || e.textContent")
    page.click("#disconnect")
    ada.is_out()
    assert page.locator("#disconnect").is_hidden()
