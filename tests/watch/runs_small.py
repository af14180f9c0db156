"""Folders of runs as trainings write them, without a training."""

import json
import time
from pathlib import Path

from oribi.run_record import LOG_FILE, SAMPLES_FILE, RunRecord


def log_lines(count: int, *, seconds: float = 1.0, first: int = 1, **values) -> list[dict]:
    """Lines of a log whose last one was written just now."""
    begin = time.time() - seconds * count
    return [
        {"step": step, "time": begin + seconds * (step - first + 1), "loss": 3.0 / step + 1.0, "learning_rate": 1e-4,
         "grad_norm": 1.0, "tokens_per_second": 100.0, "peak_memory_bytes": 2**30, **values}
        for step in range(first, first + count)
    ]  # fmt: skip


def write_lines(path: Path, lines: list[dict], mode: str = "w") -> None:
    with path.open(mode) as file:
        file.writelines(json.dumps(one) + "\n" for one in lines)


def answered(step: int, said: str, stopped: bool = True) -> dict:
    """A line of samples.jsonl."""
    sample = {
        "prompt": "<b>Where?</b>",
        "expected": "here",
        "said": said,
        "tokens": 2,
        "stopped": stopped,
        "rewards": None,
    }
    return {"step": step, "time": 1.0, "samples": [sample]}


def write_run(
    folder: Path,
    lines: list[dict],
    *,
    state: str = "running",
    max_steps: int = 100,
    answers: list[dict] = (),
    **settings,
) -> Path:
    """A run's folder; settings go into its config."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        "".join(
            f"{key}: {value}\n"
            for key, value in {"model": "tiny", "dataset": "rows.jsonl", **settings}.items()
        )
    )
    RunRecord(
        "20260101-000000-abc",
        "tiny",
        step=lines[-1]["step"] if lines else 0,
        max_steps=max_steps,
        state=state,
    ).write(folder)
    write_lines(folder / LOG_FILE, lines)
    if answers:
        write_lines(folder / SAMPLES_FILE, list(answers))
    return folder
