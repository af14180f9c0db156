"""The last layer runs behind its mixer on the trained rows alone: the same loss and gradients, and only where nobody looks on."""

import pytest
import torch

from oribi.families import FAMILIES
from oribi.models.decoder import DecoderForCausalLM
from tests.models.test_fused_layer import adapt, batch_of, gradients
from tests.models.test_parity import packed, relative
from tests.models.tiny import tiny_config, tiny_pair

SAME = 1e-6
# last layers with inputs of their own, and with experts; those of all other families in `make test-all`
FEW = ("llama", "gemma4_text", "qwen3_moe")
FAMILIES_BY_COST = [name if name in FEW else pytest.param(name, marks=pytest.mark.long) for name in FAMILIES]


@pytest.fixture
def computed(monkeypatch):
    """Rows of the hidden states that each loss was made of."""
    rows = []
    real = DecoderForCausalLM._loss
    monkeypatch.setattr(
        DecoderForCausalLM,
        "_loss",
        lambda self, hidden, *a: rows.append(hidden.shape[:2].numel()) or real(self, hidden, *a),
    )
    return rows


def masked(rows: int = 2, length: int = 24, trained: int = 10) -> dict[str, torch.Tensor]:
    batch = batch_of(rows, length)
    batch["labels"][:, :-trained] = -100
    return batch


def both(model: torch.nn.Module, **batch: object) -> tuple[dict, dict]:
    """Loss and gradients where the last layer computes all rows, and where it computes the trained ones."""
    return gradients(model, **batch), gradients(model, output_logits=False, **batch)


def assert_same(model: torch.nn.Module, batch: dict, rows: list[int], computed: list[int]) -> None:
    whole, alone = both(model, **batch)
    assert computed == rows
    computed.clear()
    errors = {name: relative(alone[name], whole[name]) for name in whole}
    assert max(errors.values()) < SAME, {name: error for name, error in errors.items() if error >= SAME}


@pytest.mark.parametrize("model_type", FAMILIES_BY_COST)
def test_loss_and_gradients_are_those_of_all_rows_whatever_is_kept(model_type, computed):
    model = adapt(tiny_pair(tiny_config(model_type))[0])
    for policy in ("speed", "memory"):
        model.get_base_model().set_recompute_policy(policy)
        assert_same(model, masked(), [48, 20], computed)


@pytest.mark.parametrize(
    "model_type",
    FAMILIES_BY_COST[:1]
    + [
        pytest.param(t, marks=pytest.mark.long)
        for t in ("gemma2", "gemma4_text", "lfm2", "qwen3_5_text", "qwen3_moe")
    ],
)
def test_packs_and_padded_rows_too(model_type, computed):
    model = adapt(tiny_pair(tiny_config(model_type))[0])
    pack = packed([5, 9, 2, 8])
    labels = pack["input_ids"].clone()
    labels[:, [0, 1, 2, 5, 6, 7, 8, 9, 14, 16, 17, 18]] = -100
    assert_same(model, {**pack, "labels": labels}, [24, 12], computed)
    batch = masked()
    batch["attention_mask"] = torch.ones_like(batch["labels"])
    batch["attention_mask"][0, :7] = 0
    assert_same(model, batch, [48, 20], computed)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        pytest.param({"target_modules": ["q_proj", "lm_head"]}, marks=pytest.mark.long),
        pytest.param(
            {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 1]}, marks=pytest.mark.long
        ),
    ],
    ids=["dora", "whole head", "head", "some layers"],
)
def test_layers_and_heads_that_are_trained_otherwise_too(changes, computed):
    model = adapt(tiny_pair(tiny_config("llama"))[0], **changes)
    model.get_base_model().set_recompute_policy("balanced")
    assert_same(model, masked(), [48, 20], computed)


def test_layers_that_autograd_differentiates_compute_the_same_and_draw_again_what_they_drew(computed):
    model = adapt(tiny_pair(tiny_config("gemma4_text"))[0])
    for parameter in model.get_base_model().model.layers.parameters():
        parameter.requires_grad_(True)
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        assert_same(model, masked(), [48, 20], computed)
    model = adapt(tiny_pair(tiny_config("llama"))[0], lora_dropout=0.3)
    batch = masked()
    torch.manual_seed(5)
    first = gradients(model, output_logits=False, **batch)
    torch.manual_seed(5)
    again = gradients(model, output_logits=False, **batch)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert computed == [20, 20]


def test_positions_that_fill_a_recorded_step_change_nothing(computed):
    model, batch = adapt(tiny_pair(tiny_config("llama"))[0]), masked()
    filled = torch.cat([torch.arange(13, 23), torch.arange(37, 47), torch.full((4,), 47)])
    counted = {"num_items_in_batch": torch.tensor(20.0)}
    whole = gradients(model, **batch, **counted)
    alone = gradients(model, output_logits=False, trained_rows=filled, **batch, **counted)
    assert computed == [48, 24]
    assert max(relative(alone[name], whole[name]) for name in whole) < SAME


def test_all_rows_are_computed_where_that_saves_nothing_or_somebody_looks_on(computed):
    model, batch = adapt(tiny_pair(tiny_config("llama"))[0]), masked()
    base = model.get_base_model()

    def rows(**changes: object) -> int:
        model(**{"output_logits": False, **batch, **changes})
        return computed.pop()

    assert rows() == 20
    assert rows(labels=batch["input_ids"]) == 48
    assert rows(labels=torch.full_like(batch["labels"], -100)) == 48
    assert rows(output_logits=None) == rows(output_logits=True) == rows(output_hidden_states=True) == 48
    for module in (base.model, base.model.norm, base.model.layers[-1], base.model.layers[-1].mlp.down_proj):
        hook = module.register_forward_hook(lambda *a: None)
        assert rows() == 48
        hook.remove()
    base.model.layers[0].register_forward_hook(lambda *a: None)
    assert rows() == 20
    model.eval()
    assert rows() == 48
