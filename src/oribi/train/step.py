"""STEP 6, inside: one optimizer step, from its micro-batches to the changed weights.

    plan      once: what each layer keeps for backward, and whether steps are recorded      `_plan`
    cut       a micro-batch into parts, once memory was short                               `SmallerSteps`
    replay    the recorded graph of forward, loss and backward; or run them                 `StepGraphs`, `_micro_step`
    loss      a sum over targets, divided by the targets of the whole step                  `compute_loss`
    reduce    gradients over the processes, in one sum after the last micro-batch           `ProcessesTrainer`
    update    norm, clipping and AdamW in one pass over flat buffers                        `create_optimizer`

B rows, S tokens per row, D hidden size.
"""

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from oribi.errors import ConfigError
from oribi.kernels.context_attention import chunk_tokens
from oribi.memory.plan import apply_plan, free_device_bytes
from oribi.models.unwrap import base_model, source_of
from oribi.train.ahead import TRAINED_ROWS, AheadTrainer
from oribi.train.batches import row_lengths
from oribi.train.context import shares_rows
from oribi.train.graphs import ModelWatch, StepGraphs, changed_step, is_users, reason_against
from oribi.train.optimizer import OptimizerTrainer
from oribi.train.shards import in_lockstep
from oribi.train.smaller_steps import SmallerSteps, StepsOfSharedRows
from oribi.train.smaller_steps_together import SmallerStepsTogether

logger = logging.getLogger(__name__)


class StepTrainer(OptimizerTrainer, AheadTrainer):
    """transformers' `Trainer` with oribi's optimizer step.

    Attributes:
        own_loss: whether the model computes its loss itself, from hidden states.
        step_runner: if set, runs each micro-batch in place of the usual forward and backward:
            (model, inputs, targets of the step) -> loss.
        step_counts: micro-steps by how they ran, where steps are recorded: "replayed", "recorded", "eager".
    """

    own_loss: bool
    tokens_seen: int
    step_runner: Callable | None = None
    step_counts: Counter[str]
    _planned = False
    _smaller: SmallerSteps | None = None
    _watch: ModelWatch | None = None
    _watched_step = -1
    _noise: "EmbeddingNoise | None" = None
    _parameters: int | None = None  # without embeddings

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Loss [] of one micro-batch, its gradients added; the Trainer then calls the optimizer once per step.

        Args:
            model: as the Trainer wrapped it.
            inputs: a batch: input_ids [B, S], labels, and the documents' bounds where rows are joined.
            num_items_in_batch: targets of the whole optimizer step, over all processes.
        """
        self.tokens_seen += inputs["input_ids"].numel() * self.args.world_size
        self.guard.keep(self.state.global_step + 1, inputs)
        self._begin_part()
        loss = self._whole_micro_step(model, inputs, num_items_in_batch)
        self._exchange_gradients()
        return loss

    def _whole_micro_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> torch.Tensor:
        # a mean over the micro-batch cannot be cut into parts, and a user's loss need not be a sum over targets
        if self.args.context_parallel > 1 and is_users(self, "compute_loss"):
            raise ConfigError(
                f"context_parallel = {self.args.context_parallel}: each process sees a part of a row, and your own compute_loss would "
                "take it for a whole one. Leave out one of them"
            )
        if not self.own_loss or num_items_in_batch is None or is_users(self, "compute_loss"):
            return self._micro_step(model, inputs, num_items_in_batch)
        if self._smaller is None:
            self._smaller = self._smaller_steps(
                lambda part, targets: self._micro_step(model, part, targets), base_model(model)
            )
        return self._smaller(self.state.global_step, inputs, num_items_in_batch)

    def _smaller_steps(self, run: Callable[..., torch.Tensor], base: nn.Module) -> SmallerSteps:
        plans = self._plans_memory(base)
        if shares_rows(base):
            return StepsOfSharedRows(run, self._restart_step)
        if not in_lockstep(base):
            return SmallerSteps(run, self._restart_step, plans)
        return SmallerStepsTogether(
            run, self._restart_step, plans, base,
            is_last=lambda: self.accelerator.sync_gradients,
            least=lambda value: self.exchange.least(value),  # each training has its own
            agree=self._agree,
            is_first=self.is_world_process_zero(),
        )  # fmt: skip

    def _micro_step(self, model: nn.Module, inputs: dict[str, Any], targets: Any) -> torch.Tensor:
        """Forward and backward of a micro-batch, or of a part of one."""
        if self._noise is not None:
            self._noise.measure(inputs)
        if not self._planned:
            self._plan(model)
        if isinstance(self.step_runner, StepGraphs):
            self._require_same_model()
        if self.step_runner is not None and targets is not None:
            if not model.training:  # train() walks about 1,000 modules
                model.train()
            known = (self.trained_rows_of(inputs),) if isinstance(self.step_runner, StepGraphs) else ()
            return self.step_runner(model, inputs, targets, *known)
        return super().training_step(model, inputs, targets)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self.own_loss:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # None: they are formed when they are read
        needs_logits = self.label_smoother is not None or self.compute_loss_func is not None or None
        rows = self.trained_rows_of(inputs)
        inputs = {
            **inputs,
            **({} if rows is None else {TRAINED_ROWS: rows}),
            "use_cache": False,
            "output_logits": needs_logits if return_outputs else bool(needs_logits),
        }
        if num_items_in_batch is not None:
            # a step whose examples were all cut down to their prompts has nothing to learn, which is no error
            num_items_in_batch = torch.as_tensor(num_items_in_batch).clamp(min=1)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _plan(self, model: nn.Module) -> None:
        """Once, before the first step: what layers keep for backward, and how steps are computed."""
        self._planned = True
        base = base_model(model)
        if not self.own_loss:
            return
        level = logging.INFO if base.device.type == "cuda" else logging.DEBUG
        longest = max(row_lengths(self.train_dataset), default=0) or self.args.max_length
        tokens, context = self.args.per_device_train_batch_size * longest, self.args.context_parallel
        if context > 1:
            tokens = 2 * chunk_tokens(tokens, context)
        reliance = 1.0
        if self._smaller is not None and context == 1:
            tokens, reliance = max(tokens // self._smaller.parts, longest), self._smaller.reliance
        if self._plans_memory(model):
            least = base.oribi.checkpointing == "memory"
            budget = 0 if least else int(reliance * free_device_bytes(base.device))
            if in_lockstep(base) or context > 1:  # none may wait for one that computes more of it again
                budget = self.exchange.least(budget)
            # what is computed again is exchanged again: processes that share rows keep the same
            agree = (lambda keeps: self.exchange.agree(keeps)[0]) if context > 1 else None
            logger.log(level, apply_plan(base, tokens, longest, budget, context, agree))
        if self.args.fp8:
            base.train()  # dropout is read where it acts
            base.use_fp8(True)
            logger.info(base.precision_in_fp8())
        if self.step_runner is None:
            reason = self._start_recording(model, base, tokens)
            said = "steps run as recorded CUDA graphs" if reason is None else f"no CUDA graphs: {reason}"
            logger.log(level, said)

    def _plans_memory(self, model: nn.Module) -> bool:
        """Whether the free memory decides what layers keep."""
        return getattr(source_of(model), "checkpointing", "off") in ("auto", "memory")

    def _start_recording(self, model: nn.Module, base: nn.Module, tokens: int) -> str | None:
        """Records steps as CUDA graphs, or returns the reason against it."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        scaled = self.accelerator.scaler is not None
        reason = reason_against(model, base, optimizer, tokens, in_lockstep(base), scaled)
        if reason is None and shares_rows(base):
            reason = "processes exchange keys and values while a layer computes"
        if reason is None and self._noise is not None:
            reason = "noise is drawn anew in every step"
        if reason is None:
            self._watch = ModelWatch(model)
            reason = changed_step(self) or self._watch.reason()
        if reason is None:
            self.step_runner = StepGraphs(
                model, base, optimizer, self._loss_factor, self._micro_steps_left, self.step_counts
            )
            if "zero_grad" not in vars(model):
                # the same effect without a walk over all modules in every step
                model.zero_grad = optimizer.zero_grad
        return reason

    def _micro_steps_left(self) -> int:
        return (self.state.max_steps - self.state.global_step) * self.args.gradient_accumulation_steps

    def _require_same_model(self) -> None:
        """Before a recorded step: stops replaying if the user has added something that a replay would leave out."""
        first = self.state.global_step != self._watched_step
        self._watched_step = self.state.global_step
        # adapters are compared once per optimizer step, hooks are looked for in every micro-step
        reason = changed_step(self) if first else None
        if reason is None and (self._watch.changed() if first else self._watch.hooked()):
            reason = self._watch.reason()
        if reason is not None:
            self._stop_recording()
            step = self.state.global_step + 1
            logger.warning("no CUDA graphs from step %d on: %s; steps run as usual", step, reason)

    def _stop_recording(self) -> None:
        """Frees recorded graphs; steps run as usual from now on."""
        if isinstance(self.step_runner, StepGraphs):
            self.step_runner = None
            vars(self.model_wrapped).pop("zero_grad", None)

    def _release_steps(self) -> None:
        """Frees recorded graphs and what layers keep from step to step; the next training plans again."""
        self._stop_recording()
        self._planned = False
        if self.own_loss:
            base_model(self.model).use_fp8(False)
            base_model(self.model).release()

    def _restart_step(self) -> None:
        """After a shortage of memory: gradients are zero, memory is free, and the next micro-step plans anew."""
        self._release_steps()
        self.model.zero_grad()  # accelerate's optimizer ignores the call between two steps
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # transformers counts the parameters anew in every step
        if self._parameters is None:
            self._parameters = self.model.num_parameters(exclude_embeddings=True)
        return 6 * inputs["input_ids"].numel() * self._parameters


class EmbeddingNoise:
    """NEFTune: adds uniform noise to what an embedding gives in training, scaled by each document's own length.

    The size is alpha / sqrt(length * D). transformers' version takes the length of the row, so that documents which
    are joined into one row would get less noise than alone.
    Source: Jain et al. 2023, "NEFTune: Noisy Embeddings Improve Instruction Finetuning", arXiv 2310.05914.

    Args:
        embedding: the model's input embedding.
        alpha: size of the noise, 5 to 15 in the paper.
    """

    def __init__(self, embedding: nn.Module, alpha: float) -> None:
        self.alpha = alpha
        self.lengths: torch.Tensor | None = None
        self._hook = embedding.register_forward_hook(self._add)

    def measure(self, inputs: dict[str, torch.Tensor]) -> None:
        """Take the documents' lengths of the next batch: cu_seq_lens_q [docs + 1] or attention_mask [B, S]."""
        ids = inputs["input_ids"]
        if inputs.get("cu_seq_lens_q") is not None:
            lengths = inputs["cu_seq_lens_q"].diff()
            # the known size avoids a synchronisation
            self.lengths = lengths.repeat_interleave(lengths, output_size=ids.numel()).view(*ids.shape, 1)
        elif inputs.get("attention_mask") is not None:
            self.lengths = inputs["attention_mask"].sum(1)[:, None, None]
        else:
            self.lengths = torch.full((1, 1, 1), ids.shape[1], device=ids.device)

    def remove(self) -> None:
        """Leave the embedding as it was."""
        self._hook.remove()

    def _add(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        if not module.training or self.lengths is None:
            return output
        size = self.alpha / torch.sqrt(self.lengths.to(torch.float32) * output.shape[-1])
        return output + ((torch.rand_like(output, dtype=torch.float32) * 2 - 1) * size).to(output.dtype)
