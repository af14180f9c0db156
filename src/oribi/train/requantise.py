"""The last part of a training for one merged GGUF file: forward sees checkpoint and adapter quantised together."""

import math
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from oribi.errors import ConfigError
from oribi.models.unwrap import source_of
from oribi.save.requantised import Factors, Requantiser
from oribi.text import say
from oribi.train.run_trainer import RunTrainer

SHARE = 0.25  # of all steps
EVERY = 8  # steps between two quantisations
FACTORS_FILE = "requantised.safetensors"


class RequantisingTrainer(RunTrainer):
    """transformers' `Trainer` that quantises frozen weights with the adapter, where `args.merges_codes` asks for it."""

    _requantiser: Requantiser | None = None
    _before: float | None = None  # held-out loss of the merged file as the last part begins
    _factors: Factors | None = None  # that the frozen weights hold; None before the last part

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if not self.args.merges_codes:
            return super().train(*args, **kwargs)
        if getattr(getattr(source_of(self.model), "identity", None), "train_for", None) is None:
            raise ConfigError("merges_codes needs a model that was loaded with train_for")
        self._requantiser, self._factors = Requantiser(self.model), None
        callback = _LastPart(self)
        self.add_callback(callback)
        try:
            output = super().train(*args, **kwargs)
        finally:
            self.remove_callback(callback)
        self.quantise()
        after = self._held_out_loss()
        if self._before is not None and after is not None and self.is_world_process_zero():
            method = source_of(self.model).identity.train_for
            say(
                f"oribi: held-out loss of the merged {method} file: {self._before:.4f} before the last part, {after:.4f} after it"
            )
        return output

    def _held_out_loss(self) -> float | None:
        """The loss on the evaluation rows; None where there are none, or several sets."""
        if self.eval_dataset is None or isinstance(self.eval_dataset, dict):
            return None
        rows = self.get_eval_dataloader()
        return self.evaluation_loop(rows, "Evaluation", prediction_loss_only=True).metrics["eval_loss"]

    def quantise(self, factors: Factors | None = None) -> None:
        """Quantises the adapter, or earlier factors of it, with the checkpoint; what was recorded of steps is freed."""
        self._release_steps()
        self._factors = self._requantiser.quantise(factors)

    def begin_last_part(self) -> None:
        """Quantises for the first time, and measures what the merged file would be without a last part."""
        self.quantise()
        self._before = self._held_out_loss()

    def quantise_base(self) -> None:
        """Gives the frozen weights the codes of the checkpoint alone, if they have others."""
        if self._factors is not None:
            self.quantise({name: (a, b * 0) for name, (a, b) in self._factors.items()})
            self._factors = None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The merged file as it would be now is evaluated, in the last part."""
        if self._factors is None:
            return super().evaluate(*args, **kwargs)
        weights, factors = self._requantiser.weights(), self._factors
        self.quantise()
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._release_steps()
            self._requantiser.put(weights)
            self._factors = factors

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._factors is not None and self.args.should_save:
            found = {
                f"{name}.{part}": t for name, pair in self._factors.items() for part, t in zip("ab", pair)
            }
            save_file(found, Path(output_dir) / FACTORS_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._requantiser is None or checkpoint is None or not (Path(checkpoint) / FACTORS_FILE).is_file():
            return
        found = load_file(Path(checkpoint) / FACTORS_FILE)
        names = {name.rpartition(".")[0] for name in found}
        self.quantise({name: (found[f"{name}.a"], found[f"{name}.b"]) for name in names})


class _LastPart(TrainerCallback):
    """Quantises at the first step of the last part and every `EVERY` steps from it on."""

    def __init__(self, trainer: RequantisingTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        first = state.max_steps - math.ceil(SHARE * state.max_steps)
        step = state.global_step - first
        if step < 0:
            self.trainer.quantise_base()  # a run that had ended goes on
            return
        if step % EVERY and self.trainer._factors is not None:
            return
        if step == 0:  # earlier evaluations were of another model
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
            if state.is_world_process_zero:
                say(
                    f"oribi: from step {first + 1} on, checkpoint and adapter are quantised together every {EVERY} steps"
                )
            self.trainer.begin_last_part()
            return
        self.trainer.quantise()
