"""Running a model whose layers stay on the disk: embeddings, head and one layer at a time are in memory.

So an exported file of any size is checked on the machine that wrote it. S tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from transformers import PretrainedConfig

from oribi.models.checkpoint_tensors import stored_buffers
from oribi.models.decoder import DecoderForCausalLM, build
from oribi.models.expert_tensors import read_stack
from oribi.models.experts import Experts
from oribi.tensors import TensorSource

# other tensors than the model's, and what is told of each layer: index, output with the others on the same input, output
Beside = tuple[TensorSource, Callable[[int, torch.Tensor, torch.Tensor], None]]


def streamed_logits(
    config: PretrainedConfig,
    source: TensorSource,
    ids: torch.Tensor,
    positions: torch.Tensor,
    dtype: torch.dtype,
    keep: torch.Tensor | None = None,
    beside: Beside | None = None,
) -> torch.Tensor:
    """Logits [S, V] float32 of a pack of documents, on the device of `ids`.

    Args:
        config: the model's config, of a family of the table.
        source: its tensors under checkpoint names; a head that is missing is tied to the embeddings.
        ids, positions: [1, S] int64; positions restart at 0 at each document.
        dtype: dtype of the computation.
        keep: indices [K] of the places whose logits [K, V] are wanted; None takes all.
        beside: other tensors, with which each layer runs too.
    """
    with torch.no_grad():
        model = build(config, dtype=dtype).eval()
        with _loaded_by_need(model, source, ids.device, dtype, beside):
            places = 0 if keep is None else keep
            found = model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=places)
            return found.logits[0].float()


@contextmanager
def _loaded_by_need(
    model: DecoderForCausalLM,
    source: TensorSource,
    device: torch.device,
    dtype: torch.dtype,
    beside: Beside | None = None,
) -> Iterator[None]:
    """Gives each layer of a model on the meta device its weights just before it runs and takes them back after."""
    stored = source.shapes()

    def load(prefix: str, part: nn.Module, source: TensorSource = source) -> None:
        for owner, module in part.named_modules(prefix=prefix):
            for leaf in list(module._parameters):
                if isinstance(module, Experts):
                    read = partial(_read_matrix, source, owner, device, dtype)
                    value = read_stack(module, leaf, read, device, dtype)
                elif module._parameters[leaf] is not None:
                    value = source.read(f"{owner}.{leaf}", device, dtype)
                else:
                    continue
                setattr(module, leaf, nn.Parameter(value, requires_grad=False))
            for leaf in stored_buffers(module):
                setattr(module, leaf, source.read(f"{owner}.{leaf}", device, dtype))

    for name, part in model.model.named_children():
        if part is not model.model.layers:
            load(f"model.{name}", part)
    if "lm_head.weight" in stored:
        load("lm_head", model.lm_head)
    else:
        model.lm_head.weight = model.model.embed_tokens.weight
    others: dict[int, torch.Tensor] = {}

    def before(layer: nn.Module, arguments: tuple, named: dict, index: int) -> None:
        prefix = f"model.layers.{index}"
        if beside is not None:  # first, so that whatever a layer leaves for later ones is of the model itself
            load(prefix, layer, beside[0])
            others[index] = _hidden(layer.forward(*arguments, **named))
        load(prefix, layer)

    def after(layer: nn.Module, _: tuple, found: object, index: int) -> None:
        layer.to("meta")
        if beside is not None:
            beside[1](index, others.pop(index), _hidden(found))

    hooks = []
    for i, layer in enumerate(model.model.layers):
        hooks.append(layer.register_forward_pre_hook(partial(before, index=i), with_kwargs=True))
        hooks.append(layer.register_forward_hook(partial(after, index=i)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _read_matrix(
    source: TensorSource, prefix: str, device: torch.device, dtype: torch.dtype, name: str
) -> torch.Tensor:
    """A matrix of experts, by the name of their module and its own from there on."""
    return source.read(f"{prefix}.{name}", device, dtype)


def _hidden(found: object) -> torch.Tensor:
    """The hidden states among what a layer returns."""
    return found[0] if isinstance(found, tuple) else found
