"""Experts of a GGUF file as a frozen base in the file's codes train and answer as its values in 32 bits do, and beside the file."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from oribi.gguf import llama_cpp
from oribi.gguf.llama_cpp import LlamaCpp
from oribi.kernels.block_stack import BlockStack
from oribi.kernels.expert_stack import dequantize_stack
from oribi.lora.attach import attach_lora
from oribi.memory.architecture import architecture_of
from oribi.models.experts import STACKS, Experts
from oribi.models.layer_shards import split_layers
from oribi.models.load import load_model
from oribi.save.check import Outcome
from oribi.save.gguf import save_gguf, save_gguf_adapter
from oribi.save.merged import save_merged
from tests.gguf.test_frozen_base import ids_of
from tests.models.test_experts_gpu import replays_any_routing
from tests.models.test_layer_shards import group_of_one, passed, set_weights
from tests.models.test_parity import relative
from tests.save.tiny_export import byte_level_tokenizer, distance_from_llama_cpp, export_config, tiny_model

SIZES = {"hidden_size": 256, "num_hidden_layers": 2, "intermediate_size": 256, "moe_intermediate_size": 256}
FEW = ["sliding_attention", "full_attention"]
# what fits two layers, and rows of whole super-blocks, in a family's tiny config
CHANGES: dict[str, dict] = {
    "gpt_oss": {"layer_types": FEW},
    "gemma4_text+experts": {"layer_types": FEW, "num_kv_shared_layers": 0},
    "qwen3_5_moe_text": {
        "layer_types": ["linear_attention", "full_attention"],
        "shared_expert_intermediate_size": 256,
    },
    "qwen2_moe": {"shared_expert_intermediate_size": 256},
}
MIXED = {("Q4_K", "Q4_K"), ("Q4_K",), ("Q6_K",)}  # more bits for some layers' down
CASES = [
    ("qwen3_moe", "q4_k_m", MIXED),
    pytest.param("qwen2_moe", "q5_1", {("Q5_1", "Q5_1"), ("Q5_1",)}, marks=pytest.mark.long),
    pytest.param("gpt_oss", "q8_0", {("Q8_0", "Q8_0"), ("Q8_0",)}, marks=pytest.mark.long),
    pytest.param("granitemoe", "q4_k_m", MIXED, marks=pytest.mark.long),
    pytest.param("glm4_moe", "q5_k_m", {("Q5_K", "Q5_K"), ("Q6_K",)}, marks=pytest.mark.long),
    pytest.param("ernie4_5_moe", "q4_1", {("Q4_1", "Q4_1"), ("Q4_1",)}, marks=pytest.mark.long),
    pytest.param("gemma4_text+experts", "q4_k_m", MIXED, marks=pytest.mark.long),
    pytest.param("qwen3_5_moe_text", "q6_k", {("Q6_K", "Q6_K"), ("Q6_K",)}, marks=pytest.mark.long),
]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Gives the GGUF file of a tiny model with experts, which is written once."""
    made: dict[tuple[str, str], Path] = {}

    def make(family: str = "qwen3_moe", method: str = "q4_k_m") -> Path:
        if (family, method) not in made:
            model = tiny_model(export_config(family, **{**SIZES, **CHANGES.get(family, {})}))
            for parameter in model.parameters():
                if parameter.dim() > 1:  # as large as products with rows of 64 values are
                    parameter.data *= 0.4
            folder = tmp_path_factory.mktemp(family)
            saved = save_gguf(model, folder, byte_level_tokenizer(), method, verify=False)
            made[family, method] = Path(saved["gguf_files"][0])
        return made[family, method]

    return make


def load(path, **settings):
    settings = {"dtype": "float32", "max_seq_length": 64, "device_map": "cpu", **settings}
    return load_model(str(path), **settings)


def adapted(model, scale: float = 0.05):
    """With LoRA on attention and on both stacks of experts, whose B is not zero."""
    (prefix,) = {n.split(".", 3)[3] for n, module in model.named_modules() if isinstance(module, Experts)}
    model = attach_lora(model, r=4, lora_alpha=8, target_parameters=[f"{prefix}.{stack}" for stack in STACKS])
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            parameter.data.normal_(0, scale, generator=torch.Generator().manual_seed(seed))
    return model.train()


def stacks_of(model) -> list[BlockStack]:
    modules = [module for module in model.modules() if isinstance(module, Experts)]
    return [getattr(module, stack).packed for module in modules for stack in STACKS]


@pytest.mark.parametrize(("family", "method", "kinds"), CASES)
def test_loss_and_gradients_are_those_of_the_files_values(family, method, kinds, file):
    path, found = file(family, method), []
    for in_codes in (True, False):
        model, _ = load(path, load_in_4bit=in_codes)
        if in_codes:
            assert {stack.kinds for stack in stacks_of(model)} == kinds
            assert model.oribi.identity.weights == "gguf"
        model = adapted(model)
        set_weights(model.get_base_model(), "recompute")
        found.append(passed(model, ids_of()))
    for ours, expected in zip(*found):
        assert relative(ours, expected) <= 1e-6


@pytest.mark.parametrize(("family", "method", "kinds"), CASES)
def test_logits_and_gradients_are_those_of_transformers_and_peft_on_the_files_values(
    family, method, kinds, file, tmp_path
):
    path = file(family, method)
    model = adapted(load(path)[0])
    model.save_pretrained(str(tmp_path / "adapter"))
    values, tokenizer = load(path, load_in_4bit=False)
    save_merged(values, tmp_path / "values", tokenizer, dtype="float32", verify=False)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "values", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"), is_trainable=True)
    ids = ids_of()
    outputs = [one(input_ids=ids, labels=ids) for one in (model, theirs)]
    assert relative(outputs[0].logits, outputs[1].logits) < 1e-5
    for output in outputs:
        output.loss.backward()
    expected = dict(theirs.named_parameters())
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert any("experts" in name for name, _ in trained)
    for name, parameter in trained:
        assert relative(parameter.grad, expected[name].grad) < 1e-5, name


def test_the_note_counts_the_codes_and_the_memory_is_theirs(file):
    path = file()
    model, _ = load(path)
    assert "4 stacks of experts stay in Q4_K (3), Q6_K (1), as they are stored" in model.oribi.notes
    assert not any("NF4" in note for note in model.oribi.notes)
    held = sum(parameter.nbytes for parameter in model.parameters())
    known = architecture_of(str(path), dtype=torch.float32)
    assert known.weight_bytes(load_in_4bit=True) == held
    for keep in ("experts", "self_attn"):
        model, _ = load(path, keep_in_16bit=[keep])
        held = sum(parameter.nbytes for parameter in model.parameters())
        assert known.weight_bytes(load_in_4bit=True, keep_in_16bit=[keep]) == held


def test_nf4_is_what_quantization_config_asks_for(file):
    model, _ = load(file(), quantization_config={"load_in_4bit": True})
    assert not any(isinstance(codes, BlockStack) for codes in stacks_of(model))
    assert model.oribi.identity.weights == "nf4"


def test_answers_are_those_of_the_files_values(file):
    ours, expected = load(file())[0].eval(), load(file(), load_in_4bit=False)[0].eval()
    how = {"max_new_tokens": 8, "do_sample": False}
    for ids in (ids_of()[:1], ids_of()):  # of one row a step reads few experts
        assert torch.equal(ours.generate(ids, **how), expected.generate(ids, **how))


def test_gradients_are_the_same_bits_whatever_is_kept(file):
    model = adapted(load(file())[0])
    first = passed(model, ids_of())
    for policy in ("speed", "balanced", "memory"):
        model.get_base_model().set_recompute_policy(policy)
        assert all(torch.equal(a, b) for a, b in zip(passed(model, ids_of()), first)), policy


@pytest.mark.long
def test_sharded_codes_give_the_same_bits(file, tmp_path):
    model = adapted(load(file())[0])
    decoder = model.get_base_model()
    set_weights(decoder, "recompute")
    expected = passed(model, ids_of())
    layers = decoder.model.layers
    with group_of_one(tmp_path) as group:
        decoder.model.shards = split_layers(list(layers), torch.device("cpu"), group)
        assert sum(stack.nbytes for stack in stacks_of(model)) < decoder.model.shards.whole_bytes
        assert all(torch.equal(a, b) for a, b in zip(passed(model, ids_of()), expected))


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("qwen3_moe", "q4_k_m"),
        *(
            pytest.param(*one, marks=pytest.mark.long)
            for one in [("gpt_oss", "q8_0"), ("granitemoe", "q4_k_m")]
        ),
    ],
)
def test_adapters_are_saved_loaded_on_the_codes_merged_and_proved(family, method, file, tmp_path):
    model, tokenizer = load(file(family, method))
    model = adapted(model).eval()
    with torch.no_grad():
        expected = model(input_ids=ids_of()).logits
    report = save_merged(model, tmp_path / "lora", tokenizer, save_method="lora")
    assert {check.outcome for check in report.checks} <= {Outcome.EQUAL, Outcome.CLOSE}
    check = next(check for check in report.checks if check.name == "answers in plain PEFT")
    assert check.figures["kl"] < 1e-6 < check.figures["kl_without_adapter"]
    again, _ = load(tmp_path / "lora")
    assert all(isinstance(codes, BlockStack) for codes in stacks_of(again))
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=ids_of()).logits, expected)
    save_merged(model, tmp_path / "merged", tokenizer, dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        assert relative(merged(input_ids=ids_of()).logits, expected) < 1e-5


@pytest.mark.long
@pytest.mark.skipif(not llama_cpp.is_installed(), reason="xllamacpp is not installed")
@pytest.mark.parametrize(("family", "method", "kinds"), CASES)
def test_the_file_and_the_adapter_answer_in_llama_cpp_as_trained(family, method, kinds, file, tmp_path):
    path = file(family, method)
    model = adapted(load(path)[0], scale=0.0)
    ids = ids_of()[:1].repeat(1, 2)
    ids[0, 24:] = ids[0, :24].flip(
        0
    )  # a text to learn by heart: llama.cpp rounds activations to 8 bits, and random weights waver
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(150 if family.startswith("gemma4") else 50):  # whose logits are soft-capped
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.eval()
    saved = save_gguf_adapter(model, tmp_path, "f32")
    assert any("with that file it is the trained model" in note for note in saved["report"].notes)
    prompt, learnt = ids[0, :24].tolist(), ids[0, 24:40].tolist()
    found = LlamaCpp(path, 256, saved["gguf_files"][0]).generate(prompt, 16, top=1).tokens
    assert found == model.generate(ids[:, :24], max_new_tokens=16, do_sample=False)[0, 24:].tolist() == learnt
    assert LlamaCpp(path, 256).generate(prompt, 16, top=1).tokens != learnt
    distance = distance_from_llama_cpp(model, path, prompt, 16, saved["gguf_files"][0])
    assert distance.kl < 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k_m", "q5_k_m", "q6_k"])
def test_on_a_gpu_stacks_have_the_cpus_bits_and_a_recorded_pass_serves_any_routing(method, file):
    path = file("qwen3_moe", method)
    on_gpu, _ = load(path, dtype="bfloat16", device_map="cuda")
    on_cpu, _ = load(path, dtype="bfloat16")
    for ours, theirs in zip(stacks_of(on_gpu), stacks_of(on_cpu), strict=True):
        assert torch.equal(ours.codes.cpu(), theirs.codes)
        values = (dequantize_stack(one, torch.bfloat16) for one in (ours, theirs))
        assert torch.equal(*(one.cpu().view(torch.int16) for one in values))
    model = adapted(on_gpu)
    core = model.get_base_model().model.layers[0].mlp
    replays_any_routing(core, columns=256)
