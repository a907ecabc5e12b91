"""The page's files, without a browser; tests/browser opens them in one."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import urljoin

import httpx2
import pytest

from server.page import ASSETS, BUILT
from tests.server.fakes import error_of, get, make_host
from tests.server.test_access import ask, guarded

MOST_BYTES = 300_000
FILES = sorted(file for file in BUILT.rglob("*") if file.is_file())


def links() -> list[str]:
    """What the page itself loads: paths, which it names from where it is, as a proxy may serve it
    below a path."""
    return [urljoin("/", link) for link in re.findall(r'(?:src|href)="(\./[^"]+)"', get("/").text)]


def policy(response: httpx2.Response) -> dict[str, str]:
    directives = response.headers["content-security-policy"].split("; ")
    return {name: rest for name, _, rest in (each.partition(" ") for each in directives)}


def test_the_page_is_html_that_loads_nothing_from_elsewhere_and_holds_no_script() -> None:
    page = get("/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert len(links()) == len(re.findall("src=|href=", page.text)) > 0
    assert all(link.startswith(ASSETS) for link in links())
    assert "<style" not in page.text and "style=" not in page.text
    assert re.findall(r"<script[^>]*>([^<]*)</script>", page.text) == [""]
    for file in FILES:
        if file.suffix == ".css":
            assert not re.search(r"url\((?!\./[\w-]+\.woff2\))", file.read_text("utf-8"))


def test_the_policy_allows_what_is_ours_and_no_more() -> None:
    found = policy(get("/"))
    assert found["default-src"] == "'none'"
    for name in ("script-src", "style-src", "connect-src", "img-src", "font-src"):
        assert found[name] == "'self'", name
    for name in ("base-uri", "form-action", "frame-ancestors", "trusted-types"):
        assert found[name] == "'none'", name
    assert found["require-trusted-types-for"] == "'script'"


@pytest.mark.parametrize("link", links())
def test_assets_have_their_types_and_never_change(link: str) -> None:
    asset = get(link)
    assert asset.status_code == 200 and asset.content
    types = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    assert asset.headers["content-type"].split(";")[0] == types[Path(link).suffix]
    assert "immutable" in asset.headers["cache-control"]
    assert asset.headers["x-content-type-options"] == "nosniff"


def test_the_page_itself_is_asked_for_anew_and_sent_only_if_it_has_changed() -> None:
    host = make_host()
    page = get("/", host)
    assert page.headers["cache-control"] == "no-cache"
    again = get("/", host, **{"If-None-Match": page.headers["etag"]})
    assert again.status_code == 304 and not again.content
    assert again.headers["etag"] == page.headers["etag"]
    assert get("/", host, **{"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "path",
    ["/assets/none.js", "/assets/", "/assets/..%2findex.html", "/assets/%2e%2e/page.py", "/x"],
)
def test_nothing_else_is_served(path: str) -> None:
    response = get(path)
    assert response.status_code == 404
    assert error_of(response)["code"] == "not_found"


def test_nobody_needs_a_key_for_the_page_and_everybody_for_what_it_shows() -> None:
    paths = ["/", "/licences.txt", *links(), "/v1/steering/profiles", "/v1/experiments"]
    answers = ask(guarded(), *(("GET", path, None, None) for path in paths))
    assert [answer.status_code for answer in answers] == [200] * (len(paths) - 2) + [401] * 2
    [head] = ask(guarded(), ("HEAD", "/", None, None))
    assert head.status_code == 200 and not head.content


def test_the_documentation_and_the_api_keep_their_policies() -> None:
    assert "cdn.jsdelivr.net" in get("/docs").headers["content-security-policy"]
    assert policy(get("/version")) == {"default-src": "'none'", "frame-ancestors": "'none'"}
    assert "/" not in get("/openapi.json").json()["paths"]


def test_the_built_page_is_small() -> None:
    size = sum(file.stat().st_size for file in FILES)
    assert size < MOST_BYTES, f"{size} bytes"


def test_the_licences_of_what_is_bundled_are_with_it() -> None:
    text = get("/licences.txt").text
    for name in (
        "preact",
        "uplot",
        "diff",
        "inter",
        "Permission is hereby granted",
        "SIL OPEN FONT",
    ):
        assert name in text, name


def test_every_built_file_is_in_the_package() -> None:
    root = Path(__file__).parents[2]
    settings = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    patterns = settings["package-data"]["server"]
    for file in FILES:
        name = file.relative_to(root / "server").as_posix()
        assert any(
            fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns
        ), name
