"""The page in a real Chromium, headless, against real servers. A missing Chromium is a skip on a
developer's machine and a failure in CI, as tests/services has it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Locator,
    Page,
    Request,
    expect,
    sync_playwright,
)

from tests.server.test_keys_live import Server
from tests.services.conftest import missing, require_tool

AXE = Path(__file__).parents[2] / "server/web/node_modules/axe-core/axe.min.js"
ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip

expect.set_options(timeout=30_000)  # the machine may be busy


@pytest.fixture(scope="package")
def chromium() -> Iterator[Browser]:
    path = require_tool("chromium", "chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()


@pytest.fixture(scope="session")
def axe() -> str:
    """The program that looks for what keeps people out."""
    if not AXE.is_file():
        missing(f"{AXE.name} is not installed (npm ci in server/web, or make web)")
    return AXE.read_text("utf-8")


@pytest.fixture(scope="package")
def demo() -> Iterator[Server]:
    """The demo model with all its profiles, and no keys."""
    server = Server()
    yield server
    server.close()


class Watched:
    """A page and everything that it did which it should not have done."""

    def __init__(self, context: BrowserContext, address: str) -> None:
        self.address = address
        self.foreign: list[str] = []
        self.complaints: list[str] = []
        self.expected: list[str] = []
        """Patterns of complaints that a test means to provoke."""
        context.on("request", self._request)
        context.on("console", self._console)
        context.on("weberror", lambda error: self.complaints.append(str(error.error)))

    def _request(self, request: Request) -> None:
        if urlsplit(request.url)[:2] != urlsplit(self.address)[:2]:
            self.foreign.append(request.url)

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def check(self) -> None:
        assert not self.foreign, f"asked of other origins: {self.foreign}"
        unexpected = [
            text
            for text in self.complaints
            if not any(re.search(pattern, text) for pattern in self.expected)
        ]
        assert not unexpected, f"complaints of the browser: {unexpected}"


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Callable[..., Page]]:
    """Opens an address in a browser of its own, like another user's.

    At the end no page may have asked another origin for anything, broken the content security
    policy, or raised an error; `page.watched.expected` names the complaints that are meant.
    """
    contexts: list[tuple[BrowserContext, Watched]] = []

    def open(address: str, path: str = "/", **options: Any) -> Page:
        context = chromium.new_context(reduced_motion="reduce", **options)
        watched = Watched(context, address)
        contexts.append((context, watched))
        page = context.new_page()
        page.watched = watched  # type: ignore[attr-defined]
        page.goto(address + path)
        return page

    yield open
    for context, _ in contexts:
        context.close()
    for _, watched in contexts:
        watched.check()


@contextmanager
def complaints(page: Page, *patterns: str) -> Iterator[None]:
    """Let the browser complain of this."""
    page.watched.expected += patterns  # type: ignore[attr-defined]
    yield


def card(page: Page, profile: str) -> Locator:
    """The last reply of a column."""
    return page.get_by_role("article", name=f"Reply of {profile}", exact=True).last


def text_of(page: Page, profile: str) -> str:
    return card(page, profile).locator(".tokens").inner_text()


def await_words(page: Page, *profiles: str) -> dict[str, str]:
    """The texts of these columns' last replies, once they have begun."""
    for profile in profiles:
        expect(card(page, profile).locator(".tokens")).to_have_text(re.compile(r"\w"))
    return {profile: text_of(page, profile) for profile in profiles}


def await_replies(page: Page, *profiles: str) -> dict[str, str]:
    """The texts of these columns' last replies, once they are done."""
    for profile in profiles:
        expect(card(page, profile)).to_have_class(re.compile(r"\bdone\b"))
    return {profile: text_of(page, profile) for profile in profiles}
