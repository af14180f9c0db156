"""What stops a run that cannot succeed: a loss that is no number, and data with nothing to learn."""

import math
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from oribi.errors import DataError, OribiError


class LossGuard(TrainerCallback):
    """Stops at the first logged loss that is nan or infinite; the weights are lost by then, the time is not."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        loss = logs.get("loss")
        if loss is not None and not math.isfinite(loss):
            raise OribiError(
                f"the loss is {loss} at step {state.global_step}: training went astray. Lower learning_rate (now "
                f"{args.learning_rate:g}), use more warmup_steps, or check the rows of this step"
            )


def require_targets(dataset: Any, name: str) -> None:
    """Stop if no token of a prepared data set would be trained.

    Args:
        dataset: rows of input_ids and labels; streams and data sets without labels are not looked at.
        name: what to call it in the message.

    Raises:
        DataError: it has no rows, or every label is -100.
    """
    if not isinstance(dataset, Dataset) or "labels" not in dataset.column_names:
        return
    if len(dataset) == 0:
        raise DataError(f"the {name} data has no rows left after preparation")
    # the first label of a row predicts nothing: no token stands before it
    if not any(label != -100 for row in dataset for label in row["labels"][1:]):
        raise DataError(
            f"no token of the {name} data would be trained: all labels of its {len(dataset)} rows are -100. Check that "
            "the answers are not cut off by max_length, and the markers given to train_on_responses_only"
        )
