"""A long training of the small model: python -m tests.trust.soak [STEPS]; memory, open files and step time must not grow.

It logs every step. One thing grows by design and is left out, with its own figure: transformers keeps every log in
`TrainerState.log_history`, and writes all of them into each checkpoint. Prints one line of JSON; ends with 1 if a slope
says that something else grows.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from transformers import TrainerCallback

from oribi.selftest.subject import Subject, write_small_model
from tests.trust.runs import trainer_in

WARM_UP = 0.2  # share of the steps in which allocators find their size
MOST_BYTES_A_STEP = 512  # 2,000 steps: 1 MiB
MOST_SLOWER = 0.10  # of a step, from the first half to the second, by medians


class Watch(TrainerCallback):
    """Resident memory, open files and seconds of every step; the log history is emptied."""

    def __init__(self, steps: int) -> None:
        self.process = psutil.Process()
        self.rows = np.zeros((steps, 3))  # touched now: what is measured with must not grow itself
        self.rows.fill(1.0)
        self.history_bytes = 0
        self.last = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        now = time.perf_counter()
        row = self.process.memory_info().rss, self.process.num_fds(), now - self.last
        self.rows[state.global_step - 1] = row
        self.last = now
        self.history_bytes += sum(
            sys.getsizeof(log) + sum(map(sys.getsizeof, log.values())) for log in state.log_history
        )
        state.log_history.clear()


def main(steps: int = 2000) -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subject = Subject(str(write_small_model(folder / "model")), "cpu")
        trainer = trainer_in(
            subject, folder / "run", max_steps=steps, save_strategy="steps", save_steps=steps // 10, save_total_limit=2,
        )  # fmt: skip
        watch = Watch(steps)
        trainer.add_callback(watch)
        trainer.train()
    rows = watch.rows[int(steps * WARM_UP) :]
    resident, files, seconds = rows.T
    slope = float(np.polyfit(np.arange(len(resident)), resident, 1)[0])
    halves = [float(np.median(part)) for part in np.array_split(seconds, 2)]
    found = {
        "steps": steps, "rss_bytes_a_step": round(slope, 1), "rss_mib": round(resident[-1] / 2**20, 1),
        "open_files_first_last": [int(files[0]), int(files[-1])], "median_step_seconds_by_half": [round(h, 5) for h in halves],
        "log_history_bytes_a_step": round(watch.history_bytes / steps, 1),
    }  # fmt: skip
    print(json.dumps(found), flush=True)
    grows = slope > MOST_BYTES_A_STEP or files[-1] > files[0] or halves[1] > halves[0] * (1 + MOST_SLOWER)
    return int(grows)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
