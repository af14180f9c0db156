"""What a run shows while it trains: one live line on a terminal, plain lines elsewhere, and log.jsonl on disk."""

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text
from transformers import TrainerCallback, TrainerState, TrainingArguments

from oribi.run_record import LOG_FILE, json_lines
from oribi.text import LastingStream, clock, write_whole
from oribi.train.smoothed import Smoothed

logger = logging.getLogger(__name__)

# figures of a stage's logs that the line shows: name, word and form
REWARDS = (
    ("rewards/margins", "margin", ".3f"), ("rewards/accuracies", "accuracy", ".0%"), ("margin", "margin", ".3f"),
    ("accuracy", "accuracy", ".0%"), ("reward", "reward", ".3f"),
)  # fmt: skip
LINE_SECONDS = 10.0  # between two plain lines; log.jsonl has every log


class Progress(TrainerCallback):
    """Step, loss, smoothed loss, learning rate, tokens per second, MFU on known GPUs, time left and peak memory.

    Args:
        live: rewrite one line; False, and any output that is no terminal, gets a line now and then.
        console: where to; None takes standard error.
    """

    def __init__(self, live: bool = True, console: Console | None = None) -> None:
        self.console = console or Console(file=LastingStream(lambda: sys.stderr), soft_wrap=True)
        self.live = Live(console=self.console, transient=False) if live and self.console.is_terminal else None
        self.smoothed = Smoothed()
        self.first_step, self.started = 0, 0.0
        self.told: float | None = None  # when the last plain line was written
        self.line = Text()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.first_step, self.started, self.told = state.global_step, time.monotonic(), None
        if self.live is not None:
            self.live.start()

    def on_log(self, args, state, control, logs, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            parts = self._describe(state, logs)
            self.line = Text("  ".join(parts.values()))
            if self.live is not None:
                self.line = Text(fitting(parts, self.console.width))
                self.live.update(self.line)
            elif self._is_due(state):
                self.told = time.monotonic()
                self.console.print(self.line)
        elif any(key.endswith("_loss") and key != "train_loss" for key in logs):
            losses = "  ".join(f"{key} {value:.4f}" for key, value in logs.items() if key.endswith("_loss"))
            self.console.print(Text(f"step {state.global_step}  {losses}"))

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.stop()

    def stop(self) -> None:
        """Leave the terminal in order, also after an error."""
        if self.live is not None:
            self.live.stop()

    def _is_due(self, state: TrainerState) -> bool:
        first = self.told is None
        return first or state.global_step >= state.max_steps or time.monotonic() - self.told >= LINE_SECONDS

    def _describe(self, state: TrainerState, logs: dict[str, Any]) -> dict[str, str]:
        step, total = state.global_step, state.max_steps
        elapsed = time.monotonic() - self.started
        left = elapsed / max(step - self.first_step, 1) * (total - step)
        parts = {
            "step": f"step {step}/{total}",
            "loss": f"loss {logs['loss']:.4f}",
            "smoothed": f"smoothed {self.smoothed.add(logs['loss']):.4f}",
            "rewards": "  ".join(
                f"{word} {logs[name]:{form}}" for name, word, form in REWARDS if name in logs
            ),
            "lr": f"lr {logs.get('learning_rate', 0.0):.2e}",
            "speed": f"{logs['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in logs else "",
            "mfu": f"MFU {logs['mfu']:.1%}" if "mfu" in logs else "",
            "left": f"left {clock(left)}",
            "peak": f"peak {peak_memory_bytes() / 2**30:.2f} GiB",
        }
        return {name: text for name, text in parts.items() if text}


def fitting(parts: dict[str, str], width: int) -> str:
    """One line of a terminal: what matters least is left out first, step, loss and time left never."""
    parts = dict(parts)
    for name in ("mfu", "smoothed", "lr", "peak", "speed"):
        if len("  ".join(parts.values())) > width:
            parts.pop(name, None)
    return "  ".join(parts.values())


class JsonLog(TrainerCallback):
    """Writes every log as a line of `log.jsonl` in the output folder; each step is in it once.

    A new run starts a new file; a resumed run drops the lines after its checkpoint.
    """

    failed = False  # the disk is full, or went away; said once

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        path, step = self._path(args), state.global_step
        try:
            if step == 0:
                path.unlink(missing_ok=True)
            elif path.exists():
                # the summary of a run that was stopped is none of a step
                kept = [
                    entry
                    for entry in read_log(path.parent)
                    if entry["step"] <= step and "train_loss" not in entry
                ]
                write_whole(path, "".join(json.dumps(entry) + "\n" for entry in kept))
        except OSError as error:
            self._warn(path, error)

    def on_log(self, args, state, control, logs, **kwargs) -> None:
        if state.is_world_process_zero:
            entry = {"step": state.global_step, "time": time.time(), **logs}
            if "loss" in logs:
                entry["peak_memory_bytes"] = peak_memory_bytes()
            path = self._path(args)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry, default=float) + "\n")
            except OSError as error:  # a log line is not worth a training
                self._warn(path, error)

    def _warn(self, path: Path, error: OSError) -> None:
        if not self.failed:
            logger.warning("%s cannot be written: %s; training continues without it", path, error.strerror)
        self.failed = True

    @staticmethod
    def _path(args: TrainingArguments) -> Path:
        return Path(args.output_dir) / LOG_FILE


def read_log(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a run's log.jsonl, in order; none where there is no log."""
    return list(json_lines(Path(folder) / LOG_FILE))


def peak_memory_bytes() -> int:
    """Peak of what this process took: GPU memory reserved by PyTorch, or resident memory where there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes, except on macOS
