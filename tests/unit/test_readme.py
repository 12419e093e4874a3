"""The README's tree names every file, so that a stranger finds the right one in a minute."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("blocks", "peers", "averaging", "swarm")


def tree() -> dict[str, list[str]]:
    """The files under each package of the README's last code block."""
    block = (ROOT / "README.md").read_text().split("## Where things are")[1].split("```")[1]
    found: dict[str, list[str]] = {}
    folder = ""
    for line in block.strip().splitlines():
        name, words = re.match(r"(\s*\S+)\s+(\S.*)", line).groups()
        assert words, f"{name} has no words beside it"
        if name.startswith(" "):
            found[folder].append(name.strip())
        else:
            folder = name.rstrip("/")
            found[folder] = []
    return found


def test_every_file_of_the_packages_is_in_the_readme() -> None:
    named = tree()
    for package in PACKAGES:
        paths = sorted(path.relative_to(ROOT / package) for path in (ROOT / package).rglob("*.py"))
        there = {str(path) for path in paths if path.name != "__init__.py"}
        assert set(named[package]) == there, f"{package}: {sorted(set(named[package]) ^ there)}"
        assert len(named[package]) == len(there), f"{package} names a file twice"


def test_links_of_the_readme_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / link).exists(), link
