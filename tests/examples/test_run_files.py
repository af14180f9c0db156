"""The run files of examples/configs fit the cards in their names, and train."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from oribi.config_file import read_run_config

ROOT = Path(__file__).parent.parent.parent
FILES = sorted((ROOT / "examples" / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def made():
    """The script that writes the files."""
    before = sys.path.copy()
    sys.path.insert(0, str(ROOT / "docs"))
    yield runpy.run_path(str(ROOT / "docs" / "run_files.py"))
    sys.path[:] = before


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_run_file_fits_its_card(file, made, monkeypatch):
    monkeypatch.chdir(ROOT)
    config, notes = read_run_config(file)
    card = int(re.search(r"-(\d+)gb$", file.stem)[1])
    assert not notes
    assert made["fits"](card, config)
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 8
    assert all(Path(source).is_file() for source in config.dataset)
    training, memory = made["training_on"](card, config)
    assert training.architecture.parameters > 1e9
    assert not training.fits(4096 * config.max_seq_length, config.max_seq_length, memory)


def test_every_run_file_is_one_that_the_script_writes(made):
    assert {file.name for file in FILES} == {
        made["file_name"](name, card) for card, names in made["MODELS"].items() for name in names
    }


@pytest.mark.slow
def test_the_run_files_are_up_to_date(made):
    assert {file.name: file.read_text(encoding="utf-8") for file in FILES} == made["run_files"]()


@pytest.mark.slow
def test_a_run_file_trains(oribi, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    done = oribi(
        "train", "examples/configs/llama-3.1-8b-instruct-24gb.yaml", "--model", tiny_folder, "--max_steps", "1",
        "--max_seq_length", "128", "--quantization_method", "f16", "--dtype", "float32", "--output_dir", tmp_path / "run",
    )  # fmt: skip
    assert done.code == 0, done.err[-2000:]
    assert list((tmp_path / "run" / "gguf").glob("*.gguf"))
