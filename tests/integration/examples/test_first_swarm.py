"""The first example does what it says, also where an event loop runs already, as in a notebook."""

from __future__ import annotations

import asyncio
import runpy
from pathlib import Path

import pytest
from safetensors.torch import load_file

EXAMPLE = Path(__file__).parents[3] / "examples" / "01_first_swarm.py"


async def test_it_runs_inside_a_running_loop(
    tmp_path: Path, smollm2: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "home" / ".cache" / "swarmtune"
    cache.mkdir(parents=True)
    (cache / smollm2.name).symlink_to(smollm2)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert asyncio.get_running_loop().is_running()
    runpy.run_path(str(EXAMPLE))["main"](tmp_path, steps=4)
    printed = capsys.readouterr().out
    loss = printed.splitlines()[0]
    assert "\nThe for statement" in printed
    assert printed.endswith("exported the adapter of round 1\n")
    assert loss.startswith("loss ")
    assert len(loss.split()) == 5
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    trained = [value for name, value in adapter.items() if "lora_B" in name]
    assert len(trained) >= 30
    assert all(value.abs().max() > 0 for value in trained)


def test_it_is_shorter_than_thirty_lines_and_the_readme_shows_it() -> None:
    source = EXAMPLE.read_text()
    assert len(source.splitlines()) < 30
    readme = (EXAMPLE.parents[1] / "README.md").read_text()
    assert source.strip() in readme
