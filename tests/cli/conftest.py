"""The command line in this process, and a tiny run that it trained."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from oribi.cli import main
from tests.train.conftest import some_conversations, tiny_folder  # noqa: F401 (a fixture)


@dataclass
class Result:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str

    @property
    def records(self) -> list[dict]:
        """Its JSON lines."""
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def oribi(capsys, monkeypatch):
    """Runs `oribi ...` and returns its `Result`."""

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["oribi", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def data_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "conversations.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in some_conversations(40)))
    return path


@pytest.fixture(scope="session")
def config_file(tiny_folder, data_file, tmp_path_factory) -> Path:  # noqa: F811
    """A config of a run that takes seconds."""
    folder = tmp_path_factory.mktemp("run")
    path = folder / "config.yaml"
    path.write_text(
        f"model: {tiny_folder}\nmax_seq_length: 128\ndataset: {data_file}\neval_fraction: 0.2\n"
        f"output_dir: {folder / 'out'}\nmax_steps: 4\nper_device_train_batch_size: 2\ngradient_accumulation_steps: 1\n"
        "learning_rate: 1e-2\nlora_r: 4\ndtype: float32\nwarmup_steps: 0\n"
    )
    return path


@pytest.fixture(scope="session")
def trained_run(config_file) -> Path:
    """Its folder after training."""
    from oribi.config import read_config
    from oribi.run import run

    config, _ = read_config(config_file)
    run(config)
    return Path(config.output_dir)
