"""The README's tree names every folder, so that a stranger finds the right one; its links lead somewhere."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("blocks", "peers", "averaging", "swarm")


def tree() -> set[str]:
    """The folders that the README's last code block names: packages, and those in them."""
    block = (ROOT / "README.md").read_text().split("## Where things are")[1].split("```")[1]
    found: set[str] = set()
    package = ""
    for line in block.strip().splitlines():
        said = re.match(r"( {0,2})(\w+)/ +\S", line)
        if said is None:
            continue  # the second line of somebody's words
        package = package if said[1] else said[2]
        found.add(f"{package}/{said[2]}" if said[1] else said[2])
    return found


def test_every_folder_of_the_packages_is_in_the_readme() -> None:
    there = {
        str(path.parent.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("__init__.py")
    }
    assert {name for name in tree() if name.split("/")[0] in PACKAGES} == there


def test_links_of_the_readme_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / link).exists(), link
