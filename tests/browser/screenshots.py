"""Draws the README's pictures of the page: `make screenshots`; with `--all FOLDER` every view, wide
and narrow, light and dark, to look at."""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, expect, sync_playwright

from tests.browser.conftest import ARGUMENTS, await_replies
from tests.browser.traffic import serving_an_experiment
from tests.services.conftest import require_tool

PICTURES = Path(__file__).parents[2] / "server/web/pictures"
Scheme = Literal["light", "dark"]
VIEWS = ("compare", "profiles", "experiments", "live")
KEPT: tuple[tuple[str, Scheme], ...] = (("compare", "light"), ("experiments", "dark"))


def draw(
    browser: Browser, address: str, view: str, scheme: Scheme, width: int, file: Path, scale: float
) -> None:
    context = browser.new_context(
        color_scheme=scheme,
        device_scale_factor=scale,
        locale="en",
        reduced_motion="reduce",
        timezone_id="UTC",
        viewport={"width": width, "height": 800},
    )
    page = context.new_page()
    page.goto(address + ("/" if view == "compare" else f"/#/{view}"))
    if view == "compare":
        await_replies(page, "raw", "alphasteer", "llm-va", "optimal-transport")
    expect(page.locator("main")).not_to_contain_text("Loading")
    if view == "live":
        page.wait_for_timeout(9_000)  # until there is a course to draw
    page.evaluate("document.fonts.ready")
    page.screenshot(path=file, full_page=True)
    context.close()
    print(f"{file}: {file.stat().st_size // 1000} KB")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", type=Path, metavar="FOLDER")
    folder = parser.parse_args(arguments).all
    with (
        tempfile.TemporaryDirectory() as state,
        serving_an_experiment(Path(state)) as server,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(
            executable_path=require_tool("chromium", "chromium"), args=list(ARGUMENTS)
        )
        if folder is None:
            PICTURES.mkdir(exist_ok=True)
            for view, scheme in KEPT:
                draw(browser, server.address, view, scheme, 1280, PICTURES / f"{view}.png", 1)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            schemes: tuple[Scheme, ...] = ("light", "dark")
            for view, scheme, width in itertools.product(VIEWS, schemes, (1440, 390)):
                file = folder / f"{view}-{scheme}-{width}.png"
                draw(browser, server.address, view, scheme, width, file, 1)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1:])
