"""The page in a real browser: the chat streams, the swarm is shown, names of peers stay text, a key is asked for.

A picture of the page is kept in the test's directory when it fails.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from peers.published.catalogue import Published
from swarm.gateway.serve import GatewayConfig
from swarm.gateway.sightings import Sightings
from tests.integration.gateway.conftest import Served
from tests.integration.gateway.small_gateway import QUICK, gateway_over

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'swarmtune[dev]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
HOSTILE = '<img src=x onerror="document.title=1">\u202e"\'&'
WIDE, NARROW = {"width": 1200, "height": 900}, {"width": 360, "height": 740}
SECONDS = 60_000  # of patience, in milliseconds


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def page_of(
    browser: playwright.Browser, url: str, pictures: Path, *, size: dict[str, int] = WIDE, dark: bool = False
) -> Iterator[playwright.Page]:
    """The page, which may not fail, ask others for anything, or break its own policy."""
    context = browser.new_context(viewport=size, color_scheme="dark" if dark else "light")
    context.set_default_timeout(SECONDS)
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda line: wrong.append(line.text) if is_wrong(line) else None)
    page.on("request", lambda request: None if request.url.startswith(url) else wrong.append(request.url))
    try:
        page.goto(url)
        yield page
        assert not wrong, wrong
    except BaseException:
        page.screenshot(path=pictures / "page.png", full_page=True)
        raise
    finally:
        context.close()


def is_wrong(line: playwright.ConsoleMessage) -> bool:
    """Whether a line of the browser's console tells of a slip; that an answer was 401 or 404, a test may want."""
    return line.type == "error" and not any(status in line.text for status in ("401", "404"))


def fits(page: playwright.Page) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"))


def test_a_chat_streams_and_the_swarm_is_shown(served: Served, browser: playwright.Browser, tmp_path: Path) -> None:
    expect = playwright.expect
    with page_of(browser, served.gateway.url, tmp_path) as page:
        expect(page.locator("#title")).to_have_text("tales", timeout=SECONDS)
        expect(page.locator("#state")).to_have_text("2 hosts hold all 6 blocks", timeout=SECONDS)
        expect(page.locator("#model option")).to_have_text(["tales", "news", "tiny-chat"])
        expect(page.locator("#coverage span")).to_have_count(6)
        expect(page.locator("#map .peer .side")).to_have_text(["0:3", "3:6"])
        expect(page.locator("#tiles dd").first).to_have_text("1")
        page.locator("#tokens").evaluate("box => box.value = 40")
        page.keyboard.press("Tab")
        page.locator("#prompt").focus()
        page.keyboard.type("Hello")
        page.keyboard.press("Enter")
        expect(page.locator(".turn.user")).to_have_text("Hello")
        expect(page.locator("#send")).to_be_visible(timeout=SECONDS)
        assert page.locator(".turn.assistant").inner_text().strip()
        assert page.locator(".turn.error").count() == 0
        for column in (2, 3):  # tokens trained and served, of both hosts
            cells = page.locator(f"#contributions td:nth-child({column})")
            expect(cells).to_have_text([re.compile("^[1-9]")] * 2, timeout=SECONDS)
        page.locator("#run").select_option(index=1)
        expect(page.locator("#title")).to_have_text("news")
        page.locator("#clear").click()
        assert page.locator(".turn").count() == 0
        assert fits(page)


def test_a_text_can_be_stopped_by_keyboard(served: Served, browser: playwright.Browser, tmp_path: Path) -> None:
    config = GatewayConfig(watch=QUICK, lookup=False)
    with gateway_over(served.clients[:1], config) as gateway, page_of(browser, gateway.url, tmp_path) as page:
        page.locator("#model option").first.wait_for(state="attached")
        page.locator("#tokens").evaluate("box => box.value = 400")
        page.locator("#prompt").fill("Hello")
        page.locator("#prompt").press("Enter")
        playwright.expect(page.locator(".turn.assistant")).to_have_text(re.compile(".{4}", re.DOTALL), timeout=SECONDS)
        page.keyboard.press("Escape")
        playwright.expect(page.locator("#send")).to_be_visible(timeout=SECONDS)
        assert len(page.locator(".turn.assistant").inner_text()) < 380, "it was not stopped"
        assert page.locator(".turn.error").count() == 0


def test_what_goes_wrong_is_said_in_the_chat(served: Served, browser: playwright.Browser, tmp_path: Path) -> None:
    with page_of(browser, served.gateway.url, tmp_path) as page:
        page.locator("#model option").first.wait_for(state="attached")
        page.evaluate("document.getElementById('model').add(new Option('gone', 'gone', true, true))")
        page.locator("#prompt").fill("Hello")
        page.locator("#prompt").press("Enter")
        playwright.expect(page.locator(".turn.error")).to_contain_text("not served here", timeout=SECONDS)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_small_window_and_hostile_names_do_no_harm(
    served: Served, browser: playwright.Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dark: bool
) -> None:
    real = Sightings.plain

    def named(self: Sightings) -> dict[str, object]:
        shown = real(self)
        status = self.status
        assert status is not None
        hosts = tuple(replace(host, nickname=(HOSTILE * 9)[:48]) for host in status.hosts)
        return shown | {"hosts": replace(status, hosts=hosts).to_plain()["hosts"]}

    monkeypatch.setattr(Sightings, "plain", named)
    with page_of(browser, served.gateway.url, tmp_path, size=NARROW, dark=dark) as page:
        page.locator("#map .peer").first.wait_for()
        assert (HOSTILE * 9)[:48] in [name.text_content() for name in page.locator("#map bdi").all()]
        assert page.locator("#map img, #contributions img").count() == 0
        assert page.title() == "tales · swarm"
        assert fits(page)
        back = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, back.removeprefix("rgb(").rstrip(")").split(","))) < 200) == dark


def test_a_key_is_asked_for_and_kept(served: Served, browser: playwright.Browser, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text('[ann]\nkey = "sk-ann-0123456789"\n')
    config = GatewayConfig(watch=QUICK, keys=keys)
    with gateway_over(served.clients[:1], config) as gateway, page_of(browser, gateway.url, tmp_path) as page:
        expect = playwright.expect
        expect(page.locator("#key-dialog")).to_be_visible(timeout=SECONDS)
        page.keyboard.type("sk-wrong-0123456789")
        page.keyboard.press("Enter")
        expect(page.locator("#key-words")).to_contain_text("not known", timeout=SECONDS)
        expect(page.locator("#key-dialog")).to_be_visible()
        page.keyboard.type("sk-ann-0123456789")
        page.keyboard.press("Enter")
        expect(page.locator("#title")).to_have_text("tales", timeout=SECONDS)
        page.reload()
        expect(page.locator("#title")).to_have_text("tales", timeout=SECONDS)
        expect(page.locator("#key-dialog")).to_be_hidden()


def test_the_menu_of_models_follows_what_is_published(
    served: Served, browser: playwright.Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expect, stay = playwright.expect, ["tales", "news", "tiny-chat"]
    pirate = Published(name="pirate", content=b"p" * 32, num_bytes=1)
    with page_of(browser, served.gateway.url, tmp_path) as page:
        options = page.locator("#model option")
        expect(options).to_have_text(stay, timeout=SECONDS)
        page.select_option("#model", "news")
        with monkeypatch.context() as patch:
            catalog = served.gateway.server.gateway.catalog
            patch.setattr(catalog, "_published", lambda: {served.clients[0]: (pirate,)})
            expect(options).to_have_text([*stay, "pirate"], timeout=SECONDS)
            expect(page.locator("#model")).to_have_value("news")
        expect(options).to_have_text(stay, timeout=SECONDS)
