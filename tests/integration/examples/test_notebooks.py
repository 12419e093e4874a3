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


def cells(name: str, **parameters: object) -> list[nbformat.NotebookNode]:
    """A notebook's cells, with other parameters."""
    found = list(read(name).cells)
    place = next(n for n, cell in enumerate(found) if "parameters" in cell.metadata.get("tags", []))
    given = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    found.insert(place + 1, nbformat.v4.new_code_cell(f"from pathlib import Path, PosixPath\n{given}"))
    return found


def run(where: Path, *notebooks: list[nbformat.NotebookNode]) -> list[str]:
    """Run notebooks after each other; gives what each prints. In one kernel, which forgets all names in between."""
    whole = nbformat.v4.new_notebook()
    for each in notebooks:
        whole.cells += [nbformat.v4.new_code_cell("%reset -f"), *each]
    client = NotebookClient(whole, timeout=180, resources={"metadata": {"path": str(where)}})
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT)})
    return [_printed(each) for each in notebooks]


def _printed(run_cells: list[nbformat.NotebookNode]) -> str:
    outputs = [output for cell in run_cells for output in cell.get("outputs", [])]
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
    trained, said = run(
        tmp_path,
        cells("fine_tune_together.ipynb", model=str(model), directory=directory, training=training, steps=8),
        cells("chat_with_the_result.ipynb", directory=directory, question="w5 w6 w7", new_tokens=6),
    )
    losses = [float(line.split()[4].rstrip(",")) for line in trained.splitlines() if "held-out loss" in line]
    assert len(losses) >= 2
    assert "swarm1:" in trained
    assert "ann holds blocks [0, 3]" in trained
    assert "exported round" in trained
    assert "exported round 0" not in trained, "an untrained adapter"
    assert "adapter_model.safetensors" in trained
    at = trained.index("exported round")
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
