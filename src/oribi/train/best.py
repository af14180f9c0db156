"""The best evaluation of a training: which checkpoint is kept, and when a training stops because nothing improves."""

from typing import Any

from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from oribi.config import RunConfig
from oribi.errors import ConfigError
from oribi.text import say


def saving_arguments(config: RunConfig, evaluates: bool) -> dict[str, Any]:
    """When a run saves and evaluates, and by what it calls a model the best, as transformers' arguments.

    Args:
        config: of the run. evaluates: whether it has held-out rows.
    """
    strategy = config.save_strategy or ("steps" if config.save_steps else None)
    if strategy is None:  # a checkpoint for each new best is what a search for the best needs
        strategy = "best" if config.load_best_model_at_end else "no"
    limit = config.save_total_limit
    if limit is None and config.load_best_model_at_end and config.save_steps is None:
        limit = 1
    found = {
        "eval_strategy": "no" if not evaluates else "steps" if config.eval_steps else "epoch",
        "save_strategy": strategy,
        "save_steps": config.save_steps or 500,
        "save_total_limit": limit,
        "load_best_model_at_end": config.load_best_model_at_end,
    }
    if strategy == "best" or config.load_best_model_at_end or config.early_stopping_patience:
        # of rewards more is better; the loss of grpo says nothing
        rewarded = config.stage == "grpo"
        found |= {"metric_for_best_model": "reward" if rewarded else "loss", "greater_is_better": rewarded}
    return found


def require_early_stopping(args: Any) -> None:
    """Complete the arguments of a training that may stop early.

    Args:
        args: `oribi.SFTConfig`, before transformers has seen its values.

    Raises:
        ConfigError: the patience is no whole number above 0, or nothing is evaluated.
    """
    patience = args.early_stopping_patience
    if patience is None:
        return
    if not isinstance(patience, int) or isinstance(patience, bool) or patience < 1:
        raise ConfigError(f"early_stopping_patience = {patience!r}; must be a whole number of at least 1")
    if str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "no":
        raise ConfigError(
            "early_stopping_patience needs evaluations: set eval_strategy to 'steps' or 'epoch', and pass eval_dataset"
        )
    if args.metric_for_best_model is None:
        args.metric_for_best_model = "loss"


class EarlyStop(EarlyStoppingCallback):
    """transformers' early stopping; a resumed training goes on with the evaluations that it counted."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        stored = state.stateful_callbacks.get(type(self).__name__)
        stored = stored[0] if isinstance(stored, list) and stored else stored
        counted = (
            stored["attributes"]["early_stopping_patience_counter"] if state.global_step and stored else 0
        )
        self.early_stopping_patience_counter = counted

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        asked_before = control.should_training_stop
        super().on_evaluate(args, state, control, metrics=metrics, **kwargs)
        if control.should_training_stop and not asked_before and state.is_world_process_zero:
            count = self.early_stopping_patience
            since = "the last evaluation" if count == 1 else f"the last {count} evaluations"
            say(f"oribi: stopping at step {state.global_step:,}: {since} brought no improvement")


def describe_best(state: TrainerState, args: TrainingArguments) -> str | None:
    """Which step's weights a finished training has, where these are not the last ones'; None otherwise."""
    best = state.best_global_step
    if not args.load_best_model_at_end or not best or best == state.global_step:
        return None
    name = (args.metric_for_best_model or "loss").removeprefix("eval_")
    return f"the weights of step {best:,} are kept, the best evaluation (eval_{name} {state.best_metric:.4f})"
