"""The documentation site builds without a warning, so with no broken link or anchor, and fetches nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(directory)]
    built = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return directory


def test_every_page_is_there_with_its_heading(site: Path) -> None:
    pages = {path.name: path.read_text("utf-8") for path in site.glob("*.html")}
    assert {"index.html", "errors.html", "commands.html", "settings.html", "python-reference.html"} <= set(pages)
    for name, text in pages.items():
        if name != "404.html":
            assert "<h1" in text, name
    assert not list(site.rglob("*.py"))


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    loading = re.compile(
        r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//"
        r"|<link\b[^>]*rel=[\"']?(?:stylesheet|preconnect|icon)[^>]*href=[\"']?(?:https?:)?//"
        r"|@import[^;]*//|url\([\"']?(?:https?:)?//"
    )
    assert loading.search('<link rel="stylesheet" href="https://fonts.example/x.css">')
    assert loading.search('<script src="//cdn.example/x.js">')
    for path in [*site.rglob("*.html"), *site.rglob("*.css")]:
        found = loading.search(path.read_text("utf-8"))
        assert found is None, f"{path.name}: {found}"
