"""What the decoder returns and which keywords it takes."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from oribi.errors import ModelError
from oribi.models.experts import ExpertsMLP
from oribi.text import nearest

# keywords that callers pass to any causal model, and that change nothing here: documents follow from the queries' bounds,
# positions from position_ids, no decoder of the table has token types, and generate passes the tokenizer of stop strings on
WITHOUT_EFFECT = {
    "cu_seq_lens_k", "max_length_k", "seq_idx", "cache_position", "token_type_ids", "mm_token_type_ids", "task_ids",
    "output_router_logits", "tokenizer", "assistant_tokenizer",
}  # fmt: skip


class LogitsWhenRead(CausalLMOutputWithPast):
    """An output whose logits [B, S, V] are computed when something reads them, as `.logits`, by key, index or iteration.

    While training, the loss comes from the hidden states, and logits would take gigabytes that most losses never read.
    """

    _compute: Callable[[], torch.Tensor] | None = None

    def wait_for(self, compute: Callable[[], torch.Tensor]) -> "LogitsWhenRead":
        """The output, with the function that computes its logits."""
        vars(self)["_compute"] = compute
        return self

    def _form(self) -> None:
        compute = vars(self).pop("_compute", None)
        if compute is not None:
            later = [name for name in OrderedDict.keys(self) if name != "loss"]
            self["logits"] = compute()
            for name in later:  # an output's values come in the order of its fields
                self.move_to_end(name)

    def __getattribute__(self, name: str) -> Any:
        if name == "logits":
            self._form()
        return super().__getattribute__(name)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            if key == "logits":
                self._form()
            return OrderedDict.__getitem__(self, key)
        return self.loss if key == 0 and self.loss is not None else super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        return key == "logits" or super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        if key == "logits":
            self._form()
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:
        self._form()
        return super().__iter__()

    def __len__(self) -> int:
        self._form()
        return super().__len__()

    def keys(self) -> Any:
        self._form()
        return super().keys()

    def values(self) -> Any:
        self._form()
        return super().values()

    def items(self) -> Any:
        self._form()
        return super().items()

    def to_tuple(self) -> tuple[Any, ...]:
        self._form()
        return super().to_tuple()


def require_known(keywords: Mapping[str, Any], known: set[str], model: PreTrainedModel) -> None:
    """Refuses a keyword that asks for something the decoder does not do.

    Args:
        keywords: what `forward` was given beside its own arguments; None and False ask for nothing.
        known: names of its arguments.
        model: the decoder.

    Raises:
        ModelError: it is unknown, or asks for attention's probabilities or routers' logits.
    """
    if keywords.get("output_attentions", model.config.output_attentions):
        raise ModelError(
            "output_attentions = True: oribi's attention never forms its probabilities. Leave it out, or load the model "
            "with transformers and attn_implementation='eager'"
        )
    if keywords.get("output_router_logits") and any(isinstance(one, ExpertsMLP) for one in model.modules()):
        raise ModelError(
            "output_router_logits = True: oribi trains no loss that evens out the experts' use, which they would be for. Train "
            "with oribi's SFTTrainer; TRL's own wants SFTConfig(router_aux_loss_coef=0.0)"
        )
    for name, value in keywords.items():
        if value is None or value is False or name in WITHOUT_EFFECT or name == "output_attentions":
            continue
        near = nearest(name, known)
        hint = f"did you mean {near}? " if near else ""
        raise ModelError(f"unknown argument {name!r}: {hint}The model takes {', '.join(sorted(known))}")


def require_growing(cache: Any) -> None:
    """Refuses a cache of fixed size.

    Raises:
        ModelError: the cache was made for a compiled model.
    """
    if cache is not None and getattr(cache, "is_compileable", False):
        raise ModelError(
            f"{type(cache).__name__} has a fixed size, for compiled models; oribi's decoder runs with a cache that grows. "
            "Leave out cache_implementation or past_key_values, or give a DynamicCache"
        )


def require_whole(cache: Any, windows: list[int | None]) -> None:
    """Refuses an empty cache that would drop tokens that a layer still attends to.

    Args:
        cache: of transformers; None and one that holds tokens already are not looked at.
        windows: of the decoder's layers in tokens; None where a layer sees everything.

    Raises:
        ModelError: the cache was made for layers with shorter windows.
    """
    if cache is None or cache.get_seq_length() > 0:
        return
    for index, (layer, window) in enumerate(zip(getattr(cache, "layers", []), windows)):
        if getattr(layer, "is_sliding", False) and (window is None or layer.sliding_window < window):
            raise ModelError(
                f"{type(cache).__name__}: layer {index} of the cache keeps {layer.sliding_window} tokens, and the model's layer "
                f"sees {'all' if window is None else window}. Leave it out, or make it with config=model.config"
            )
