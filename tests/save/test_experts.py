"""What was trained on experts is what plain PEFT, transformers and llama.cpp compute."""

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from oribi import FastLanguageModel
from oribi.cli.estimate import _disk as estimate_disk
from oribi.config import RunConfig
from oribi.environment import detect
from oribi.errors import ConfigError, ExportError
from oribi.gguf import llama_cpp
from oribi.gguf.file import GGUFFile, Type
from oribi.gguf.mixes import mix_of
from oribi.gguf.writer import plan_file
from oribi.kernels.expert_stack import dequantize_stack
from oribi.kernels.mxfp4 import MXFP4Stack
from oribi.kernels.packed_weight import PackedWeight
from oribi.memory.architecture import architecture_of
from oribi.memory.estimate import training_of
from oribi.models.checkpoint_tensors import expected_shapes
from oribi.models.experts import Experts
from oribi.models.load import load_model
from oribi.preflight import check_before_loading
from oribi.save.gguf import save_gguf, save_gguf_adapter
from tests.models.test_expert_factors import write as write_each
from tests.models.test_parity import relative
from tests.models.tiny import MIXED
from tests.models.tiny_checkpoint import checkpoint, edit_tensors, mxfp4_checkpoint
from tests.save.test_adapter_files import write_wrapper
from tests.save.tiny_export import distance_from_llama_cpp

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# another family's row: first layers without experts, an MLP beside them, corrections, layers that draft
OTHERS = ["ernie4_5_moe", "glm4_moe"]

TEXTS = ["the quick brown fox jumps over the lazy dog", "and then it rests in the other field"]
# as llama.cpp reads the family: experts in every layer, no biases
CHANGES = {"mlp_only_layers": [], "attention_bias": False, "use_sliding_window": False}


def as_released(tensors: dict[str, torch.Tensor]) -> None:
    """Qwen3.5's layout: experts in stacks, and a layer that drafts tokens."""
    prefixes = sorted({name.partition(".experts.")[0] for name in tensors if ".experts." in name})
    for prefix in (f"{one}.experts" for one in prefixes):
        gate, up, down = (
            torch.stack([tensors.pop(f"{prefix}.{e}.{part}_proj.weight") for e in range(4)])
            for part in ("gate", "up", "down")
        )
        tensors |= {f"{prefix}.gate_up_proj": torch.cat([gate, up], 1), f"{prefix}.down_proj": down}
    tensors["mtp.layers.0.mlp.experts.0.gate_proj.weight"] = torch.ones(3, 3)


@pytest.fixture(
    scope="module", params=["qwen3_moe", "gpt_oss", pytest.param("qwen3_5_moe", marks=pytest.mark.long)]
)
def folder(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("experts") / "base"
    if request.param == "qwen3_5_moe":
        write_wrapper(request.param, folder)
        edit_tensors(folder, as_released)
    elif request.param == "gpt_oss":  # in its releases' layout
        mxfp4_checkpoint(folder, num_hidden_layers=2, layer_types=MIXED[:2])
    else:
        checkpoint(folder, request.param, num_hidden_layers=2, **CHANGES)
    return folder


def trained(folder: Path, targets: list[str] | None = BOTH, load_in_4bit: bool = True, **options: object):
    """A model with an adapter, none of whose factors is zero, and its tokenizer."""
    model, tokenizer = load_model(
        str(folder), dtype=torch.float32, max_seq_length=None, load_in_4bit=load_in_4bit
    )
    model = FastLanguageModel.get_peft_model(model, r=4, target_parameters=targets, **options)
    torch.manual_seed(1)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    return model, tokenizer


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(3, 380, (2, 14), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize(
    "targets",
    [BOTH, pytest.param(BOTH[1:], marks=pytest.mark.long), pytest.param(None, marks=pytest.mark.long)],
    ids=["both", "down", "none"],
)
def test_an_adapter_and_a_merged_model_compute_in_transformers_class_what_was_trained(
    targets, folder, tmp_path
):
    model, tokenizer = trained(folder, targets, load_in_4bit=False)
    expected = logits(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    model.save_pretrained_merged(str(tmp_path / "merged"), tokenizer, dtype="float32", held_out=TEXTS)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert relative(logits(plain), expected) > 1e-2
    assert relative(logits(PeftModel.from_pretrained(plain, tmp_path / "adapter")), expected) < 1e-5
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert relative(logits(merged), expected) < 1e-5
    held, written = (load_file(one / "model.safetensors") for one in (folder, tmp_path / "merged"))
    if not any(name.endswith("_blocks") for name in held):  # a tower and layers that draft, too
        assert {name: t.shape for name, t in written.items()} == {name: t.shape for name, t in held.items()}
    again, _ = load_model(str(tmp_path / "adapter"), dtype=torch.float32, max_seq_length=None)
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("stored", ["stacks", pytest.param("each", marks=pytest.mark.long)])
def test_an_adapter_with_a_pair_for_each_expert_acts_in_plain_peft_and_is_read_again(stored, tmp_path):
    base = tmp_path / "base"
    checkpoint(base, "qwen3_moe", num_hidden_layers=2, **CHANGES)
    ranks = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"o_proj": 9}} if stored == "stacks" else {}
    model, tokenizer = trained(base, **ranks)
    if stored == "each":  # each with an A of its own
        write_each(base, tmp_path / "own")
        model, tokenizer = FastLanguageModel.from_pretrained(
            str(tmp_path / "own"), dtype="float32", device_map="cpu", max_seq_length=64
        )
    report = model.save_pretrained_merged(
        str(tmp_path / "a"), tokenizer, save_method="lora_per_expert", held_out=TEXTS
    )
    check = next(check for check in report.checks if check.name == "answers in plain PEFT")
    assert check.figures["kl"] < 1e-6 < check.figures["kl_without_adapter"]
    names = load_file(tmp_path / "a" / "adapter_model.safetensors")
    each = "base_model.model.model.layers.1.mlp.experts.7.{}_proj.lora_A.weight"
    assert all(names[each.format(part)].shape == (4, 64) for part in ("gate", "up", "down"))
    assert not any("experts.lora_A" in name or "base_layer" in name for name in names)
    again, _ = load_model(str(tmp_path / "a"), dtype=torch.float32, max_seq_length=None)
    assert relative(logits(again), logits(model)) < 1e-6


@pytest.mark.long
@pytest.mark.parametrize("method", ["lora", "lora_per_expert"])
@pytest.mark.parametrize("model_type", ["qwen2_moe", *OTHERS])
def test_adapters_of_other_families_act_in_plain_peft_in_either_layout(model_type, method, tmp_path):
    # whose shared experts plain PEFT looks for under the same names
    if (model_type, method) == ("qwen2_moe", "lora_per_expert"):
        checkpoint(tmp_path / "base", model_type)
        model, tokenizer = trained(tmp_path / "base")
        with pytest.raises(ExportError, match="no place for 12 tensors"):
            model.save_pretrained_merged(str(tmp_path / "a"), tokenizer, save_method=method, held_out=TEXTS)
        assert not (tmp_path / "a" / "adapter_config.json").exists()
        return
    checkpoint(tmp_path / "base", model_type)
    model, tokenizer = trained(tmp_path / "base")
    report = model.save_pretrained_merged(str(tmp_path / "a"), tokenizer, save_method=method, held_out=TEXTS)
    check = next(check for check in report.checks if check.name == "answers in plain PEFT")
    assert check.figures["kl"] < 1e-6 < check.figures["kl_without_adapter"]
    names = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert any(".experts.7.down_proj.lora_B" in name for name in names) == (method == "lora_per_expert")


def test_where_no_program_reads_a_pair_for_each_expert_it_is_refused(tmp_path):
    checkpoint(tmp_path / "base", "qwen3_moe", num_hidden_layers=2, **CHANGES)
    model, tokenizer = trained(tmp_path / "base", BOTH[1:])
    with pytest.raises(ConfigError, match="gate_up_proj has no pair"):
        model.save_pretrained_merged(str(tmp_path / "a"), tokenizer, save_method="lora_per_expert")
    assert not (tmp_path / "a" / "adapter_config.json").exists()


@pytest.mark.long
def test_stacks_with_names_of_their_own_load_train_act_in_plain_peft_and_merge(tmp_path):
    base = tmp_path / "base"
    checkpoint(base, "granitemoe", num_hidden_layers=2)
    stored = load_file(base / "model.safetensors")
    assert stored["model.layers.1.block_sparse_moe.input_linear.weight"].shape == (8, 256, 64)
    targets = [f"block_sparse_moe.experts.{stack}" for stack in ("gate_up_proj", "down_proj")]
    model, tokenizer = trained(base, targets)
    stacks = [m.gate_up_proj for m in model.modules() if isinstance(m, Experts)]
    assert len(stacks) == 2
    assert all(isinstance(stack, PackedWeight) for stack in stacks)
    report = model.save_pretrained_merged(str(tmp_path / "a"), tokenizer, save_method="lora", held_out=TEXTS)
    check = next(check for check in report.checks if check.name == "answers in plain PEFT")
    assert check.figures["kl"] < 1e-6 < check.figures["kl_without_adapter"]
    found = model.save_pretrained_merged(str(tmp_path / "m"), tokenizer, dtype="float32", held_out=TEXTS)
    assert found.outcome.value == "equal"
    assert load_file(tmp_path / "m" / "model.safetensors").keys() == stored.keys()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert relative(logits(merged), logits(model)) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("model_type", OTHERS)
def test_other_families_load_in_four_bits_train_act_in_plain_peft_and_merge(model_type, tmp_path):
    base = tmp_path / "base"
    checkpoint(base, model_type, num_hidden_layers=3, num_nextn_predict_layers=1)
    drafts = "model.mtp_block.0.x" if model_type == "ernie4_5_moe" else "model.layers.3.eh_proj.weight"
    edit_tensors(base, lambda tensors: tensors.update({drafts: torch.ones(3, 3)}))
    stored = load_file(base / "model.safetensors")
    (correction,) = {name for name in stored if "correction_bias" in name and ".1." in name}
    model, tokenizer = trained(base)
    assert any("predict further tokens" in note for note in model.oribi.notes)
    router = model.get_base_model().model.layers[1].mlp.gate
    assert torch.equal(router.correction, stored[correction].view(-1))
    packed = [m for m in model.modules() if isinstance(m, Experts)]
    assert len(packed) == 2
    assert all(isinstance(m.gate_up_proj, PackedWeight) for m in packed)
    report = model.save_pretrained_merged(str(tmp_path / "a"), tokenizer, save_method="lora", held_out=TEXTS)
    check = next(check for check in report.checks if check.name == "answers in plain PEFT")
    assert check.figures["kl"] < 1e-6 < check.figures["kl_without_adapter"]
    expected = logits(model)
    for base in ("dequantized", "original"):
        found = model.save_pretrained_merged(
            str(tmp_path / base), tokenizer, dtype="float32", base=base, held_out=TEXTS
        )
        assert found.outcome.value == "equal"
    written = load_file(tmp_path / "dequantized" / "model.safetensors")
    assert written.keys() == stored.keys()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "dequantized", dtype=torch.float32)
    assert relative(logits(merged), expected) < 1e-5


def proved_and_merged_from_either_base(model, tokenizer, tmp_path) -> None:
    """Asserts what every adapter on packed experts has to pass when it is saved."""
    report = model.save_pretrained_merged(str(tmp_path / "a"), tokenizer, save_method="lora", held_out=TEXTS)
    check = next(check for check in report.checks if check.name == "answers in plain PEFT")
    assert check.figures["kl"] < 1e-6 < check.figures["kl_without_adapter"]
    for base in ("dequantized", "original"):
        found = model.save_pretrained_merged(
            str(tmp_path / base), tokenizer, dtype="float32", base=base, held_out=TEXTS
        )
        assert found.outcome.value == "equal"
    with pytest.raises(ConfigError, match="transformers packs no stacks of experts"):
        model.save_pretrained_merged(str(tmp_path / "four"), tokenizer, save_method="merged_4bit")


@pytest.mark.long
def test_what_was_trained_on_packed_experts_is_proved_in_plain_peft_and_merged_from_either_base(
    folder, tmp_path
):
    model, tokenizer = trained(folder)
    proved_and_merged_from_either_base(model, tokenizer, tmp_path)


@pytest.mark.skipif(not llama_cpp.is_installed(), reason="xllamacpp is not installed")
def test_a_gguf_file_answers_in_llama_cpp_with_the_same_tokens_and_loads_again(folder, tmp_path):
    model, tokenizer = trained(folder)
    expected = logits(model)
    found = model.save_pretrained_gguf(str(tmp_path), tokenizer, ["f32"], held_out=TEXTS)
    answers = [check for check in found["report"].checks if "greedy answers in llama.cpp" in check.name]
    assert [check.outcome.value for check in answers] == ["equal"]
    assert (Path(found["gguf_directory"]) / "Modelfile").is_file()
    again, _ = load_model(
        found["gguf_files"][0], dtype=torch.float32, load_in_4bit=False, max_seq_length=None
    )
    assert relative(logits(again), expected) < 1e-5


@pytest.mark.long
@pytest.mark.skipif(not llama_cpp.is_installed(), reason="xllamacpp is not installed")
@pytest.mark.parametrize("model_type", [*OTHERS, "granitemoe"])
def test_other_families_answer_in_llama_cpp_merged_and_with_their_adapter_beside_the_base(
    model_type, tmp_path
):
    changes = {"moe_norm_min": 1e-12} if model_type == "ernie4_5_moe" else {}
    checkpoint(tmp_path / "base", model_type, num_hidden_layers=3, **changes)
    mlp = "block_sparse_moe" if model_type == "granitemoe" else "mlp"
    model, tokenizer = trained(tmp_path / "base", [one.replace("mlp", mlp) for one in BOTH])
    merged = model.save_pretrained_gguf(str(tmp_path / "merged"), tokenizer, ["f32"], held_out=TEXTS)
    answers = [check for check in merged["report"].checks if "greedy answers in llama.cpp" in check.name]
    assert [check.outcome.value for check in answers] == ["equal"]
    again, _ = load_model(
        merged["gguf_files"][0], dtype=torch.float32, load_in_4bit=False, max_seq_length=None
    )
    assert relative(logits(again), logits(model)) < 1e-5
    plain, _ = load_model(
        str(tmp_path / "base"), dtype=torch.float32, load_in_4bit=False, max_seq_length=None
    )
    base = save_gguf(plain.eval(), tmp_path / "gguf", tokenizer, ["f32"], verify=False)
    model, _ = trained(tmp_path / "base", [one.replace("mlp", mlp) for one in BOTH], load_in_4bit=False)
    adapter = save_gguf_adapter(model, tmp_path / "lora", "f32")["gguf_files"][0]
    prompt = list(range(20, 60))
    found = distance_from_llama_cpp(model.eval(), base["gguf_files"][0], prompt, adapter=adapter)
    assert found.agreeing == 1.0
    assert found.worst < 2e-3
    assert distance_from_llama_cpp(model.eval(), base["gguf_files"][0], prompt).worst > 0.1


@pytest.mark.long
@pytest.mark.skipif(not llama_cpp.is_installed(), reason="xllamacpp is not installed")
def test_an_adapter_on_mxfp4_experts_acts_in_llama_cpp_and_their_codes_stay(tmp_path):
    # rounded as llama.cpp rounds YaRN's range
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
    mxfp4_checkpoint(tmp_path / "base", num_hidden_layers=2, layer_types=MIXED[:2], rope_parameters=rope)
    base, tokenizer = load_model(
        str(tmp_path / "base"), dtype=torch.float32, load_in_4bit=False, max_seq_length=None
    )
    files = save_gguf(base.eval(), tmp_path / "gguf", tokenizer, ["f32", "mxfp4"], verify=False)["gguf_files"]
    in_mxfp4 = GGUFFile(Path(files[1]))
    for name, stored in in_mxfp4.tensors.items():
        assert (stored.kind == Type.MXFP4) == name.endswith("_exps.weight"), name
    gate = base.model.layers[1].mlp.experts.gate_up_proj[:, :128]
    assert torch.equal(in_mxfp4.read("blk.1.ffn_gate_exps.weight", torch.float32), gate)
    model, _ = trained(tmp_path / "base", load_in_4bit=False)
    adapter = save_gguf_adapter(model, tmp_path / "lora", "f32")["gguf_files"][0]
    prompt = list(range(20, 60))
    found = distance_from_llama_cpp(model.eval(), files[0], prompt, adapter=adapter)
    assert found.agreeing == 1.0
    assert found.worst < 2e-3
    assert distance_from_llama_cpp(model.eval(), files[0], prompt).worst > 0.1


def test_an_adapter_as_gguf_holds_the_factors_of_all_experts_one_behind_the_other(folder, tmp_path):
    model, _ = trained(folder)
    found = save_gguf_adapter(model, tmp_path, "f32")
    file = GGUFFile(Path(found["gguf_files"][0]))
    a = file.read("blk.1.ffn_up_exps.weight.lora_a", torch.float32)
    b = file.read("blk.1.ffn_up_exps.weight.lora_b", torch.float32)
    wrapper = model.get_base_model().model.layers[1].mlp.experts.base_layer
    assert wrapper.parameter_name == "gate_up_proj"
    delta = wrapper.get_delta_weight("default")
    # of gpt-oss in the checkpoint's order, in which gate and up alternate
    alternating = wrapper.get_base_layer().rules.alternating
    delta = delta[:, 1::2] if alternating else delta[:, delta.shape[1] // 2 :]
    assert (a.shape, b.shape) == ((len(delta), 4, 64), (*delta.shape[:2], 4))
    scale = file.value("adapter.lora.alpha") / 4
    assert relative(torch.einsum("eor,eri->eoi", b, a) * scale, delta) < 1e-6


@pytest.mark.long
@pytest.mark.skipif(not llama_cpp.is_installed(), reason="xllamacpp is not installed")
def test_a_gguf_file_in_mxfp4_keeps_its_experts_codes_and_answers_beside_the_adapter_as_trained(tmp_path):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
    mxfp4_checkpoint(tmp_path / "base", num_hidden_layers=2, layer_types=MIXED[:2], rope_parameters=rope)
    base, tokenizer = load_model(str(tmp_path / "base"), dtype=torch.float32, max_seq_length=None)
    file = save_gguf(base.eval(), tmp_path / "gguf", tokenizer, "mxfp4", verify=False)["gguf_files"][0]
    model, _ = trained(Path(file))
    assert not any("quantised again" in note for note in model.oribi.notes)
    of_file, of_checkpoint = ([m for m in one.modules() if isinstance(m, Experts)] for one in (model, base))
    for ours, theirs in zip(of_file, of_checkpoint, strict=True):
        for stack in ("gate_up_proj", "down_proj"):
            ours_packed, theirs_packed = (getattr(one, stack).packed for one in (ours, theirs))
            assert isinstance(ours_packed, MXFP4Stack)
            values = (dequantize_stack(one, torch.float32) for one in (ours_packed, theirs_packed))
            assert torch.equal(*values)
            assert ours_packed.nbytes == theirs_packed.nbytes
    held = sum(p.nbytes for name, p in model.named_parameters() if "lora_" not in name)
    estimated = architecture_of(file, dtype=torch.float32).weight_bytes(load_in_4bit=True)
    assert abs(estimated - held) < 0.01 * held
    saved = save_gguf_adapter(model, tmp_path / "lora", "f32")
    assert any("with that file it is the trained model" in note for note in saved["report"].notes)
    prompt = list(range(20, 60))
    # llama.cpp rounds what enters its products with codes
    found = distance_from_llama_cpp(model.eval(), file, prompt, adapter=saved["gguf_files"][0])
    assert found.kl < 0.01
    assert distance_from_llama_cpp(model.eval(), file, prompt).kl > 10 * found.kl


@pytest.mark.long
def test_a_gguf_files_experts_in_other_types_become_nf4_and_notes_say_what_that_costs(tmp_path):
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": 2}
    checkpoint(tmp_path / "base", "qwen3_moe", **sizes, **CHANGES)
    base, tokenizer = load_model(
        str(tmp_path / "base"), dtype=torch.float32, load_in_4bit=False, max_seq_length=None
    )
    file = save_gguf(base.eval(), tmp_path / "gguf", tokenizer, "q2_k", verify=False)["gguf_files"][0]
    model, _ = trained(Path(file))
    (note,) = (note for note in model.oribi.notes if "quantised again" in note)
    assert "experts (Q2_K, Q3_K)" in note
    values, _ = load_model(file, dtype=torch.float32, load_in_4bit=False, max_seq_length=None)
    (ours, *_), (theirs, *_) = (
        [m for m in one.modules() if isinstance(m, Experts)] for one in (model, values)
    )
    changed = relative(dequantize_stack(ours.down_proj.packed, torch.float32), theirs.down_proj)
    assert 0.08 < changed < 0.1
    saved = save_gguf_adapter(model, tmp_path / "lora", "f32")
    assert any("trained on experts in NF4" in note for note in saved["report"].notes)


# what scripts for Unsloth ask for, and the other methods
NAMES = [
    "q4_k_m", "q8_0", "f16", "bf16", "q5_k_m", "q6_k", "q3_k_m", "q2_k", "not_quantized", "fast_quantized", "quantized",
    "q4_k_s", "q5_k_s", "q3_k_s", "q3_k_l", "q4_0", "q4_1", "q5_0", "q5_1", "mxfp4",
]  # fmt: skip


@pytest.mark.skipif(not llama_cpp.is_installed(), reason="xllamacpp is not installed")
@pytest.mark.parametrize(
    ("model_type", "size", "methods"),
    [
        ("qwen3_moe", 96, ["q4_k_m", "not_quantized"]),
        *(
            pytest.param(kind, size, NAMES, marks=pytest.mark.long)
            for kind in ("qwen3_moe", "qwen2_moe", "glm4_moe", "ernie4_5_moe", "granitemoe", "gpt_oss")
            for size in (96, 80)
        ),
    ],
)
def test_every_method_gives_a_file_that_llama_cpp_loads_whatever_the_experts_width(
    model_type, size, methods, tmp_path
):
    # rounded as llama.cpp rounds YaRN's range
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
    changes = {
        "qwen3_moe": CHANGES,
        "qwen2_moe": {**CHANGES, "layer_types": ["full_attention"] * 2, "norm_topk_prob": False},
        "ernie4_5_moe": {"moe_norm_min": 1e-12},
        "gpt_oss": {"layer_types": MIXED[:2], "rope_parameters": rope},
    }.get(model_type, {})
    if model_type in ("granitemoe", "gpt_oss"):
        changes["intermediate_size"] = size
    sizes = {"num_hidden_layers": 2, "hidden_size": 256, "moe_intermediate_size": size}
    checkpoint(tmp_path / "base", model_type, **{**sizes, **changes})
    model, tokenizer = load_model(
        str(tmp_path / "base"), dtype=torch.float32, load_in_4bit=False, max_seq_length=None
    )
    found = save_gguf(model.eval(), tmp_path / "gguf", tokenizer, methods, verify=False)
    assert len(found["gguf_files"]) == len({mix_of(method).name for method in methods})
    for path in found["gguf_files"]:
        answer = distance_from_llama_cpp(model, path, list(range(20, 50)))
        if ".F16." in path:
            assert answer.kl < 0.01
        types = {name: tensor.kind.name for name, tensor in GGUFFile(Path(path)).tensors.items()}
        if ".Q4_K_M." in path:
            assert types["blk.1.ffn_gate_exps.weight"] == "Q4_K"
            assert types["blk.1.ffn_down_exps.weight"] == ("Q8_0" if size == 96 else "F16")
    (note,) = (note for note in found["report"].notes if note.startswith("q4_k_m: "))
    assert re.search(rf"rows of {size}( or \d+)* values, which fill no blocks of 256", note)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "glm4_moe"])
def test_the_size_of_a_gguf_file_is_told_before_the_training(model_type, tmp_path, capsys):
    changes = CHANGES if model_type == "qwen3_moe" else {}
    checkpoint(tmp_path / "base", model_type, num_hidden_layers=2, **changes)
    architecture = architecture_of(str(tmp_path / "base"))
    planned = plan_file(architecture.config, expected_shapes(architecture.decoder), "q8_0")
    model, tokenizer = load_model(
        str(tmp_path / "base"), dtype=torch.float32, load_in_4bit=False, max_seq_length=None
    )
    path = save_gguf(model.eval(), tmp_path / "gguf", tokenizer, ["q8_0"], verify=False)["gguf_files"][0]
    held = GGUFFile(Path(path)).tensors
    assert {entry.tensor.name: entry.type for entry in planned} == {n: t.kind for n, t in held.items()}
    config = RunConfig(
        model=str(tmp_path / "base"), dataset=[str(tmp_path / "rows.jsonl")], output_dir=str(tmp_path / "run"),
        quantization_method=["q8_0", "q4_k_m"],
    )  # fmt: skip
    disk = estimate_disk(training_of(config, 2**40))
    size = Path(path).stat().st_size
    assert 0.5 * size < disk["gguf q8_0"] <= size
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    capsys.readouterr()
    check_before_loading(config, detect())
    said = capsys.readouterr()
    assert "q4_k_m: " in said.out + said.err
    assert "which fill no blocks of 256; they are Q5_0, Q8_0 instead" in said.out + said.err


@pytest.mark.parametrize(
    ("model_type", "form", "said"),
    [
        ("qwen3_moe", "lora", "save_method='lora_per_expert'"),
        ("qwen3_moe", "lora_per_expert", "vllm serve BASE_MODEL --enable-lora --max-lora-rank 8 --lora-modules a=./a"),
        pytest.param("gpt_oss", "lora", "vllm serve BASE_MODEL --enable-lora --max-lora-rank 8", marks=pytest.mark.long),
        pytest.param("granitemoe", "lora", "save_method='merged_16bit'", marks=pytest.mark.long),
        pytest.param("llama", "lora", "", marks=pytest.mark.long),
    ],
)  # fmt: skip
def test_an_adapters_card_says_how_vllm_reads_its_experts(model_type, form, said, tmp_path):
    changes = {"qwen3_moe": CHANGES, "gpt_oss": {"layer_types": MIXED[:2]}}.get(model_type, {})
    checkpoint(tmp_path / "base", model_type, num_hidden_layers=2, **changes)
    mlp = "block_sparse_moe" if model_type == "granitemoe" else "mlp"
    targets = None if model_type == "llama" else [one.replace("mlp", mlp) for one in BOTH]
    model, tokenizer = trained(tmp_path / "base", targets, load_in_4bit=False)
    model.save_pretrained_merged(str(tmp_path / "a"), tokenizer, save_method=form, verify=False)
    card = (tmp_path / "a" / "README.md").read_text()
    assert said in card
    assert ("vllm serve" in card) == said.startswith("vllm serve")
