"""A newcomer's private group of three hosts, chatting in a browser: by the commands of the README, as processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from swarm.errors import SwarmError
from swarm.join_string import RunDirectory
from swarm.local_group import even_spans, local_group
from tests.integration.cli.conftest import Process

README = Path(__file__).parents[3] / "README.md"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
SECONDS = 120_000  # of patience, in milliseconds


def commands() -> tuple[list[str], list[str]]:
    """The words of `swarm init` and `swarm serve`, after the pip install, as the README has them."""
    found = re.search(
        r"```\npip install [^\n]*\nswarm (init [^\n]*)\nswarm (serve [^\n]*)\n```", README.read_text("utf-8")
    )
    assert found is not None, "the three commands are not in the README"
    return found[1].split(), found[2].split()


def test_three_commands_lead_to_a_private_chat_in_a_browser(tmp_path: Path, tiny_chat: Path) -> None:
    init, serve = commands()
    assert "--private" in init
    init[init.index("--model") + 1] = str(tiny_chat)
    places = {"XDG_DATA_HOME": str(tmp_path / "data"), "XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path)}
    init[1], serve[1] = str(tmp_path / "lab"), f"{tmp_path / 'lab'}/"
    environment = os.environ | places
    subprocess.run([sys.executable, "-m", "swarm.cli.main", *init], env=environment, check=True, timeout=120)
    running = Process([*serve, "--port", "0"], environment, tmp_path / "serve.txt")
    try:
        url = running.line()
        with urllib.request.urlopen(f"{url}/healthz", timeout=60) as answer:
            assert answer.status == 200
        with urllib.request.urlopen(f"{url}/api/swarm", timeout=60) as answer:
            assert len(json.load(answer)["runs"][0]["hosts"]) == 3
        chat_in_browser(url, tmp_path)
        assert "private" in (tmp_path / "lab" / "swarm.toml").read_text("utf-8")
        assert running.send(signal.SIGTERM) == 143
    finally:
        running.end()


def chat_in_browser(url: str, pictures: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs chromium: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'swarmtune[dev]'")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page()
        page.set_default_timeout(SECONDS)
        try:
            page.goto(url)
            playwright.expect(page.locator("#state")).to_have_text("3 hosts hold all 6 blocks", timeout=SECONDS)
            page.locator("#tokens").evaluate("box => box.value = 20")
            page.locator("#prompt").fill("Hello")
            page.locator("#prompt").press("Enter")
            playwright.expect(page.locator("#send")).to_be_visible(timeout=SECONDS)
            assert page.locator(".turn.assistant").inner_text().strip()
            assert page.locator(".turn.error").count() == 0
        except BaseException:
            page.screenshot(path=pictures / "page.png", full_page=True)
            raise
        finally:
            browser.close()


def test_hosts_share_all_blocks_evenly() -> None:
    assert [(span.start, span.end) for span in even_spans(3, 8)] == [(0, 2), (2, 5), (5, 8)]
    assert [(span.start, span.end) for span in even_spans(1, 8)] == [(0, 8)]


def test_local_hosts_need_the_directory_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "run.signed").touch()
    with (
        pytest.raises(SwarmError, match="the directory that `swarm init` made"),
        local_group(RunDirectory(path=tmp_path, join=None), 3, tmp_path),
    ):
        pass
