"""Which tensors a checkpoint has to hold for a model, compared by names and shapes before any is read."""

import re

from torch import nn
from transformers import PretrainedConfig

from oribi.errors import ModelError
from oribi.models.expert_tensors import stored_shapes
from oribi.tensors import problems_in_words

NF4_KEY = "quant_state.bitsandbytes__nf4"
# beside a packed tensor's codes
STATE_KEYS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", NF4_KEY)
# within the names of gpt-oss' experts where each is a linear layer
_LINEAR_EXPERTS = ".mlp.experts.gate_up_projs."
# how names begin of layers that predict further tokens
DRAFTS = ("mtp.", "model.mtp")


def stored_buffers(module: nn.Module) -> list[str]:
    """Names of a module's own buffers that a checkpoint holds."""
    return [name for name in module._buffers if name not in module._non_persistent_buffers_set]


def is_draft(name: str, config: PretrainedConfig) -> bool:
    """Whether a tensor of a checkpoint is one of layers behind the model's own, which predict further tokens."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return name.startswith(DRAFTS) or (
        layer is not None
        and int(layer[1]) >= config.num_hidden_layers > 0
        and bool(getattr(config, "num_nextn_predict_layers", 0))
    )


def ties_head(model: nn.Module) -> bool:
    """Whether config.json ties the head to the embeddings."""
    return bool(getattr(model.config, "tie_word_embeddings", False))


def expected_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors that a model's checkpoint holds; a tied head is not among them."""
    expected = stored_shapes(model)
    for prefix, module in model.named_modules():
        expected |= {
            f"{prefix}.{name}": tuple(module._buffers[name].shape) for name in stored_buffers(module)
        }
    if ties_head(model):
        expected.pop("lm_head.weight", None)
    return expected


def check_tensors(model: nn.Module, stored: dict[str, tuple[int, ...]], packed: set[str]) -> list[str]:
    """Compares a checkpoint's names and shapes with those of a model.

    Args:
        model: on the meta device. stored: shapes by names; a head that is tied is taken out. packed: names of packed tensors.

    Returns:
        Notes for the user, one line each.

    Raises:
        ModelError: tensors are missing, unexpected or misshapen.
    """
    expected = expected_shapes(model)
    notes, unread = [], set()
    if each := next((name for name in stored if _LINEAR_EXPERTS in name), None):
        raise ModelError(
            f"the checkpoint holds each expert as a packed linear layer ({each}), as gpt-oss checkpoints in bnb-4bit do, whose blocks "
            "fit no stack of experts without rounding again. Load openai/gpt-oss-20b or openai/gpt-oss-120b, whose experts stay in "
            "MXFP4, or unsloth/gpt-oss-20b-BF16"
        )
    for prefix, module in model.named_modules():
        unread |= {f"{prefix}.{name}" for name in getattr(module, "leftovers", ())} & set(stored)
    drafts = {name for name in stored if name not in expected and is_draft(name, model.config)}
    if drafts:
        notes.append(
            f"{len(drafts)} tensors of layers that predict further tokens, {min(drafts)} the first, are not used"
        )
    if unread:
        notes.append(
            f"{len(unread)} tensors of the checkpoint, {min(unread)} the first, are not used: these layers read the keys and "
            "values of earlier ones"
        )
    if ties_head(model) and "lm_head.weight" in stored:
        notes.append("the checkpoint's lm_head.weight is not used: config.json ties it to the embeddings")
        stored.pop("lm_head.weight")
    known = set(expected) | unread | drafts | {f"{name}.{key}" for name in packed for key in STATE_KEYS}
    missing = [name for name in expected if name not in stored]
    unexpected = [name for name in stored if name not in known]
    wrong = [
        f"{name}: {list(stored[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in stored and name not in packed and stored[name] != shape
    ]
    problems = problems_in_words({"missing": missing, "unexpected": unexpected, "of another shape": wrong})
    if problems:
        raise ModelError(
            f"the checkpoint's tensors are not those of {type(model).__name__} with this config.json; {problems}"
        )
    return notes
