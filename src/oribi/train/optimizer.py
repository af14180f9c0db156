"""The part of a trainer that makes its optimizer: oribi's flat AdamW, clipping within its step, rates by kind of parameter."""

from typing import Any

import torch
from torch import nn

from oribi.errors import ConfigError
from oribi.kernels.adamw import FLAT_OPTIMIZERS, FlatAdamW
from oribi.models.unwrap import base_model
from oribi.text import say
from oribi.train.graphs import is_users
from oribi.train.guard import LossGuard
from oribi.train.several import ProcessesTrainer


class OptimizerTrainer(ProcessesTrainer):
    """transformers' `Trainer` with oribi's optimizer, whatever computes the loss."""

    guard: LossGuard
    # of the optimizer's groups, and the embeddings' rate of the last step
    _main_group = 0
    _embedding_group: int | None = None
    _embedding_rate: float | None = None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """oribi's flat AdamW for the names in `FLAT_OPTIMIZERS`, otherwise what transformers makes of `optim`."""
        if self.optimizer is not None:
            return self.optimizer
        args, model = self.args, self.model if model is None else model
        bits = FLAT_OPTIMIZERS.get(str(getattr(args.optim, "value", args.optim)))
        if self.optimizer_cls_and_kwargs is not None or is_users(self, "get_optimizer_cls_and_kwargs"):
            bits = None
        if bits is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            if args.embedding_learning_rate is None and args.loraplus_lr_ratio is None:
                return super().create_optimizer(model)
            kind, options = self.get_optimizer_cls_and_kwargs(args, model)
            self.optimizer = kind(self._parameter_groups(model), **options)
            return self.optimizer
        # a trainer with its own clipping sees the gradients before the optimizer does
        clips_itself = is_users(self, "_clip_grad_norm") or "clip_grad_norm_" in vars(self.accelerator)
        self.optimizer = FlatAdamW(
            self._parameter_groups(model),
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
            max_grad_norm=None if clips_itself else args.max_grad_norm or None,
            bits=bits,
        )
        return self.optimizer

    def _parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Trained parameters by learning rate and weight decay."""
        decayed = set(self.get_decay_parameter_names(model))
        base, embedding_rate = base_model(model), self.args.embedding_learning_rate
        ratio = self.args.loraplus_lr_ratio
        # whole matrices and rows of added tokens; LoRA factors of a head learn as all others do
        ends = {
            id(p)
            for module in (base.get_input_embeddings(), base.get_output_embeddings())
            if module is not None  # a classifier has no head of words
            for name, p in module.named_parameters()
            if "lora_" not in name
        }
        # by kind, not by value: a resumed run may change the values, and its optimizer's groups stay the same
        groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                faster = ratio is not None and "lora_B" in name  # LoRA+ (arXiv 2402.12354): A and B apart
                kind = (id(parameter) in ends, faster, name in decayed)
                groups.setdefault(kind, []).append(parameter)
        kinds = [at_end for at_end, _, _ in groups]
        if embedding_rate is not None and True not in kinds:
            say(
                f"oribi: embedding_learning_rate = {embedding_rate:g} has no effect: neither embeddings nor head are trained whole; "
                "embed_tokens in target_modules, or modules_to_save, trains them"
            )
        if ratio is not None and not any(faster for _, faster, _ in groups):
            raise ConfigError(f"loraplus_lr_ratio = {ratio:g}: no LoRA pairs are trained; leave it out")
        main = [not at_end and not faster for at_end, faster, _ in groups]
        self._main_group = main.index(True) if True in main else 0
        self._embedding_group = kinds.index(True) if True in kinds and embedding_rate is not None else None
        return [
            {
                "params": parameters,
                "lr": embedding_rate
                if at_end and embedding_rate is not None
                else self.args.learning_rate * (ratio if faster else 1),
                "weight_decay": self.args.weight_decay if decays else 0.0,
            }
            for (at_end, faster, decays), parameters in groups.items()
        ]

    def _get_learning_rate(self) -> float:
        rate = super()._get_learning_rate()
        if self.is_deepspeed_enabled:
            return rate
        groups = self.optimizer.param_groups
        if self._embedding_group is not None:
            self._embedding_rate = groups[self._embedding_group]["lr"]
        # transformers reports the first group's, which may be that of the embeddings
        return groups[self._main_group]["lr"] if self._main_group else rate

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._embedding_rate is not None:
            logs["embedding_learning_rate"] = self._embedding_rate
        super().log(logs, start_time)

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor | float:
        # the flat optimizer clips within its step, where the norm costs no pass over the gradients of its own
        flat = self._clipping_optimizer()
        return super()._clip_grad_norm(model) if flat is None else flat.last_grad_norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> torch.Tensor | float:
        flat = self._clipping_optimizer()
        if flat is not None:  # it skips a step whose norm is not finite; the guard sees it at the next log
            return flat.last_grad_norm
        norm = super()._get_grad_norm(model, grad_norm)
        self.guard.require_norm(norm, self.state.global_step + 1, self.model, self.args)
        return norm

    def _clipping_optimizer(self) -> FlatAdamW | None:
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        return inner if isinstance(inner, FlatAdamW) and inner.max_grad_norm is not None else None
