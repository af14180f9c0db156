"""What oribi adds to TRL's trainers for preferences and rewards: its optimizer, its checkpoints and resuming, rows in tokens.

The losses are TRL's. A class of `mixin_of` stands before TRL's in the order of inheritance, so that it overrides TRL's methods
and nothing of TRL is changed.
"""

import time
from typing import Any

import datasets
import torch
from accelerate.utils import AutocastKwargs
from peft import PeftModel
from torch import nn

from oribi.errors import ConfigError
from oribi.memory.estimate import LOGITS_BYTES
from oribi.memory.plan import apply_plan, free_device_bytes
from oribi.models.pretrained import DecoderPreTrainedModel
from oribi.models.unwrap import base_model, source_of
from oribi.text import say
from oribi.train.fingerprint import LAYOUT_BOUND
from oribi.train.optimizer import OptimizerTrainer
from oribi.train.resume import Resumed
from oribi.train.run_trainer import RunTrainer
from oribi.train.setup import temporarily
from oribi.train.stage_rows import RowsOnceTrainer

REFERENCE = "ref"  # TRL's name of the adapter that it copies for the reference
# device bytes that TRL's loss takes beside the layers: tiles of logits and of their gradients
LOSS_BYTES = 2**29
# logs after which a training whose rewards tell no answer from another is remarked upon
EQUAL_REWARDS = 10


class StageTrainer(OptimizerTrainer, RunTrainer):
    """A trainer of TRL's that is a run of oribi's.

    Args:
        model: loaded, with its adapter.
        args: of TRL's config class.
        rows, held_out: prepared rows; None where nothing is evaluated.
        tokenizer: of the model.
        keywords: further arguments of TRL's trainer.
    """

    stage = ""
    sequences_per_row = 1
    _planned = False
    _equal_rewards = 0

    def __init__(
        self, model: nn.Module, args: Any, rows: Any, held_out: Any, tokenizer: Any, **keywords: Any
    ) -> None:
        base = base_model(model)
        # TRL would round the adapter of a 4-bit model to bfloat16, where small updates are lost
        packed = {"is_loaded_in_4bit": False} if getattr(base, "is_loaded_in_4bit", False) else {}
        starts_at_base = adapter_is_untrained(model)
        with temporarily(base, **packed):
            super().__init__(
                model=model,
                args=args,
                train_dataset=rows,
                eval_dataset=held_out,
                processing_class=tokenizer,
                **keywords,
            )
        if starts_at_base:  # the reference is the model without its adapter: no copy of that is needed
            self._drop_reference()
        if isinstance(base, DecoderPreTrainedModel):
            self.accelerator.autocast_handler = AutocastKwargs(enabled=False)
        self._logged = (0, time.monotonic())
        self._add_callbacks(getattr(tokenizer, "decode", None), searches=False)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._logged = (self._tokens(), time.monotonic())
        try:
            return super().train(*args, **kwargs)
        finally:
            self._planned = False
            self._drop_reference()  # the copy goes into no file
            if isinstance(base_model(self.model), DecoderPreTrainedModel):
                base_model(self.model).release()

    def _drop_reference(self) -> None:
        """Remove TRL's copy of the adapter."""
        if isinstance(self.model, PeftModel) and REFERENCE in self.model.peft_config:
            self.model.delete_adapter(REFERENCE)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        if not self._planned:
            self._plan()
        self._begin_part()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._exchange_gradients()
        return loss

    def _plan(self) -> None:
        """Once, before the first step: what layers keep for backward, from the memory that is free."""
        self._planned = True
        base = base_model(self.model)
        if not isinstance(base, DecoderPreTrainedModel) or base.device.type != "cuda":
            return
        if getattr(source_of(self.model), "checkpointing", "off") not in ("auto", "memory"):
            return
        longest = self._longest()
        sequences = self.args.per_device_train_batch_size * self.sequences_per_row
        budget = 0
        if source_of(self.model).checkpointing == "auto":
            budget = max(free_device_bytes(base.device) - self._loss_bytes(sequences * longest), 0)
        say(f"oribi: {apply_plan(base, sequences * longest, longest, budget)}")

    def _longest(self) -> int:
        return self.args.max_length

    def _loss_bytes(self, tokens: int) -> int:
        return LOSS_BYTES

    def _tokens(self) -> int:
        """Tokens trained on so far: TRL counts them in one of these places."""
        return int(max(getattr(self, "_total_train_tokens", 0), self.state.num_input_tokens_seen))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            tokens, since = self._logged
            self._logged = (self._tokens(), time.monotonic())
            if self._logged[0] > tokens:
                logs["tokens_per_second"] = (self._logged[0] - tokens) / max(self._logged[1] - since, 1e-9)
        super().log(logs, start_time)
        self._remark_on_equal_rewards(logs)

    def _remark_on_equal_rewards(self, logs: dict[str, Any]) -> None:
        equal = logs.get("frac_reward_zero_std")
        if equal is None or "loss" not in logs:
            return
        self._equal_rewards = self._equal_rewards + 1 if equal == 1 else 0
        if self._equal_rewards == EQUAL_REWARDS:
            self._say(
                f"the answers to each prompt got equal rewards in the last {EQUAL_REWARDS} logs, so nothing was learned. "
                "Let reward_funcs tell better from worse answers, raise temperature or num_generations, or take easier prompts"
            )

    def _compare(self, resumed: Resumed) -> None:
        super()._compare(resumed)
        if self._added_rows and self.stage in LAYOUT_BOUND:
            raise ConfigError(
                f"{resumed.path} cannot be resumed: {self._added_rows:,} rows were added at the end, which change the batches of "
                f"stage = {self.stage}. Give the run's own rows, or start a new run in another output_dir"
            )

    def _adapters_to_save(self) -> list[str] | None:
        return [name for name in self.model.peft_config if name != REFERENCE]

    # what TRL does besides training
    def _send_telemetry(self) -> None:
        """Nothing: oribi tells no one what is trained."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's report and the card of what is saved say more."""


class PairTrainer(RowsOnceTrainer, StageTrainer):
    """dpo: rows come as tokens, and the reference of a new adapter is the model without it."""

    sequences_per_row = 2

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, name: str) -> Any:
        if "chosen_ids" in dataset.column_names:
            return dataset
        return super()._prepare_dataset(dataset, processing_class, args, name)


class OddsRatioTrainer(RowsOnceTrainer, StageTrainer):
    """orpo: the rows' tokens in the columns of TRL's ORPOTrainer, which forms all logits at once."""

    sequences_per_row = 2

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, list[int]]:
        """A row in tokens, its prompt not labelled."""
        if "chosen_ids" not in feature:
            return super().tokenize_row(feature, model)
        prompt = list(feature["prompt_ids"])
        found = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for name in ("chosen", "rejected"):
            answer = list(feature[f"{name}_ids"])
            found |= {
                f"{name}_input_ids": prompt + answer,
                f"{name}_attention_mask": [1] * (len(prompt) + len(answer)),
                f"{name}_labels": [-100] * len(prompt) + answer,
            }
        return found

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        masks = (inputs["chosen_attention_mask"], inputs["rejected_attention_mask"])
        self.state.num_input_tokens_seen += sum(int(mask.sum()) for mask in masks) * self.args.world_size
        return super().training_step(model, inputs, num_items_in_batch)

    def _loss_bytes(self, tokens: int) -> int:
        return LOSS_BYTES + LOGITS_BYTES * tokens * base_model(self.model).config.vocab_size


class JudgedTrainer(RowsOnceTrainer, StageTrainer):
    """kto: rows come as tokens, in an order that mixes good and bad ones.

    How far the model has moved is measured over the rows that all processes compute at once.
    """

    compares_processes = True

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, name: str) -> Any:
        if "completion_ids" not in dataset.column_names:
            return super()._prepare_dataset(dataset, processing_class, args, name)
        if name == "train":
            # TRL reads them in their order, since a row is paired with another one's answer
            dataset = dataset.shuffle(seed=args.seed).flatten_indices()
        if not self.calculate_KL:
            return dataset
        # within the rows that are compared with each other
        size = args.per_device_eval_batch_size
        if name == "train":
            size = args.per_device_train_batch_size * args.world_size
        return dataset.map(
            mismatched, batched=True, batch_size=size, desc="Pairing prompts with other answers"
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if "ref_KL_logps" in inputs:
            inputs = {**inputs, "ref_KL_logps": self._mean_of_rows(inputs["ref_KL_logps"])}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _compute_kl_logps(self, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor | None:
        logps = super()._compute_kl_logps(model, batch)
        return None if logps is None else self._mean_of_rows(logps)

    def _mean_of_rows(self, logps: torch.Tensor) -> torch.Tensor:
        # TRL takes the mean of the processes' means, in which a row of a smaller batch would count more
        return torch.full_like(logps, self._gather(logps).mean()) if self._is_uneven() else logps


def mismatched(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Each prompt of a batch with its neighbour's answer, by which kto measures how far the model has moved."""
    answers = rows["completion_ids"]
    return {"KL_completion_ids": [answers[-1], *answers[:-1]]}


class RewardModelTrainer(RowsOnceTrainer, StageTrainer):
    """reward: a head of one label scores whole conversations."""

    sequences_per_row = 2


class PolicyTrainer(StageTrainer):
    """grpo: the model answers prompts, and functions score the answers."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if not self.reads_stream:
            self._remark_on_left_prompts()
        return super().train(*args, **kwargs)

    def _remark_on_left_prompts(self) -> None:
        """TRL takes whole groups of answers at once, and in evaluation equally many in each process."""
        at_once = self.args.generation_batch_size // self.num_generations
        prompts = len(self.train_dataset)
        if prompts < at_once:
            raise ConfigError(
                f"{prompts} prompts, and stage = grpo answers {at_once} different ones at once ({self.num_generations} times each): "
                "lower per_device_train_batch_size or gradient_accumulation_steps, raise num_generations, or give more prompts"
            )
        if prompts % at_once:
            self._say(
                f"{prompts:,} prompts are no multiple of the {at_once} that are answered at once: each pass leaves out "
                f"{prompts % at_once}, mostly others each time"
            )
        held_out = len(self.eval_dataset) if isinstance(self.eval_dataset, datasets.Dataset) else 0
        size = self.args.per_device_eval_batch_size * self.args.world_size
        repeated = -held_out * self.num_generations_eval % size
        if repeated and self.args.world_size > 1:
            self._say(
                f"the {held_out * self.num_generations_eval:,} answers of an evaluation are no multiple of the {size} that "
                f"{self.args.world_size} processes give at once: {repeated} answers to its first prompts count twice"
            )

    def _longest(self) -> int:
        longest = (
            max((len(ids) for ids in self.train_dataset["prompt_ids"]), default=0)
            if self._knows_lengths()
            else 0
        )
        return longest + self.args.max_completion_length

    def _knows_lengths(self) -> bool:
        return (
            isinstance(self.train_dataset, datasets.Dataset)
            and "prompt_ids" in self.train_dataset.column_names
        )


MIXINS = {
    "dpo": PairTrainer, "orpo": OddsRatioTrainer, "kto": JudgedTrainer, "reward": RewardModelTrainer, "grpo": PolicyTrainer,
}  # fmt: skip


def mixin_of(stage: str) -> type[StageTrainer]:
    """What a stage's trainer inherits before TRL's class."""
    return MIXINS[stage]


def adapter_is_untrained(model: nn.Module) -> bool:
    """Whether a model with LoRA still computes what its base does."""
    if not isinstance(model, PeftModel):
        return False
    return not any(
        bool(p.any())
        for name, p in model.named_parameters()
        if "lora_B" in name or "lora_embedding_B" in name
    )
