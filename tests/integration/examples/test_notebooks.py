"""The two notebooks run from the first cell to the last, on a tiny random model in place of SmolLM2."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from parts.tiny_model import save_tiny_model
from transformers import AutoTokenizer

from tests.said_commands import fault, said_in

ROOT = Path(__file__).parents[3]
NOTEBOOKS = ROOT / "examples" / "notebooks"
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOKS / name, as_version=4)


def run(name: str, where: Path, **parameters: object) -> str:
    """Run a notebook with other parameters; gives what its cells print."""
    notebook = read(name)
    place = next(n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    given = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(f"from pathlib import Path, PosixPath\n{given}"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    client = NotebookClient(notebook, timeout=180, resources={"metadata": {"path": str(where)}})
    client.execute(env=environment)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(str(output.get("text", "")) for output in outputs if output.get("name") == "stdout")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = save_tiny_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


def test_what_one_notebook_trains_the_other_chats_with(tmp_path: Path, model: Path) -> None:
    directory = tmp_path / "together"
    training = {"batch_size": 4, "sequence_length": 16, "learning_rate": 1e-2}
    given = {"model": str(model), "directory": directory, "training": training, "steps": 8}
    trained = run("fine_tune_together.ipynb", tmp_path, **given)
    losses = [float(line.split()[4].rstrip(",")) for line in trained.splitlines() if "held-out loss" in line]
    assert len(losses) >= 2
    assert "swarm1:" in trained
    assert "ann holds blocks [0, 3]" in trained
    assert "exported round" in trained
    assert "exported round 0" not in trained, "an untrained adapter"
    assert "adapter_model.safetensors" in trained
    at = trained.index("exported round")
    said = run("chat_with_the_result.ipynb", tmp_path, directory=directory, question="w5 w6 w7", new_tokens=6)
    # A round that began before they left may have been done after the export.
    exported, went_on = (int(re.search(r"round (\d+)$", text, re.MULTILINE).group(1)) for text in (trained[at:], said))
    assert went_on >= exported
    assert "without the adapter: w" in said
    assert len(said.splitlines()) == 5
    for line in said.splitlines()[1:]:
        assert "w" in line, said


@pytest.mark.parametrize("name", ["fine_tune_together.ipynb", "chat_with_the_result.ipynb"])
def test_notebooks_are_small_and_bring_no_output_of_their_own(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert sum(cell.cell_type == "markdown" for cell in notebook.cells) >= 4
    for cell in notebook.cells:
        for words, whole in said_in(cell.source):
            assert not fault(words, whole=whole)
