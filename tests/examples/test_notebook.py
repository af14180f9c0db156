"""The notebook runs from top to bottom, with SmolLM2 from its package, short or whole, in place of the hub's."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent.parent / "examples" / "notebook.ipynb"


def code_cells() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_the_notebook_is_committed_without_results():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook["cells"])


@pytest.mark.slow
def test_the_notebook_runs_and_teaches_the_model(
    demo_model_file, smollm2_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "notebook"}
    for cell in code_cells():
        cell = cell.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(demo_model_file))
        exec(compile(cell.replace("steps = 30", "steps = 12"), "notebook", "exec"), names)
    said = capsys.readouterr().out
    assert "⟦" in said
    losses = [entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    assert (tmp_path / "runs" / "notebook" / "adapter" / "adapter_model.safetensors").is_file()
    if demo_model_file == smollm2_file:
        assert "SNOW" in said  # of a word that no row has
