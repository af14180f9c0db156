"""The account: against the storages that layers really hold between forward and backward, and products that really run."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

from oribi.families import FAMILIES
from oribi.memory.account import LayerAccount, generation_bytes
from oribi.memory.layer_shape import layer_shapes
from oribi.models.core import Keep
from oribi.models.decoder import build
from oribi.models.decoding.session import bucket_for
from oribi.models.decoding.state import DecodingState
from oribi.models.fused_layer import POLICIES
from oribi.models.unwrap import base_model
from tests.models.test_fused_layer import adapt
from tests.models.tiny import KINDS, tiny_config

ROWS, LENGTH = 3, 40
TOKENS = ROWS * LENGTH
# sizes that no constant of the account was fitted to, each different from all others
UNEVEN = {
    "hidden_size": 96,
    "intermediate_size": 224,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
}
KEEPS = {
    **POLICIES,
    "attention again": Keep(attention="recompute"),
    "q|k|v in the host": Keep(qkv="host", o="recompute"),
    "middle again": Keep(x_mid="recompute", o="recompute"),
    "gate|up again": Keep(gate_up="recompute", down="recompute"),
    "input in the host": Keep(x="host", gate_up="host"),
}


class Storages(TorchDispatchMode):
    """Every storage that operations make beside a model's own, and which of them are still held."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            reference = StorageWeakRef(tensor.untyped_storage())
            self.made[reference.cdata] = reference, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self.made.setdefault(reference.cdata, (reference, storage.nbytes()))
        return out

    def held(self) -> int:
        return sum(nbytes for reference, nbytes in self.made.values() if not reference.expired())


class Products(TorchDispatchMode):
    """FLOP of the matrix products that run. FlopCounterMode hooks every module, which would end the fused path."""

    flop = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            self.flop += 2 * left.numel() * right.shape[1]
        return out


def tiny(model_type: str, **changes) -> torch.nn.Module:
    """A random model with LoRA on every linear layer."""
    torch.manual_seed(0)
    return adapt(build(uneven(model_type, **changes), device="cpu").train())


def uneven(model_type: str, **changes) -> PretrainedConfig:
    """Its config; where layers differ, the first two are of both kinds."""
    if FAMILIES[model_type].kv_sharing:
        changes["layer_types"] = ["sliding_attention", "full_attention"] * 4
    return tiny_config(model_type, **{**UNEVEN, **changes})


def kept_by_a_layer(model: torch.nn.Module, rows: int = ROWS, length: int = LENGTH) -> float:
    """Bytes that each layer but the first two adds to what is held after its forward, on average."""
    base, held = base_model(model), []
    hooks = [
        layer.register_forward_hook(lambda *_: held.append(storages.held())) for layer in base.model.layers
    ]
    ids = torch.randint(3, 100, (rows, length))
    with Storages(model) as storages:
        model(input_ids=ids, labels=ids)
    for hook in hooks:
        hook.remove()
    # masks of both kinds of layers are made in the first two
    return (held[-1] - held[1]) / (len(held) - 2)


@pytest.mark.parametrize("model_type", KINDS)
def test_a_layer_keeps_what_the_account_says(model_type):
    model = tiny(model_type)
    base = model.get_base_model()
    layers = [LayerAccount(shape, TOKENS, LENGTH) for shape in layer_shapes(base)[2:]]
    for name, keep in KEEPS.items():
        base.set_recompute_policy([keep] * len(base.model.layers))
        # on a CPU, host memory is the device's; the reference of attention saves no log-sum-exp
        expected = sum(layer.kept(keep) + sum(layer.in_host(keep)) for layer in layers)
        if keep["attention"] != "recompute":
            expected -= sum(
                layer.results["attention"].beside for layer in layers if "attention" in layer.results
            )
        assert kept_by_a_layer(model) == expected / len(layers), name


@pytest.mark.parametrize("model_type", KINDS)
@pytest.mark.parametrize("how", ["dropout", "dora", "whole"])
def test_a_layer_that_autograd_differentiates_keeps_about_as_much(model_type, how):
    # every head has keys of its own and rows are short: on a CPU, attention repeats keys and saves its scores
    base = model = build(uneven(model_type, num_key_value_heads=6), device="cpu").train()
    if how != "whole":
        changes = {"lora_dropout": 0.1} if how == "dropout" else {"use_dora": True}
        if FAMILIES[model_type].experts is not None:  # PEFT has neither for parameters
            changes["target_parameters"] = None
        model = adapt(base, **changes)

    def ranks(layer: torch.nn.Module) -> dict[str, list[int]]:
        groups = {name: group for core, _, _ in layer.parts() for name, group in core.groups().items()}
        # PEFT may take the names of an MLP beside experts for theirs
        rules = FAMILIES[model_type].experts
        named = rules is not None and rules.shared_by_name
        adapted = {name: how != "whole" and (named or not name.startswith("shared_")) for name in groups}
        return {name: [4] * len(modules) if adapted[name] else [] for name, modules in groups.items()}

    layers = [LayerAccount(shape, TOKENS, LENGTH) for shape in layer_shapes(base, ranks)[2:]]
    base.gradient_checkpointing_disable()
    expected = sum(layer.by_autograd(how == "dropout", how == "dora", mask_bytes=4) for layer in layers)
    expected /= len(layers)
    assert kept_by_a_layer(model, rows=TOKENS // 8, length=8) == pytest.approx(expected, rel=0.1)
    base.set_recompute_policy("balanced")
    # beside its input what later layers read, and a delta rule's table of documents: a number per token and per row
    tables = 8 * (TOKENS + ROWS) * sum(layer.shape.mixer.needs_bounds for layer in layers)
    expected = sum(layer.results["x"].bytes + layer.lent for layer in layers) + tables
    assert kept_by_a_layer(model) == expected / len(layers)


@pytest.mark.parametrize("model_type", KINDS)
def test_computing_again_takes_the_products_that_the_account_says(model_type):
    model = tiny(model_type)
    base = model.get_base_model()
    ids = torch.randint(3, 100, (ROWS, LENGTH))

    def counted(keep: Keep) -> int:
        base.set_recompute_policy([keep] * len(base.model.layers))
        with Products() as products:
            model(input_ids=ids, labels=ids).loss.backward()
        return products.flop

    layers = [LayerAccount(shape, TOKENS, LENGTH).results for shape in layer_shapes(base)]
    everything = counted(Keep())
    # a mixer's own arithmetic is counted by tests/memory/test_speed.py
    for name in {name for results in layers for name in results} - {"x", "attention", "delta"}:
        expected = sum(results[name].flop for results in layers if name in results)
        assert counted(Keep({name: "recompute"})) - everything == expected, name


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
@pytest.mark.parametrize(("rows", "length"), [(1, 100), (5, 300)])
def test_what_a_generation_holds_is_what_the_account_says(model_type, rows, length):
    model = build(tiny_config(model_type, **UNEVEN, sliding_window=70), device="cpu")
    places, slots = bucket_for(rows), -(-length // 256) * 256
    state = DecodingState(model.model.layers, places, slots, 8, 0, torch.float32, torch.device("cpu"))
    held = sum(tensor.nbytes for of_layer in state.held for tensor in of_layer.values())
    logits = places * model.config.vocab_size * (4 + 4 * 4)
    assert generation_bytes(model, rows, length) == held + logits
