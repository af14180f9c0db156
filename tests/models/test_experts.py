"""Experts: what transformers computes at the edges of routing, and checkpoints that stack them or hold each by itself."""

from dataclasses import fields, replace

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from transformers import AutoModelForCausalLM

from oribi.errors import ConfigError, ModelError
from oribi.families import FAMILIES
from oribi.families.expert_rules import ExpertRules
from oribi.kernels.expert_stack import PackedStack, dequantize_stack
from oribi.kernels.mxfp4 import MXFP4Stack
from oribi.kernels.packed_weight import PackedWeight
from oribi.memory.architecture import architecture_of
from oribi.models import experts_half, half
from oribi.models.expert_tensors import loaded_stack
from oribi.models.load import load_model
from tests.models.test_fused_layer import adapt, batch_of, gradients
from tests.models.test_parity import TOLERANCE, errors_against_transformers, relative
from tests.models.tiny import MIXED, in_float64, tiny_config, tiny_pair
from tests.models.tiny_checkpoint import checkpoint, edit_config, edit_tensors, mxfp4_checkpoint

WITH_EXPERTS = [name for name, row in FAMILIES.items() if row.experts is not None]
MATRIX = "model.layers.{}.mlp.experts.{}.{}_proj.weight"


def routers(*models: torch.nn.Module) -> list[torch.Tensor]:
    """The routers' matrices of models of the same weights."""
    ends = (".gate.weight", ".router.weight", ".router.proj.weight")
    return [p for model in models for name, p in model.named_parameters() if name.endswith(ends)]


@pytest.mark.parametrize("model_type", WITH_EXPERTS)
@pytest.mark.long
@pytest.mark.parametrize("rows", ["equal", "none for one", "all for three"])
def test_ties_and_experts_without_tokens_equal_transformers(model_type, rows, monkeypatch):
    pair = tiny_pair(tiny_config(model_type))
    with torch.no_grad():
        for weight in routers(*pair):
            if rows == "equal":  # which of two is chosen must not differ
                weight[1::2] = weight[::2]
            elif rows == "none for one":
                weight[3] = -100 * weight[0].sign()
                weight[0] = 100 * weight[0].sign()
            else:
                weight[:3] *= 50
                weight[3:] *= 0.01
    ours, theirs = (adapt(model) for model in pair)
    in_float64(monkeypatch, *pair)  # sharp probabilities make much of rounding
    batch = batch_of()
    if rows == "equal":  # an expert's twin may be without a token
        with torch.no_grad():
            assert relative(ours(**batch).loss, theirs(**batch).loss) < TOLERANCE
        return
    for model in (ours, theirs):
        model.zero_grad()
        model(**batch).loss.backward()
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    for name, p in ours.named_parameters():
        if p.requires_grad:
            assert relative(p.grad, expected[name]) < TOLERANCE, name


@pytest.mark.long
@pytest.mark.parametrize("normalised", [True, False])
def test_one_token_and_weights_that_sum_to_one_or_not_equal_transformers(normalised):
    pair = tiny_pair(tiny_config("qwen3_moe", norm_topk_prob=normalised))
    assert max(errors_against_transformers(*pair).values()) < TOLERANCE
    ids = torch.tensor([[7]])
    with torch.no_grad():
        assert relative(*(model.eval()(input_ids=ids).logits for model in pair)) < TOLERANCE


# of every family the rules that are no default
RULES = [
    (name, rule.name)
    for name in WITH_EXPERTS
    for rule in fields(ExpertRules)
    if getattr(FAMILIES[name].experts, rule.name) != rule.default
    # which float32 does not show, and what only files have
    and rule.name not in ("in_float32", "added", "renamed")
    and getattr(FAMILIES[name].experts, rule.name) not in ("stacked", "either")
]
OTHER_SIZES = (
    "count", "size", "used", "layers", "shared", "shared_columns", "shared_gate", "correction", "biases", "stored",
    "in_layer_itself", "own_norms", "router_part", "router_norm", "expert_scale",
)  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "rule"),
    [one if "qwen3_moe" in one else pytest.param(*one, marks=pytest.mark.long) for one in RULES],
)
def test_each_rule_switched_off_breaks_parity(model_type, rule, monkeypatch):
    row = FAMILIES[model_type]
    changed = replace(row.experts, **{rule: getattr(ExpertRules(), rule)})
    monkeypatch.setitem(FAMILIES, model_type, replace(row, experts=changed))
    config = tiny_config(model_type)
    # transformers knows one by both names, and the norm after the experts undoes the other
    if (model_type, rule) in (("gpt_oss", "count"), ("gemma4_text+experts", "normalise")):
        assert max(errors_against_transformers(*tiny_pair(config)).values()) < TOLERANCE
    elif rule in OTHER_SIZES:
        with pytest.raises(
            (RuntimeError, AttributeError),
            match="(Unexpected|Missing) key|num_experts|size mismatch|moe_intermediate_size",
        ):
            tiny_pair(config)
    else:
        assert max(errors_against_transformers(*tiny_pair(config)).values()) > 1e-3


@pytest.mark.long
def test_another_routers_rule_gives_other_numbers(monkeypatch):
    row = FAMILIES["qwen3_moe"]
    monkeypatch.setitem(
        FAMILIES,
        "qwen3_moe",
        replace(row, experts=replace(row.experts, router="topk_softmax", normalise=None)),
    )
    pair = tiny_pair(tiny_config("qwen3_moe", norm_topk_prob=False))
    assert max(errors_against_transformers(*pair).values()) > 1e-3


@pytest.mark.long
@pytest.mark.parametrize("stacks", [["gate_up_proj"], ["down_proj"], []])
def test_pairs_on_one_stack_or_on_none_have_transformers_gradients(stacks):
    targets = [f"mlp.experts.{stack}" for stack in stacks] or None
    ours, theirs = (adapt(model, target_parameters=targets) for model in tiny_pair(tiny_config("qwen3_moe")))
    batch = batch_of()
    mine, expected = gradients(ours, **batch), gradients(theirs, **batch)
    assert mine.keys() == expected.keys()
    assert all(relative(mine[name], expected[name]) < TOLERANCE for name in mine)


@pytest.mark.long
def test_a_pair_on_the_router_takes_autograd_and_equals_transformers():
    # what plain PEFT makes of "all-linear" in this family: older transformers classes had layers of these names
    changes = {"target_modules": "all-linear", "target_parameters": None}
    ours, theirs = (adapt(model, **changes) for model in tiny_pair(tiny_config("qwen3_moe")))
    batch = batch_of()
    mine, expected = gradients(ours, **batch), gradients(theirs, **batch)
    assert any(".gate.lora_A" in name for name in mine)
    assert all(relative(mine[name], expected[name]) < TOLERANCE for name in mine)


@pytest.mark.long
def test_gradients_in_portions_of_the_rows_are_those_of_all_at_once(monkeypatch):
    ours = adapt(tiny_pair(tiny_config("qwen3_moe"))[0])
    batch = batch_of()
    whole = gradients(ours, **batch)
    monkeypatch.setattr(experts_half, "MOST_ROWS", 40)
    parts = gradients(ours, **batch)
    assert all(relative(parts[name], whole[name]) < TOLERANCE for name in whole)


@pytest.mark.parametrize(
    "model_type", ["qwen2_moe", pytest.param("gemma4_text+experts", marks=pytest.mark.long)]
)
def test_an_mlp_beside_experts_in_portions_of_the_tokens_has_the_gradients_of_all_at_once(
    model_type, monkeypatch
):
    ours = adapt(tiny_pair(tiny_config(model_type))[0])
    batch = batch_of(3, 60)
    whole = gradients(ours, **batch)
    monkeypatch.setattr(half, "MLP_TOKENS", 128)  # 128 and 52 tokens
    parts = gradients(ours, **batch)
    assert all(relative(parts[name], whole[name]) < TOLERANCE for name in whole)


def stack_each(tensors: dict[str, torch.Tensor]) -> None:
    """Replaces the experts' matrices by stacks as transformers has them in memory."""
    for layer in sorted({name.split(".")[2] for name in tensors if ".experts." in name}):
        each = {
            part: [tensors.pop(MATRIX.format(layer, expert, part)) for expert in range(8)]
            for part in ("gate", "up", "down")
        }
        prefix = f"model.layers.{layer}.mlp.experts"
        gate_up = [torch.cat(pair) for pair in zip(each["gate"], each["up"])]
        tensors |= {
            f"{prefix}.gate_up_proj": torch.stack(gate_up),
            f"{prefix}.down_proj": torch.stack(each["down"]),
        }


@pytest.mark.parametrize("double", [True, pytest.param(False, marks=pytest.mark.long)])
def test_every_matrix_is_packed_as_bitsandbytes_packs_it_alone(double, tmp_path):
    theirs = checkpoint(tmp_path / "each", "qwen3_moe")
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double}
    model, _ = load_model(str(tmp_path / "each"), dtype=torch.float32, quantization_config=settings)
    for index in (0, 2):
        found, stored = model.model.layers[index].mlp.experts, theirs.model.layers[index].mlp.experts
        for name in ("gate_up_proj", "down_proj"):
            packed = getattr(found, name)
            assert isinstance(packed, PackedWeight)
            values = dequantize_stack(packed.packed, torch.float32)
            for expert, weight in enumerate(getattr(stored, name).detach()):
                parts = weight.chunk(2) if name == "gate_up_proj" else [weight]
                for part, value in zip(parts, values[expert].chunk(len(parts))):
                    alone = quantize_4bit(
                        part.contiguous(), blocksize=64, compress_statistics=double, quant_type="nf4"
                    )
                    assert torch.equal(value, dequantize_4bit(*alone))
    # the same from stacks
    theirs = checkpoint(tmp_path / "stacked", "qwen3_moe")
    edit_tensors(tmp_path / "stacked", stack_each)
    again, _ = load_model(str(tmp_path / "stacked"), dtype=torch.float32, quantization_config=settings)
    ids = torch.randint(3, 380, (2, 12))
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, again.eval()(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(MATRIX.format(0, 3, "up")), "1 missing: model.layers.0.mlp.experts.3.up_proj.weight"),
        (lambda t: t.update({MATRIX.format(0, 9, "up"): torch.ones(64, 64)}), "1 unexpected: .*experts.9.up_proj"),
        (lambda t: t.update({MATRIX.format(0, 3, "down"): torch.ones(64, 32)}), r"of another shape: .*\[64, 32\]"),
        (lambda t: (stack_each(t), t.pop("model.layers.0.mlp.experts.down_proj")), "8 missing: .*experts.0.down_proj"),
        (
            lambda t: (stack_each(t), t.update({"model.layers.0.mlp.experts.gate_up_proj": torch.ones(8, 64, 128)})),
            r"1 stacks have another shape: .*\[8, 64, 128\], expected \[8, 128, 64\]",
        ),
    ],
)  # fmt: skip
def test_experts_that_are_missing_or_misshapen_are_refused_in_one_message(change, message, tmp_path):
    checkpoint(tmp_path, "qwen3_moe")
    edit_tensors(tmp_path, change)
    with pytest.raises(ModelError, match=message):
        load_model(str(tmp_path), dtype=torch.float32)


@pytest.mark.parametrize("in_4_bits", [True, pytest.param(False, marks=pytest.mark.long)])
def test_mxfp4_experts_are_kept_as_they_are_and_have_transformers_values(in_4_bits, tmp_path):
    mxfp4_checkpoint(tmp_path, num_hidden_layers=2, layer_types=MIXED[:2])
    model, _ = load_model(str(tmp_path), dtype=torch.float32, load_in_4bit=in_4_bits, max_seq_length=None)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert any("stay in MXFP4" in note for note in model.oribi.notes) == in_4_bits
    held = sum(
        one.nbytes + getattr(getattr(one, "quant_state", None), "absmax", one[:0]).nbytes
        for one in model.parameters()
    )
    estimated = architecture_of(str(tmp_path), dtype=torch.float32).weight_bytes(load_in_4bit=in_4_bits)
    assert abs(estimated - held) < 0.01 * held
    for ours, layer in zip(model.model.layers, theirs.model.layers):
        experts = ours.mlp.experts
        assert (ours.self_attn.q_proj.weight.dtype == torch.uint8) == in_4_bits
        for stack in ("gate_up_proj", "down_proj"):
            weight = getattr(experts, stack)
            assert isinstance(weight, PackedWeight) == in_4_bits
            if in_4_bits:
                assert isinstance(weight.packed, MXFP4Stack)
                weight = dequantize_stack(weight.packed, torch.float32)
            assert torch.equal(weight, loaded_stack(experts, stack, getattr(layer.mlp.experts, stack)))
    if not in_4_bits:
        ids = torch.randint(3, 380, (2, 12))
        with torch.no_grad():
            assert relative(*(one.eval()(input_ids=ids).logits for one in (model, theirs))) < TOLERANCE


@pytest.mark.long
@pytest.mark.parametrize("stored", ["float", "mxfp4"])
def test_gpt_oss_experts_in_float_are_packed_as_nf4_and_mxfp4_in_full_are_trained(stored, tmp_path):
    if stored == "float":
        checkpoint(tmp_path, "gpt_oss", num_hidden_layers=2, layer_types=MIXED[:2])
        model, _ = load_model(str(tmp_path), dtype=torch.float32, max_seq_length=None)
        packed = model.model.layers[0].mlp.experts.gate_up_proj.packed
        assert isinstance(packed, PackedStack)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        up = theirs.model.layers[0].mlp.experts.gate_up_proj[3, :, 1::2].T.contiguous()
        alone = quantize_4bit(up.detach(), blocksize=64, compress_statistics=True, quant_type="nf4")
        assert torch.equal(packed.matrix(7, torch.float32), dequantize_4bit(*alone))
        return
    mxfp4_checkpoint(tmp_path, num_hidden_layers=2, layer_types=MIXED[:2])
    model, _ = load_model(str(tmp_path), dtype=torch.float32, full_finetuning=True, max_seq_length=None)
    ids = torch.randint(3, 380, (2, 12))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.0.mlp.experts.down_proj_scales"), "1 stacks .*down_proj_scales: missing"),
        (
            lambda t: t.update({"model.layers.1.mlp.experts.down_proj_blocks": torch.zeros(8, 64, 4, 8, dtype=torch.uint8)}),
            r"down_proj_blocks: \[8, 64, 4, 8\], expected \[8, 64, 4, 16\]",
        ),
        (lambda t: t.pop("model.layers.1.mlp.experts.down_proj_bias"), "8 missing: .*experts.0.down_proj.bias"),
        (lambda t: t.pop("model.layers.1.self_attn.sinks"), "1 missing: model.layers.1.self_attn.sinks"),
    ],
)  # fmt: skip
def test_parts_of_mxfp4_experts_that_are_missing_or_misshapen_are_refused(change, message, tmp_path):
    mxfp4_checkpoint(tmp_path, num_hidden_layers=2, layer_types=MIXED[:2])
    edit_tensors(tmp_path, change)
    with pytest.raises(ModelError, match=message):
        load_model(str(tmp_path), dtype=torch.float32, max_seq_length=None)


@pytest.mark.long
def test_a_loss_that_evens_out_the_experts_use_is_left_to_transformers(tmp_path):
    checkpoint(tmp_path, "qwen3_moe")
    edit_config(tmp_path, output_router_logits=True)
    model, _ = load_model(str(tmp_path), dtype=torch.float32, load_in_4bit=False)
    assert not model.oribi.fused


@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3_moe"])
def test_a_decoder_saved_as_it_is_has_stacks_as_transformers_has_them(kind, tmp_path):
    checkpoint(tmp_path / "base", kind)
    settings = {"dtype": torch.float32, "load_in_4bit": False, "max_seq_length": None}
    model, _ = load_model(str(tmp_path / "base"), **settings)
    model.save_pretrained(str(tmp_path / "saved"))
    plain = AutoModelForCausalLM.from_pretrained(str(tmp_path / "saved"), dtype=torch.float32)
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, model(ids).logits, atol=1e-5)


def test_packed_experts_are_not_saved_as_a_checkpoint(tmp_path):
    checkpoint(tmp_path / "base", "qwen3_moe")
    model, _ = load_model(str(tmp_path / "base"), dtype=torch.float32, max_seq_length=None)
    with pytest.raises(ModelError, match="experts is packed.*save_pretrained_merged"):
        model.save_pretrained(str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()


def test_routers_logits_are_refused_when_a_trainer_asks_for_them(tmp_path):
    checkpoint(tmp_path, "qwen3_moe")
    model, _ = load_model(str(tmp_path), dtype=torch.float32)
    ids = torch.tensor([[3, 4]])
    for one in (model, model.model):
        with pytest.raises(ModelError, match="router_aux_loss_coef=0.0"):
            one(input_ids=ids, output_router_logits=True)
    assert model(input_ids=ids, output_router_logits=False).logits.shape[1] == 2


@pytest.mark.long
def test_experts_kept_in_16_bits_are_dense(tmp_path):
    checkpoint(tmp_path, "qwen3_moe")
    model, _ = load_model(str(tmp_path), dtype=torch.float32, keep_in_16bit=["experts"])
    assert not isinstance(model.model.layers[0].mlp.experts.down_proj, PackedWeight)
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.uint8


def test_experts_that_are_packed_as_linear_layers_are_refused_with_what_to_load_instead(tmp_path):
    checkpoint(tmp_path, "gpt_oss", num_hidden_layers=2, layer_types=MIXED[:2])

    def as_linear_layers(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".mlp.experts." in name]:
            stack, kind = name.removesuffix("_bias"), "bias" if name.endswith("_bias") else "weight"
            for expert, values in enumerate(tensors.pop(name)):
                tensors[f"{stack}s.{expert}.{kind}"] = values.T.contiguous()
        for name in [name for name in tensors if ".mlp.router." in name]:
            tensors[name.replace(".router.", ".router.linear.")] = tensors.pop(name)

    edit_tensors(tmp_path, as_linear_layers)
    with pytest.raises(ModelError, match=r"gate_up_projs.*Load openai/gpt-oss-20b .*-BF16"):
        load_model(str(tmp_path), dtype=torch.float32, max_seq_length=None)


def test_gpt_oss_in_float16_is_refused_before_its_weights_are_read(tmp_path):
    checkpoint(tmp_path, "gpt_oss", num_hidden_layers=2, layer_types=MIXED[:2])
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="float16.*gpt_oss models overflow.*dtype='bfloat16'"):
        load_model(str(tmp_path), dtype="float16", max_seq_length=None)
