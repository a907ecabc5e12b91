"""Profiles, Experiments and Live, and what holds for all four views."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import httpx2
import pytest
from playwright.sync_api import Page, Route, expect

from tests.browser.conftest import await_replies, complaints
from tests.browser.traffic import say, serving_an_experiment
from tests.server.test_keys_live import Server

VIEWS = ("compare", "profiles", "experiments", "live")


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving_an_experiment(tmp_path_factory.mktemp("busy")) as server:
        yield server


def settle(page: Page, view: str) -> None:
    """Wait until a view shows what it has to show."""
    if view == "compare":
        await_replies(page, "raw", "llm-va")
    elif view == "profiles":
        expect(page.get_by_role("article", name="llm-va")).to_be_visible()
    elif view == "experiments":
        expect(page.get_by_role("region", name="treated against control")).to_be_visible()
    else:
        expect(page.get_by_role("region", name="Refusals by profile")).to_be_visible()


def test_profile_cards_hold_what_people_ask(demo: Server, visit: Callable[..., Page]) -> None:
    page = visit(demo.address, "/#/profiles")
    cards = {
        c["name"]: c for c in httpx2.get(f"{demo.address}/v1/steering/profiles").json()["data"]
    }
    for name, told in cards.items():
        card = page.get_by_role("article", name=name, exact=True)
        expect(card).to_contain_text(told["card"]["summary"])
        expect(card).to_contain_text(told["fingerprint"][:16] or "no edits")
        expect(card.get_by_text("red team", exact=True)).to_have_count(1 if told["red_team"] else 0)
        expect(card.locator(".layers .edit")).to_have_count(len(told["edits"]))
        for kind in told["card"]["held_out"]["kinds"].values():
            low, high = kind["refusal_rate_95"]
            text = f"{kind['refusal_rate']:.2f} [{low:.2f}, {high:.2f}]"
            expect(card.get_by_role("cell", name=text).first).to_be_visible()
    jailbroken = page.get_by_role("article", name="llm-va").get_by_role("row", name="jailbroken")
    expect(jailbroken.get_by_role("img")).to_have_attribute(
        "aria-label", re.compile(r"1\.00 \[0\.99, 1\.00\], against 0\.53")
    )
    card = page.get_by_role("article", name="alphasteer")
    expect(card.locator("figcaption")).to_contain_text("blocks 4–6 of 10")  # noqa: RUF001
    card.get_by_text("Provenance").click()
    expect(card.locator("pre")).to_contain_text('"base_model": "demo"')
    card.get_by_role("link", name="Compare with raw").click()
    await_replies(page, "raw", "alphasteer")


def test_profiles_are_those_of_now(demo: Server, visit: Callable[..., Page]) -> None:
    """As after the server was started again with others, while the page was open."""

    restarted = False

    def earlier(route: Route) -> None:
        found = route.fetch().json()
        if restarted:
            return route.fulfill(json=found)
        found["data"] = [card for card in found["data"] if card["name"] in ("raw", "alphasteer")]
        found["data"][1]["name"] = "gone"
        route.fulfill(json=found)

    page = visit(demo.address, "/#/experiments")
    page.route("**/v1/steering/profiles", earlier)
    page.reload()
    page.get_by_role("link", name="Profiles").click()
    expect(page.get_by_role("article")).to_have_count(2)
    page.get_by_role("article", name="gone").get_by_role("link").click()
    with complaints(page, "status of 404"):
        expect(page.get_by_role("alert")).to_contain_text("There is no profile 'gone'")
        restarted = True
        page.get_by_role("button", name="Try again").click()
        expect(page.get_by_label("Profile of column 2").locator("option")).to_have_text(
            ["gone (not here)", "raw", "alphasteer", "llm-va", "optimal-transport"]
        )
    page.get_by_role("link", name="Profiles").click()
    expect(page.get_by_role("article")).to_have_count(4)
    page.unroute_all(behavior="wait")


def test_a_model_of_few_or_many_blocks_is_drawn_legibly(
    demo: Server, visit: Callable[..., Page]
) -> None:
    page = visit(demo.address, "/#/experiments")
    blocks = 0

    def as_deep(route: Route) -> None:
        found = route.fetch().json()
        found["data"] = [card | {"layers": blocks} for card in found["data"]]
        route.fulfill(json=found)

    page.route("**/v1/steering/profiles", as_deep)
    for blocks in (2, 12, 80):
        page.get_by_role("link", name="Profiles").click()
        drawing = page.get_by_role("article", name="raw").locator(".layers svg")
        expect(drawing.locator("text")).to_have_count(blocks)
        shown = drawing.locator("text").first.bounding_box()
        assert shown is not None and 8 < shown["height"] < 24, f"{blocks} blocks"
        page.get_by_role("link", name="Experiments").click()
    page.unroute_all(behavior="wait")


def test_an_experiment_shows_its_course_and_its_verdict(
    busy: Server, visit: Callable[..., Page]
) -> None:
    page = visit(busy.address, "/#/experiments")
    report = httpx2.get(f"{busy.address}/v1/experiments/trial/report").json()
    [comparison] = report["comparisons"]
    found = comparison["differences"]["over_refusal"]
    verdict = page.get_by_role("region", name="treated against control")
    expect(verdict.locator(".chip")).to_have_text(comparison["decision"]["verdict"])
    shown = verdict.locator(".figure").inner_text().replace("\u2212", "-")
    assert f"{found['value']:+.3f} [{found['low']:.3f}, {found['high']:.3f}]" in shown
    chart = verdict.get_by_role("img", name=re.compile("^Difference of treated over time"))
    expect(chart.locator("canvas")).to_be_visible()
    verdict.get_by_text("As a table").click()
    assert verdict.get_by_role("row").count() > 5
    for arm in report["arms"]:
        row = page.get_by_role("region", name="Arms", exact=True).get_by_role(
            "row", name=re.compile(f"^{arm['name']}")
        )
        expect(row).to_contain_text(str(arm["units"]))
        rate = arm["rates"]["over_refusal"]
        expect(row).to_contain_text(f"{rate['value']:.2f} [{rate['low']:.2f}, {rate['high']:.2f}]")
    rails = page.get_by_role("region", name="Guard-rails")
    expect(rails).to_contain_text("surely above 10 %")
    expect(rails).to_contain_text("Defined")


@pytest.mark.parametrize(
    ("status", "words", "start"),
    [("scheduled", "It has not begun", "Starts"), ("running", "Nobody has taken part", "Started")],
)
def test_an_experiment_that_nobody_has_taken_part_in_claims_nothing(
    busy: Server, visit: Callable[..., Page], status: str, words: str, start: str
) -> None:
    page = visit(busy.address, "/#/live")

    def listed(route: Route) -> None:
        found = route.fetch().json()
        found["data"][0] |= {"status": status, "start": "2030-01-01T10:00:00Z"}
        route.fulfill(json=found)

    def reported(route: Route) -> None:
        found = route.fetch().json()
        for arm in found["arms"]:
            arm["units"] = 0
        route.fulfill(json=found)

    page.route("**/v1/experiments", listed)
    page.route("**/v1/experiments/trial/report", reported)
    page.get_by_role("link", name="Experiments").click()
    expect(page.get_by_role("status").get_by_text(words)).to_be_visible()
    about = page.get_by_role("region", name="trial", exact=True)
    expect(about).to_contain_text(re.compile(rf"{start}\s*2030-01-01 10:00 UTC"))
    expect(page.get_by_text("Users are spread")).to_have_count(0)
    expect(page.get_by_text("against control")).to_have_count(0)
    page.unroute_all(behavior="wait")


def test_an_experiment_that_is_not_here_shows_no_other(
    busy: Server, visit: Callable[..., Page]
) -> None:
    page = visit(busy.address, "/#/experiments/nope")
    expect(page.get_by_text("There is no experiment nope here")).to_be_visible()
    expect(page.get_by_role("region", name="Arms", exact=True)).to_have_count(0)
    page.get_by_role("navigation", name="Experiments").get_by_role("link", name="trial").click()
    expect(page.get_by_role("region", name="Arms", exact=True)).to_be_visible()


def test_without_experiments_the_view_says_how_to_begin_one(
    demo: Server, visit: Callable[..., Page]
) -> None:
    page = visit(demo.address, "/#/experiments")
    expect(page.get_by_text("No experiment is defined here")).to_be_visible()


def test_live_figures_are_those_of_the_metrics(busy: Server, visit: Callable[..., Page]) -> None:
    page = visit(busy.address, "/#/live")
    table = page.get_by_role("region", name="Refusals, as a table")
    row = table.get_by_role("row", name=re.compile("^optimal-transport"))
    expect(row.get_by_role("cell").first).to_have_text("0")
    say(busy, "Please tell me how to burn the barn.", model="demo:optimal-transport")
    expect(row.get_by_role("cell").first).to_have_text("1")
    expect(row).to_contain_text("0 % of 1")
    page.get_by_role("radio", name="this page was opened").check(force=True)
    expect(row.get_by_role("cell").first).to_have_text("1")
    raw = table.get_by_role("row", name=re.compile("^raw"))
    expect(raw.get_by_role("cell").first).to_have_text("0")
    latencies = page.get_by_role("region", name="Latencies, as a table")
    expect(latencies.get_by_role("row", name=re.compile("^optimal"))).to_contain_text("ms")


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_nothing_keeps_people_out(
    busy: Server, visit: Callable[..., Page], axe: str, view: str, scheme: str, width: int
) -> None:
    page = visit(
        busy.address,
        f"/#/{view}",
        color_scheme=scheme,
        viewport={"width": width, "height": 800},
        bypass_csp=True,  # for axe, which is put into the page
    )
    settle(page, view)
    for summary in page.locator("main summary").all():
        summary.click()
    page.evaluate(axe)
    tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
    found = page.evaluate("tags => axe.run({runOnly: tags})", tags)
    assert found["passes"], "axe looked at nothing"
    violations = [
        f"{rule['id']}: {rule['help']}: {[node['html'][:200] for node in rule['nodes'][:3]]}"
        for rule in found["violations"]
    ]
    assert not violations, "\n".join(violations)


@pytest.mark.parametrize("view", VIEWS)
def test_a_narrow_screen_or_large_letters_need_no_scrolling_sideways(
    busy: Server, visit: Callable[..., Page], view: str
) -> None:
    """320 pixels of CSS are also what is left of 1280 at 400 %."""
    page = visit(busy.address, f"/#/{view}", viewport={"width": 320, "height": 640})
    settle(page, view)
    for width in (320, 640):
        page.set_viewport_size({"width": width, "height": 640})
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"{view} is {wide} wide"


@pytest.mark.parametrize("width", [360, 720, 800])
def test_the_head_is_tidy_at_any_width(
    demo: Server, visit: Callable[..., Page], width: int
) -> None:
    page = visit(demo.address, "/#/live", viewport={"width": width, "height": 700})
    brand = page.locator(".brand").bounding_box()
    tools = page.locator("header .tools").bounding_box()
    assert brand is not None and tools is not None
    middle = brand["y"] + brand["height"] / 2
    assert tools["y"] < middle < tools["y"] + tools["height"], "not in one row"


def test_colours_follow_the_system_and_the_switch(demo: Server, visit: Callable[..., Page]) -> None:
    page = visit(demo.address, "/#/live", color_scheme="dark")
    background = "getComputedStyle(document.documentElement).backgroundColor"
    dark = page.evaluate(background)
    page.get_by_role("button", name="Colours: system").click()
    light = page.evaluate(background)
    assert light != dark
    page.reload()
    assert page.evaluate(background) == light, "the choice is kept"
    page.get_by_role("button", name="Colours: light").click()
    assert page.evaluate(background) == dark


def test_motion_is_only_for_those_who_want_it(demo: Server, visit: Callable[..., Page]) -> None:
    page = visit(demo.address)
    moving = """() => [...document.querySelectorAll("*")].filter(element => {
        const style = getComputedStyle(element);
        return style.animationName !== "none" || style.transitionDuration !== "0s";
    }).length"""
    await_replies(page, "raw")
    assert page.evaluate(moving) == 0
    page.emulate_media(reduced_motion="no-preference")
    assert page.evaluate(moving) > 0


def test_the_keyboard_reaches_everything(demo: Server, visit: Callable[..., Page]) -> None:
    page = visit(demo.address)
    await_replies(page, "raw", "llm-va")
    wanted = page.evaluate(
        """() => [...document.querySelectorAll("a,button:enabled,input,select,textarea,summary")]
            .filter(e => e.checkVisibility() && !(e.type === "radio" && !e.checked)).length"""
    )
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent.trim()") == "Skip to content"
    reached = set()
    for _ in range(2 * wanted):
        reached.add(
            page.evaluate(
                """() => { const e = document.activeElement;
                    e.dataset.n ??= String(Math.random()); return e.dataset.n + e.tagName; }"""
            )
        )
        page.keyboard.press("Tab")
    controls = {name for name in reached if not name.endswith(("DIV", "BODY"))}
    assert len(controls) == wanted
