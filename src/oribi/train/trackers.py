"""Tables in the trackers that a training reports to; transformers' own callbacks write figures only."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import Trainer
from transformers.integrations import integration_utils

logger = logging.getLogger(__name__)

Rows = Sequence[Mapping[str, Any]]


def log_table(trainer: Trainer, name: str, rows: Rows, step: int) -> None:
    """Writes rows into each tracker of a trainer that knows tables; a tracker that fails costs a warning, never a training.

    Args:
        trainer: with its callbacks. name: of the table. rows: with the same keys. step: optimizer steps done.
    """
    for callback in trainer.callback_handler.callbacks:
        write = _WRITERS.get(type(callback).__name__)
        if write is None or not rows:
            continue
        try:
            write(callback, name, rows, step)
        except Exception as error:  # of packages beyond our control, over networks
            logger.warning("%s: the table %r was not written: %s", type(callback).__name__, name, error)


def _to_tensorboard(
    callback: integration_utils.TensorBoardCallback, name: str, rows: Rows, step: int
) -> None:
    if callback.tb_writer is not None:
        lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
        table = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)
        callback.tb_writer.add_text(name, table, step)


def _cell(value: Any) -> str:
    """A value in a cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _to_wandb(callback: integration_utils.WandbCallback, name: str, rows: Rows, step: int) -> None:
    table = callback._wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
    callback._wandb.log({name: table, "train/global_step": step})


def _to_mlflow(callback: integration_utils.MLflowCallback, name: str, rows: Rows, step: int) -> None:
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    callback._ml_flow.log_table(columns, artifact_file=f"{name}/step-{step}.json")


def _to_trackio(callback: Any, name: str, rows: Rows, step: int) -> None:
    import pandas

    table = callback._trackio.Table(dataframe=pandas.DataFrame(list(rows)))
    callback._trackio.log({name: table, "train/global_step": step})


_WRITERS: dict[str, Callable[[Any, str, Rows, int], None]] = {
    "TensorBoardCallback": _to_tensorboard,
    "WandbCallback": _to_wandb,
    "MLflowCallback": _to_mlflow,
    "TrackioCallback": _to_trackio,
}
