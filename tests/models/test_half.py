"""Another mixer is one file: a toy one takes attention's place, and every result is as large as its entry says."""

import pytest
import torch
from torch import nn

from oribi.families import FAMILIES
from oribi.kernels.lora import group_shape, lora_layout
from oribi.memory.experts_shape import experts_shape
from oribi.models import half, layers
from oribi.models.core import Keep, Result
from oribi.models.decoder import build
from oribi.models.experts import ExpertsMLP
from oribi.models.fused_layer import POLICY_NAMES
from oribi.models.half import Kept
from oribi.models.layers import Batch
from oribi.models.linear_layers import project, read
from tests.models.test_fused_layer import adapt, batch_of, gradients
from tests.models.test_parity import packed, relative
from tests.models.tiny import KINDS, tiny_config


class Shift(nn.Module):
    """A token takes up the one before it in its document: h[t] = a[t] tanh(b[t - 1])."""

    input, output, output_result, row_wise = "ab", "out", "x_mid", False
    masks_padding = False
    results = (
        Result("ab", ("ab.out", "ab.lora"), made_by="ab"),
        Result("ab_xa", ("ab.lora",), follows="ab"),
        Result("shifted", ("out.in",), balanced="keep"),
        Result("x_mid", ("out.out",), made_by="out"),
        Result("out_xa", ("out.lora",), follows="x_mid"),
        Result("out", ("out.out",), made_by="out", before_norm=True),
    )
    window = None

    def __init__(self, size: int) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(size, 2 * size, bias=True), nn.Linear(size, size, bias=False)

    def groups(self) -> dict[str, list[nn.Module]]:
        return {"ab": [self.in_proj], "out": [self.out_proj]}

    def forward(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        a, b = project([self.in_proj], x)[0].flatten(0, 1).chunk(2, dim=1)
        h = a * self.shift(b, batch).tanh()
        return project([self.out_proj], h.view_as(x))[0]

    @staticmethod
    def starts(batch: Batch) -> torch.Tensor:
        return batch.visibility.documents(torch.device("cpu"))[0][:-1].long()

    def shift(self, b: torch.Tensor, batch: Batch) -> torch.Tensor:
        return b.roll(1, 0).index_fill(0, self.starts(batch), 0.0)

    def prepare(self, p: torch.Tensor, batch: Batch, fresh: bool) -> tuple:
        a, b = p.chunk(2, dim=1)
        return a, b, self.shift(b, batch).tanh(), self.starts(batch)

    def run(self, prepared: tuple, kept: Kept) -> torch.Tensor:
        a, _, before, _ = prepared
        h = kept.take("shifted")
        if h is None:
            h = a * before
            kept.put("shifted", h)
        return h

    def backward(self, prepared: tuple, dh: torch.Tensor) -> None:
        a, b, before, starts = prepared
        db = (dh * a * (1 - before.square())).index_fill(0, starts, 0.0).roll(-1, 0)
        a.copy_(dh * before)
        b.copy_(db)


@pytest.fixture(params=["llama", "gemma2", "olmo2", "granite"])
def model(request):
    decoder = build(tiny_config(request.param), dtype=torch.float64, device="cpu")
    torch.manual_seed(3)
    for layer in decoder.model.layers:
        layer.self_attn = Shift(decoder.config.hidden_size).double()
    return adapt(decoder)


@pytest.mark.parametrize("batch", [batch_of(), packed([5, 9, 2, 8])], ids=["rows", "pack"])
def test_a_toy_mixer_trains_by_hand_with_autograds_gradients(model, batch, monkeypatch):
    decoder = model.get_base_model()
    batch = {"labels": batch["input_ids"], **batch}
    calls = []
    real = layers.fused_layer
    monkeypatch.setattr(layers, "fused_layer", lambda *a: calls.append(1) or real(*a))
    by_hand = gradients(model, **batch)
    assert len(calls) == 4
    own = [Keep({result.name: "recompute"}) for result in Shift.results if result.follows is None]
    for keep in (*POLICY_NAMES, *([one] * 4 for one in own), [Keep(weights="keep")] * 4):
        decoder.set_recompute_policy(keep)
        for name, grad in gradients(model, **batch).items():
            assert torch.equal(grad, by_hand[name]), (keep, name)
    monkeypatch.setattr(layers, "fusible_halves", lambda layer: None)
    by_autograd = gradients(model, **batch)
    assert max(relative(by_hand[name], by_autograd[name]) for name in by_hand) < 1e-12


@pytest.mark.parametrize("model_type", KINDS)
def test_what_a_layer_keeps_has_the_size_that_its_entry_says(model_type, monkeypatch):
    model = adapt(build(tiny_config(model_type), device="cpu"))
    # first layers may have no experts
    place = -1 if FAMILIES[model_type].experts is not None else 0
    layer, batch = model.get_base_model().model.layers[place], batch_of()
    tokens = batch["input_ids"].numel()
    columns = {"hidden": layer.input_layernorm.weight.numel() if hasattr(layer, "input_layernorm") else 64}
    for module, _, _ in layer.parts():
        if (experts := experts_shape(module, {"gate_up_proj": [4], "down_proj": [4]}, 4)) is not None:
            columns |= experts.columns()
        for name, members in module.groups().items():
            group = [read(member) for member in members]
            n, k = group_shape(group)
            if isinstance(module, ExpertsMLP) and module.shared is not None:
                n += module.shared.rows_beside(torch.device("cpu")) * (name == module.shared.input)
            lora, _ = lora_layout(group, torch.device("cpu"))
            columns |= {f"{name}.out": n, f"{name}.in": k, f"{name}.lora": lora}
    found, entries = {}, {result.name: result for result in layer.results()}
    real = half.Kept.put

    def put(kept: Kept, name: str, result: object, *follows: str) -> None:
        if kept._layer_pass.layer is layer:
            found.setdefault(name, result)
        real(kept, name, result, *follows)

    monkeypatch.setattr(half.Kept, "put", put)
    model(**batch)
    assert found.keys() - {"x"} <= entries.keys()
    made = {name: x for name, x in found.items() if isinstance(x, torch.Tensor)}
    has_post = any(post is not None for _, _, post in layer.parts())
    expected = {name for name, one in entries.items() if has_post or not one.before_norm}
    expected -= {
        name
        for name, one in entries.items()
        if one.follows and not any(map(columns.get, one.columns)) and name not in made
    }  # x A^T of what is not adapted
    assert made.keys() == (expected - {"attention_saved"}) | {"x"}, "the reference of attention saves nothing"
    for name, x in made.items():
        wanted = ("hidden",) if name == "x" else entries[name].columns
        assert x.numel() == tokens * sum(columns[column] for column in wanted), name
