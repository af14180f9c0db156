"""The part of the trainer that computes an optimizer step: cut to the memory, as recorded graphs or as usual, and its loss."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from oribi.memory.plan import choose, free_bytes
from oribi.models.unwrap import base_model
from oribi.train.extension_points import ModelWatch, changed_step, is_users
from oribi.train.fp8 import switch_on
from oribi.train.graphs import StepGraphs, reason_against
from oribi.train.neftune import EmbeddingNoise
from oribi.train.setup import longest_row
from oribi.train.sharding import is_sharded
from oribi.train.smaller_steps import SmallerSteps

logger = logging.getLogger(__name__)


class StepTrainer(Trainer):
    """transformers' `Trainer` with oribi's way to compute a step.

    Attributes:
        own_loss: whether the model computes its loss itself, from hidden states.
        step_runner: if set, runs each micro-batch in place of the usual forward and backward:
            (model, inputs, targets of the step) -> loss.
    """

    own_loss: bool
    tokens_seen: int
    step_runner: Callable | None = None
    _steps_chosen = False
    _smaller: SmallerSteps | None = None
    _watch: ModelWatch | None = None
    _watched_step = -1
    _noise: EmbeddingNoise | None = None
    _parameters: int | None = None  # without embeddings

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        self.tokens_seen += inputs["input_ids"].numel() * self.args.world_size
        self.guard.keep(self.state.global_step + 1, inputs)
        # a mean of the micro-batch cannot be cut into parts, and nobody knows what a loss of the user's is
        if not self.own_loss or num_items_in_batch is None or is_users(self, "compute_loss"):
            return self._micro_step(model, inputs, num_items_in_batch)
        if self._smaller is None:
            self._smaller = SmallerSteps(
                lambda part, targets: self._micro_step(model, part, targets),
                self._restart_step,
                self.args.world_size,
                plans=self._plans_memory(model),
            )
        return self._smaller(self.state.global_step, inputs, num_items_in_batch)

    def _micro_step(self, model: nn.Module, inputs: dict[str, Any], targets: Any) -> torch.Tensor:
        """Forward and backward of a micro-batch, or of a part of one."""
        if self._noise is not None:
            self._noise.measure(inputs)
        if not self._steps_chosen:
            self._choose_steps(model)
        if isinstance(self.step_runner, StepGraphs):
            self._require_same_model()
        if self.step_runner is not None and targets is not None:
            if not model.training:  # asking is cheaper than telling a thousand modules
                model.train()
            return self.step_runner(model, inputs, targets)
        return super().training_step(model, inputs, targets)

    def _restart_step(self) -> None:
        """After a shortage of memory: gradients are zero, memory is free, and the next micro-step plans anew."""
        self._release_steps()
        self.model.zero_grad()  # accelerate's optimizer ignores the call between two steps
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _plans_memory(self, model: nn.Module) -> bool:
        """Whether what layers keep follows from the free memory; the plan takes weights for whole and lying still."""
        base = base_model(model)
        choice = getattr(getattr(base, "oribi", None), "checkpointing", False)
        return choice in (True, "auto", "oribi", "unsloth", "memory") and not is_sharded(base)

    def _release_steps(self) -> None:
        """Frees recorded graphs and what layers keep from step to step; the next training chooses again."""
        self._stop_graphs()
        self._steps_chosen = False
        if self.own_loss:
            base_model(self.model).use_fp8(False)
            base_model(self.model).release()

    def _stop_graphs(self, reason: str | None = None) -> None:
        """Frees recorded graphs; steps run as usual from now on. A reason is said."""
        if not isinstance(self.step_runner, StepGraphs):
            return
        self.step_runner = None
        vars(self.model_wrapped).pop("zero_grad", None)
        if reason is not None:
            logger.warning(
                "no CUDA graphs from step %d on: %s; steps run as usual", self.state.global_step + 1, reason
            )

    def _require_same_model(self) -> None:
        """Before a recorded step: stops the recording where it would leave out what the user has added since."""
        first = self.state.global_step != self._watched_step
        self._watched_step = self.state.global_step
        # adapters are compared once per optimizer step, hooks are looked for in every micro-step
        reason = changed_step(self) if first else None
        if reason is None and (self._watch.changed() if first else self._watch.hooked()):
            reason = self._watch.reason()
        if reason is not None:
            self._stop_graphs(reason)

    def _choose_steps(self, model: nn.Module) -> None:
        """Once, before the first step: what layers keep for backward, and how steps are computed."""
        self._steps_chosen = True
        base = base_model(model)
        if not self.own_loss:
            return
        # how a CPU is spared is nothing to read about in every run
        level = logging.INFO if base.device.type == "cuda" else logging.DEBUG
        longest = longest_row(self.train_dataset) or self.args.max_length
        tokens = self.args.per_device_train_batch_size * longest
        reliance = 1.0
        if self._smaller is not None:
            tokens, reliance = max(tokens // self._smaller.parts, longest), self._smaller.reliance
        if self._plans_memory(model):
            least = base.oribi.checkpointing == "memory"
            budget = 0 if least else int(reliance * free_bytes(base.device))
            logger.log(level, choose(base, tokens, longest, budget))
        elif is_sharded(base) and base.oribi.checkpointing == "memory":
            base.set_recompute_policy("memory")
        if self.args.fp8:
            logger.info(switch_on(base))
        if self.step_runner is None:
            scaled = self.accelerator.scaler is not None
            optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
            reason = reason_against(model, base, optimizer, tokens, self.args.world_size, scaled)
            if reason is None and self._noise is not None:
                reason = "noise is drawn anew in every step"
            if reason is None:
                self._watch = ModelWatch(model)
                reason = changed_step(self) or self._watch.reason()
            if reason is None:
                self.step_runner = StepGraphs(model, base, optimizer)
                if "zero_grad" not in vars(model):
                    # the same effect without a walk over all modules in every step
                    model.zero_grad = optimizer.zero_grad
            logger.log(
                level, "steps run as recorded CUDA graphs" if reason is None else f"no CUDA graphs: {reason}"
            )

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # transformers counts the parameters anew in every step
        if self._parameters is None:
            self._parameters = self.model.num_parameters(exclude_embeddings=True)
        return 6 * inputs["input_ids"].numel() * self._parameters

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self.own_loss:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # None: they are formed when they are read
        needs_logits = self.label_smoother is not None or self.compute_loss_func is not None or None
        inputs = {
            **inputs,
            "use_cache": False,
            "output_logits": needs_logits if return_outputs else bool(needs_logits),
        }
        if num_items_in_batch is not None:
            # a step whose examples were all cut down to their prompts has nothing to learn, which is no error
            num_items_in_batch = torch.as_tensor(num_items_in_batch).clamp(min=1)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
