"""Context parallelism in training: rows longer than one GPU takes, shared by `context_parallel` processes each.

The processes of a group read the same rows. Each cuts its part out of a batch, labels shifted before, so that targets, gradients
and losses add up over processes as those of different rows do. Only attention looks beyond the part: `kernels/context_attention.py`.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig

from oribi.data.collate import PackCollator
from oribi.data.encoding import UNTRAINED
from oribi.errors import ConfigError
from oribi.families import family_of
from oribi.kernels.context_attention import ContextGroup, chunk_tokens, own_chunks
from oribi.launch import require_groups
from oribi.models.decoder import DecoderForCausalLM
from oribi.models.mixers import MIXERS
from oribi.train.arguments import SFTConfig


def require_shareable(config: PretrainedConfig, processes: int) -> None:
    """Before weights are loaded: whether processes can share a row of this model.

    Args:
        config: of the model. processes: that share each row.

    Raises:
        ConfigError: they cannot.
    """
    family = family_of(config)
    if family is None:
        raise ConfigError(
            f"context_parallel = {processes}: {config.model_type} is outside oribi's family table, and transformers' class "
            "cannot share a row. Leave out context_parallel"
        )
    mixers = {MIXERS[family.mixer(config, index)] for index in range(config.num_hidden_layers)}
    found = sorted(mixer.needs_whole_rows for mixer in mixers if mixer.needs_whole_rows)
    if found:
        raise ConfigError(
            f"context_parallel = {processes}: layers of {config.model_type} have {' and '.join(found)}, which processes do not "
            "exchange. Leave out context_parallel, or take a family of attention alone, such as llama, "
            "qwen3, mistral or gemma3"
        )


def require_context(args: SFTConfig, base: nn.Module) -> None:
    """Find what stands against the context parallelism that is asked for.

    Args:
        args: an `SFTConfig`. base: the model, taken out of PEFT's wrapper.

    Raises:
        ConfigError: the number of processes, the model or another setting rules it out.
    """
    processes = args.context_parallel
    if processes < 1:
        raise ConfigError(f"context_parallel = {processes}; must be at least 1")
    if processes == 1:
        return
    require_groups(processes, args.world_size)
    require_shareable(base.config, processes)
    problems = list(_problems(args, base))
    if problems:
        raise ConfigError(f"context_parallel = {processes}, but {'; and '.join(problems)}")


def _problems(args: SFTConfig, base: nn.Module) -> Iterator[str]:
    if not isinstance(base, DecoderForCausalLM):
        yield f"{type(base).__name__} is transformers' class, which cannot share a row: leave out context_parallel"
    if args.padding_free is False:
        yield "padding_free = False makes rectangles, and only rows without padding are cut: leave out padding_free"
    if args.neftune_noise_alpha is not None:
        yield "neftune_noise_alpha scales its noise by whole documents, of which each process sees a part: leave it out"
    if args.label_smoothing_factor:
        yield "label_smoothing_factor wants the logits of whole rows: leave it out"
    if not args.average_tokens_across_devices:
        yield "average_tokens_across_devices = False would weigh parts of a row alike: leave it out"
    if args.accelerator_config.split_batches:
        yield "split_batches gives the processes of a group different rows: leave it out"
    if args.deepspeed:
        yield "DeepSpeed connects the processes in its own way: leave one of them out"
    if args.parallelism_config is not None:
        yield "parallelism_config asks accelerate for it as well: leave that out"


class RowPart:
    """A collator that leaves one process's part of the row that another one makes.

    Args:
        collate: makes a row of documents, as `PackCollator` does.
        processes: that share the row. rank: this one among them.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], processes: int, rank: int) -> None:
        self._collate, self._processes, self._rank = collate, processes, rank

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        """The part.

        Returns:
            input_ids, labels, shift_labels, position_ids [1, 2c] (of the process's two chunks); cu_seq_lens_q [documents + 1] of
            the whole row, whose last document is lengthened to 2C c; max_length_q as it was; context_chunk: c.
        """
        row = self._collate(examples)
        ids = row["input_ids"]
        chunk = chunk_tokens(ids.shape[1], self._processes)
        padding = 2 * self._processes * chunk - ids.shape[1]
        bounds = row["cu_seq_lens_q"].clone()
        bounds[-1] += padding
        behind = row["position_ids"][:, -1:] + 1 + torch.arange(padding)

        def own(x: torch.Tensor) -> torch.Tensor:
            chunks = x.view(2 * self._processes, chunk)
            return chunks[list(own_chunks(self._rank, self._processes))].view(1, -1)

        labels = F.pad(row["labels"], (0, padding + 1), value=UNTRAINED)
        return {
            "input_ids": own(F.pad(ids, (0, padding), value=int(ids[0, -1]))),
            "labels": own(labels[:, :-1]),
            "shift_labels": own(labels[:, 1:]),
            "position_ids": own(torch.cat([row["position_ids"], behind], dim=1)),
            "cu_seq_lens_q": bounds,
            "max_length_q": row["max_length_q"],
            "context_chunk": chunk,
        }


def join_context(trainer: Any) -> ContextGroup:
    """Connects the processes that share rows, once the trainer knows its collator and losses; all processes call it together.

    Args:
        trainer: an `SFTTrainer`.

    Raises:
        ConfigError: something that the trainer was given wants whole rows.
    """
    args = trainer.args
    wants = {name: getattr(trainer, name) for name in ("compute_metrics", "compute_loss_func")}
    found = [name for name, given in wants.items() if given is not None]
    if not isinstance(trainer.data_collator, PackCollator):
        found.append(f"data_collator ({type(trainer.data_collator).__name__})")
    if found:
        raise ConfigError(
            f"context_parallel = {args.context_parallel}: each process sees a part of a row, and {' and '.join(found)} would take "
            "it for a whole one. Leave out one of them"
        )
    return ContextGroup(args.context_parallel, float(args.ddp_timeout))


def shares_rows(base: nn.Module) -> bool:
    """Whether processes share the rows that this model is trained on."""
    return getattr(getattr(base, "model", None), "context", None) is not None
