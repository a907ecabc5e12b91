"""A server with keys: the page asks for one, and keeps it to its tab."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Page, expect

from server.keyfile import create_key
from tests.browser.conftest import await_replies, complaints
from tests.server.test_keys_live import Server


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str, str]]:
    """A server, an ordinary key and one that may use the red-team profile."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    user = create_key(file, "user")
    red = create_key(file, "red", profiles=["*", "optimal-transport"])
    server = Server("--keys", file, "--protect-metrics")
    yield server, user, red
    server.close()


def enter(page: Page, secret: str) -> None:
    page.get_by_role("main").get_by_label("API key").fill(secret)
    page.get_by_role("main").get_by_role("button", name="Use key").click()


def test_a_wrong_key_is_said_and_a_right_one_opens(
    keys: tuple[Server, str, str], visit: Callable[..., Page]
) -> None:
    server, user, _ = keys
    page = visit(server.address, "/#/compare?arm=raw&arm=llm-va&turn=Hello%21")
    with complaints(page, "status of 401"):
        expect(page.get_by_role("heading", name="This server asks for a key")).to_be_visible()
        enter(page, "ph-wrong")
        expect(page.get_by_role("main")).to_contain_text("The key is not valid here")
        enter(page, "ph-\u202ewro\u200bng")
        expect(page.get_by_role("main")).to_contain_text("No key holds such characters")
        enter(page, user)
        # The link is opened as soon as it can be.
        assert await_replies(page, "raw", "llm-va")["raw"].startswith("Hello!")
    expect(page.get_by_label("Profile of column 1").locator("option")).to_have_text(
        ["raw", "alphasteer", "llm-va"]
    )


def test_the_key_stays_in_its_tab(
    keys: tuple[Server, str, str], visit: Callable[..., Page]
) -> None:
    server, user, _ = keys
    page = visit(server.address, "/#/compare?arm=raw&arm=llm-va&turn=Hello%21")
    with complaints(page, "status of 401"):
        enter(page, user)
        await_replies(page, "raw", "llm-va")
        page.reload()
        await_replies(page, "raw", "llm-va")
        assert user not in page.url
        assert user not in page.evaluate("JSON.stringify(localStorage) + document.cookie")
        other = page.context.new_page()
        other.goto(page.url)
        expect(other.get_by_role("heading", name="This server asks for a key")).to_be_visible()
        # An empty field forgets it.
        page.get_by_text("Key in use").click()
        page.get_by_role("banner").get_by_role("button", name="Use key").click()
        page.reload()
        expect(page.get_by_role("heading", name="This server asks for a key")).to_be_visible()


def test_red_team_profiles_are_there_for_keys_that_name_them(
    keys: tuple[Server, str, str], visit: Callable[..., Page]
) -> None:
    server, user, red = keys
    page = visit(server.address, "/#/profiles")
    with complaints(page, "status of 401"):
        enter(page, user)
        expect(page.get_by_role("article")).to_have_count(3)
        assert "optimal-transport" not in page.content()
        page.get_by_text("Key in use").click()
        page.get_by_role("banner").get_by_label("API key").fill(red)
        page.get_by_role("banner").get_by_role("button", name="Use key").click()
        expect(page.get_by_role("article")).to_have_count(4)


def test_a_key_without_the_scope_is_told_so(
    keys: tuple[Server, str, str], visit: Callable[..., Page]
) -> None:
    server, user, _ = keys
    page = visit(server.address, "/#/live")
    with complaints(page, "status of 40[13]"):
        enter(page, user)
        expect(page.get_by_role("alert")).to_contain_text("lacks the scope")
