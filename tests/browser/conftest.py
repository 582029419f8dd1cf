"""Fixtures for tests with a real browser: the demo, the examples, tabs that watch their console."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, WebSocketRoute, sync_playwright

from pgchannels.embedded import EmbeddedPostgres
from tests.support.demo import RunningDemo, running_demo
from tests.support.examples import Server
from tests.support.processes import Processes
from tests.support.servers import server_directory

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

# What a browser itself reports when the server that it talks to is killed.
LOST = re.compile(r"net::ERR_(CONNECTION|EMPTY_RESPONSE|SOCKET)|WebSocket connection to .* failed")

OpenTab = Callable[..., "Tab"]
OpenPage = Callable[..., Page]


class Tab:
    """A page of the demo, in a context of its own, as on another machine."""

    def __init__(self, context: BrowserContext) -> None:
        self.page: Page = context.new_page()
        self.complaints: list[str] = []
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._console)

    def _console(self, message: object) -> None:
        kind, text = getattr(message, "type", ""), getattr(message, "text", "")
        if kind in ("error", "warning"):
            self.complaints.append(text)

    def open(self, url: str) -> None:
        self.page.goto(url)
        self.is_live()

    def is_live(self, node: str = "") -> None:
        self.page.wait_for_selector(f"#state[data-state=live]:has-text('{node}')")

    @contextmanager
    def its_clock_stopped(self) -> Iterator[None]:
        """No timer of the page fires, that for reconnecting either. Needs ``clock=True``."""
        self.page.clock.pause_at(self.page.evaluate("Date.now()") / 1000 + 1)
        yield
        self.page.clock.resume()

    def orders(self) -> list[int]:
        """The numbers on the board, oldest first."""
        texts = self.page.locator("#orders li b").all_inner_texts()
        return [int(text.removeprefix("#")) for text in reversed(texts)]

    def shows_orders(self, numbers: list[int]) -> None:
        """Wait until exactly these are on the board, in this order."""
        script = """numbers => {
            const rows = [...document.querySelectorAll("#orders li b")].reverse();
            return `${rows.map(row => row.textContent.slice(1))}` === `${numbers}`;
        }"""
        try:
            self.page.wait_for_function(script, arg=numbers)
        except Exception as error:
            raise AssertionError(f"{self.orders()}, not {numbers}") from error

    def shows_chat(self, *texts: str) -> None:
        for text in texts:
            self.page.locator("#chat li span", has_text=text).wait_for()

    def say(self, text: str) -> None:
        self.page.fill("#text", text)
        self.page.press("#text", "Enter")

    def number(self, id: str) -> int:
        return int(self.page.inner_text(f"#{id}"))

    def has_checked(self, count: int) -> None:
        """Wait until it has compared its board with the table: *count* orders, none missing."""
        self.page.locator("#check", has_text=f": {count} order").wait_for()
        assert self.page.get_attribute("#verdict", "data-verdict") == "ok"
        assert self.number("missing") == 0


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def data_dir() -> Iterator[Path]:
    with server_directory() as path:
        yield path / "data"


@pytest.fixture
def demo(processes: Processes, data_dir: Path) -> Iterator[RunningDemo]:
    """A running demo with an empty database."""
    yield running_demo(
        processes, "--data-dir", str(data_dir), "--port", "0", "--restart-after", "2"
    )
    processes.end_all()
    # Where it did not end as it should have, for the next test.
    server = EmbeddedPostgres(data_dir)
    if server.pid is not None:
        server.start()
        server.stop("immediate")


@pytest.fixture
def open_tab(browser: Browser, demo: RunningDemo) -> Iterator[OpenTab]:
    """Opens tabs. None may have complained by the end, but of a node that was killed."""
    contexts: list[BrowserContext] = []
    tabs: list[Tab] = []

    def open_tab(url: str = "", *, clock: bool = False) -> Tab:
        contexts.append(browser.new_context())
        tab = Tab(contexts[-1])
        tabs.append(tab)
        if clock:
            tab.page.clock.install()
        tab.open(url or demo.urls[0])
        return tab

    yield open_tab
    for context in contexts:
        context.close()
    complaints = [text for tab in tabs for text in tab.complaints]
    if "was killed" in demo.output():
        complaints = [text for text in complaints if not LOST.search(text)]
    assert not complaints


@pytest.fixture
def server(
    request: pytest.FixtureRequest, processes: Processes, database_url: str
) -> Iterator[Server]:
    """The example that the module names by ``EXAMPLE``, on PostgreSQL.

    A test may give the environment: ``@pytest.mark.parametrize("server", [{…}], indirect=True)``.
    """
    env = {"PGCHANNELS_DATABASE_URL": database_url, **getattr(request, "param", {})}
    yield Server(processes, request.module.EXAMPLE, env)
    processes.end_all()  # before the database is dropped


@pytest.fixture
def open_page(browser: Browser, server: Server) -> Iterator[OpenPage]:
    """Opens the example's page, each time as on another machine. None may have complained.

    A page may complain of a server that was killed, and of what the test says that it *expects*.
    Its sockets may be led through *route*.
    """
    contexts: list[BrowserContext] = []
    tabs: list[Tab] = []
    allowed: list[str] = []

    def open_page(
        *,
        clock: bool = False,
        expect: str = "",
        route: Callable[[WebSocketRoute], None] | None = None,
    ) -> Page:
        contexts.append(browser.new_context())
        tab = Tab(contexts[-1])
        tabs.append(tab)
        if expect:
            allowed.append(expect)
        if clock:
            tab.page.clock.install()
        if route is not None:
            tab.page.route_web_socket(re.compile("^ws:"), route)
        tab.page.goto(server.url)
        return tab.page

    yield open_page
    for context in contexts:
        context.close()
    complaints = [text for tab in tabs for text in tab.complaints]
    if server.was_killed:
        complaints = [text for text in complaints if not LOST.search(text)]
    assert not [text for text in complaints if not any(each in text for each in allowed)]
