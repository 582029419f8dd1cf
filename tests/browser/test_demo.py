"""The demo in a browser: what its page promises, two tabs on two nodes, one of them killed."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import psycopg
import pytest
from playwright.sync_api import Route

from pgchannels.embedded import EmbeddedPostgres
from tests.browser.conftest import OpenTab
from tests.support.demo import RunningDemo, request, until

pytestmark = pytest.mark.browser

SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")


def order(url: str, path: str = "/orders") -> int:
    return int(request(f"{url}{path}", {"item": "Tea"})["number"])


def test_an_order_placed_in_one_tab_appears_in_the_other_on_another_node(
    demo: RunningDemo, open_tab: OpenTab
) -> None:
    a, b = open_tab(demo.urls[0]), open_tab(demo.urls[1])
    a.page.click("#place")
    b.shows_orders([1])
    b.page.click("#place")
    a.shows_orders([1, 2])
    assert "by node 2" in a.page.inner_text("#orders li:first-child")
    for tab in (a, b):
        tab.has_checked(2)
        assert tab.number("received") == 2


def test_an_order_that_is_rolled_back_never_appears(demo: RunningDemo, open_tab: OpenTab) -> None:
    a, b = open_tab(demo.urls[0]), open_tab(demo.urls[1])
    a.page.click("#fail")
    a.page.locator("#events", has_text="Order #1 was rolled back").wait_for()
    a.page.click("#place")
    # The one that was committed later is here, so the other one is not on its way.
    for tab, url in ((a, demo.urls[0]), (b, demo.urls[1])):
        tab.shows_orders([2])
        tab.has_checked(1)
        assert [each["number"] for each in request(f"{url}/orders")] == [2]
        page = request(f"{url}/channels/orders/messages")
        assert [message["data"]["number"] for message in page["messages"]] == [2]


def test_a_tab_whose_node_is_killed_goes_on_with_the_other_and_misses_nothing(
    demo: RunningDemo, open_tab: OpenTab
) -> None:
    a, b = open_tab(demo.urls[0], clock=True), open_tab(demo.urls[1])
    orders = [order(url) for url in (*demo.urls, *demo.urls)]
    a.shows_orders(orders)
    with a.its_clock_stopped():  # so that it cannot reconnect before it has missed something
        a.page.click("#kill")
        a.page.wait_for_selector("#state[data-state=connecting]")
        b.page.locator("#nodes li[data-here=away]", has_text="node 1").wait_for()
        orders += [order(demo.urls[1]) for _ in range(5)]
        b.shows_orders(orders)
        assert a.orders() == orders[:4]
    a.is_live("node 2")
    a.page.locator("#events", has_text="Recovered: 5 messages replayed").wait_for()
    orders.append(order(demo.urls[1]))
    for tab in (a, b):
        tab.shows_orders(orders)
        tab.has_checked(len(orders))
    assert a.number("recovered") == 5

    # And again, the other way round: node 1 has come back.
    demo.says("node 1 is back")
    for tab in (a, b):
        tab.page.locator("#nodes li", has_text="node 1").get_by_role("link").wait_for()
    b.page.click("#kill")
    b.is_live("node 1")
    orders.append(order(demo.urls[0]))
    for tab in (a, b):
        tab.shows_orders(orders)
        tab.has_checked(len(orders))


def test_what_is_typed_while_the_node_is_away_is_sent_once(
    demo: RunningDemo, open_tab: OpenTab
) -> None:
    a, b = open_tab(demo.urls[0], clock=True), open_tab(demo.urls[1])
    a.say("before")
    b.shows_chat("before")
    with a.its_clock_stopped():
        a.page.click("#kill")
        a.page.wait_for_selector("#state[data-state=connecting]")
        a.say("in between")
        b.say("meanwhile")
        b.shows_chat("meanwhile")
    a.is_live("node 2")
    a.say("after")
    for tab in (a, b):
        tab.shows_chat("after")
        texts = tab.page.locator("#chat li span").all_inner_texts()
        assert texts == ["before", "meanwhile", "in between", "after"]
        assert tab.number("missing") == 0


def test_chat_crosses_nodes_and_shows_markup_as_text(demo: RunningDemo, open_tab: OpenTab) -> None:
    a, b = open_tab(demo.urls[0]), open_tab(demo.urls[1])
    evil = "<img src=x onerror=\"document.title='owned'\"><b>bold</b>"
    a.page.fill("#name", "<i>Eve</i>")
    a.say(evil)
    b.shows_chat(evil)
    assert b.page.inner_text("#chat li b") == "<i>Eve</i>"
    assert b.page.locator("#chat :is(img, i, span b)").count() == 0
    b.say("hello, Eve")
    a.shows_chat("hello, Eve")
    for tab in (a, b):
        assert "owned" not in tab.page.title()


def test_a_reload_keeps_the_history_and_what_comes_next_follows_it(
    demo: RunningDemo, open_tab: OpenTab
) -> None:
    a = open_tab(demo.urls[0])
    orders = [order(url) for url in demo.urls]
    a.say("still here")
    a.shows_chat("still here")
    a.page.reload()
    a.is_live()
    a.shows_orders(orders)
    a.shows_chat("still here")
    orders.append(order(demo.urls[1]))
    a.shows_orders(orders)
    a.has_checked(1)  # placed since it was opened again


def test_it_works_as_localhost_too(demo: RunningDemo, open_tab: OpenTab) -> None:
    a = open_tab(demo.urls[0].replace("127.0.0.1", "localhost"))
    a.page.click("#place")
    a.shows_orders([1])
    a.has_checked(1)


def test_a_tab_that_missed_what_is_no_longer_retained_loads_the_history_anew(
    demo: RunningDemo, open_tab: OpenTab, data_dir: Path
) -> None:
    a = open_tab(demo.urls[0], clock=True)
    orders = [order(demo.urls[0]) for _ in range(3)]
    a.shows_orders(orders)
    with a.its_clock_stopped():
        a.page.click("#kill")
        a.page.wait_for_selector("#state[data-state=connecting]")
        orders += [order(demo.urls[1]) for _ in range(3)]
        url = f"{demo.urls[1]}/channels/orders/messages"
        until(lambda: len(request(url)["messages"]) == 6)
        # As the pruner does: all but the newest two.
        with psycopg.connect(EmbeddedPostgres(data_dir).url(), autocommit=True) as connection:
            connection.execute("update pgchannels.log set floor = 4")
    a.page.locator("#events", has_text="no longer retained: loading it anew").wait_for()
    a.is_live()
    orders.append(order(demo.urls[1]))
    a.shows_orders(orders[4:])
    a.has_checked(1)


def test_the_comparison_is_no_mere_claim(demo: RunningDemo, open_tab: OpenTab) -> None:
    def lose_order_2(route: Route) -> None:
        code = route.fetch().text()
        lossy = code.replace(
            "channel.show(message);", "if (message.id !== 2) channel.show(message);"
        )
        assert lossy != code
        route.fulfill(body=lossy, content_type="text/javascript")

    a, b = open_tab(demo.urls[0]), open_tab(demo.urls[1])
    a.page.route("**/client.js", lose_order_2)
    a.page.reload()
    a.is_live()
    for url in (*demo.urls, *demo.urls):
        order(url)
    a.page.wait_for_selector("#verdict[data-verdict=bad]")
    assert a.number("missing") == 1
    assert "#2" in a.page.inner_text("#check")
    b.has_checked(4)


def test_its_page_runs_and_sends_nothing_that_was_smuggled_in(
    demo: RunningDemo, open_tab: OpenTab
) -> None:
    page = open_tab(demo.urls[0]).page
    answer = page.request.get(demo.urls[0])
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_it_fits_and_can_be_read(demo: RunningDemo, open_tab: OpenTab) -> None:
    page = open_tab(demo.urls[0]).page
    page.fill("#text", "x" * 300)
    page.press("#text", "Enter")
    page.wait_for_selector("#chat li")
    for width in (1200, 600, 390):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    for scheme in SCHEMES:
        page.emulate_media(color_scheme=scheme)
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(int, ground.removeprefix("rgb(").removesuffix(")").split(",")))
        assert (brightness < 200) == (scheme == "dark")
    # Whatever can be used has a name that a screen reader can say.
    for control in page.locator("button, input, a").all():
        assert control.evaluate("e => e.labels?.[0]?.innerText || e.innerText")
