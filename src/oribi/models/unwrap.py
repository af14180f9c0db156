"""A model without what others put around it: PEFT's wrappers, torch.compile's, and those for several devices.

Every part that needs the bare model, a bare module or its bare name asks here.
"""

from typing import Any

from peft import PeftModel
from torch import nn

# PEFT's names of the module inside a wrapper
_INNER = ("token_adapter", "original_module", "base_layer")


def base_model(model: nn.Module) -> nn.Module:
    """The causal language model inside a wrapped one; a bare model is returned as it is."""
    while hasattr(model, "module") or hasattr(model, "_orig_mod"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model.get_base_model() if isinstance(model, PeftModel) else model


def source_of(model: nn.Module) -> Any:
    """What the loader left on a model (`models.load.ModelSource`); None where another program loaded it."""
    return getattr(base_model(model), "oribi", None)


def vocab_rows(model: nn.Module) -> int:
    """Tokens that a model has logits of; some classes have more embeddings, as Llama 3.2 Vision for its pictures."""
    head = model.get_output_embeddings()
    return len((model.get_input_embeddings() if head is None else head).weight)


def is_classifier(model: nn.Module) -> bool:
    """Whether a model scores labels, oribi's or transformers', and so continues no texts."""
    return type(base_model(model)).__name__.endswith("ForSequenceClassification")


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold only parts of the model's frozen weights."""
    return getattr(getattr(base_model(model), "model", None), "shards", None) is not None


def bare_module(module: nn.Module) -> nn.Module:
    """The module that PEFT put its wrappers around."""
    for name in _INNER:
        if isinstance(getattr(module, name, None), nn.Module):
            return bare_module(getattr(module, name))
    return module


def bare_name(name: str) -> str:
    """A module's or parameter's name without the parts that PEFT's wrappers add."""
    for inner in _INNER:
        name = name.replace(f".{inner}", "")
    return name


def read_by_kernels(model: nn.Module) -> list[str]:
    """Names of the linear layers whose weight a kernel takes as it lies, past NF4 and LoRA: the outputs of state-space mixers.

    transformers' classes give `mamba_ssm` the weight itself while they train; without the package they call the layer.
    """
    mixers = (
        (name, module)
        for name, module in model.named_modules()
        if all(hasattr(module, part) for part in ("A_log", "D", "out_proj"))
    )
    return [f"{name}.out_proj" for name, _ in mixers]
