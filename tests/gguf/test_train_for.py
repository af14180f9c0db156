"""A 16-bit base whose frozen weights are those of its GGUF file: trained, saved, loaded again and shipped apart from its adapter."""

from pathlib import Path

import pytest
import torch

from oribi.config_file import read_run_config
from oribi.config_setting import KEPT_CODES
from oribi.errors import ConfigError
from oribi.gguf import llama_cpp
from oribi.gguf.file import Type
from oribi.gguf.mixes import METHODS
from oribi.gguf.quantize import encode
from oribi.kernels.ggml_blocks import BLOCK_TYPES
from oribi.kernels.packed_weight import PackedWeight, dense_weight
from oribi.memory.architecture import architecture_of
from oribi.models.decoder import build
from oribi.models.expert_tensors import expert_modules, stored_stack
from oribi.models.experts import STACKS
from oribi.models.load import load_model
from oribi.models.packed_linear import PackedLinear, planned_types
from oribi.models.unwrap import bare_name
from oribi.save.check import Outcome
from oribi.save.gguf import save_gguf
from oribi.save.gguf_adapter import save_gguf_adapter
from oribi.save.merged import save_merged
from oribi.verify.local import InTransformers
from tests.gguf.test_frozen_base import SIZES, adapted, ids_of, layers_of
from tests.models.tiny import tiny_pair
from tests.save.tiny_export import byte_level_tokenizer, export_config, sentencepiece_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Returns the folder of a tiny checkpoint in bfloat16, written once."""
    made: dict[str, Path] = {}

    def write(family: str = "llama", **changes) -> Path:
        key = repr((family, sorted(changes.items())))
        if key not in made:
            folder = made[key] = tmp_path_factory.mktemp(family)
            ours, theirs = tiny_pair(export_config(family, **changes))
            model = theirs if family == "gpt_oss" else ours  # whose releases have stacks in its own order
            model.to(torch.bfloat16).save_pretrained(folder)
            pieces = family.startswith("gemma")
            (sentencepiece_tokenizer() if pieces else byte_level_tokenizer()).save_pretrained(folder)
        return made[key]

    return write


def load(path, **settings):
    settings = {"dtype": "float32", "max_seq_length": 64, "device_map": "cpu", **settings}
    return load_model(str(path), **settings)


EXPERTS = {**SIZES, "moe_intermediate_size": 256, "num_hidden_layers": 2}
CASES = [
    ("llama", "q4_k_m", SIZES),
    pytest.param("llama", "q5_k_m", SIZES, marks=pytest.mark.long),
    pytest.param("llama", "q4_k_m", {}, marks=pytest.mark.long),  # rows of no whole super-blocks
    pytest.param("gemma3_text", "q8_0", {}, marks=pytest.mark.long),  # norms that are shifted
    pytest.param("granite", "q4_0", {}, marks=pytest.mark.long),
    pytest.param("phi3", "q4_0", {}, marks=pytest.mark.long),  # fused projections
    pytest.param("qwen3_5_text", "q8_0", {}, marks=pytest.mark.long),  # value heads in another order
    ("qwen3_moe", "q4_k_m", EXPERTS),
    pytest.param("gpt_oss", "q8_0", {}, marks=pytest.mark.long),  # gate and up by turns, in transposed stacks
    pytest.param("granitemoe", "q5_0", {}, marks=pytest.mark.long),
]


@pytest.mark.parametrize(("family", "method", "sizes"), CASES)
def test_weights_are_those_of_the_file_that_is_exported_of_the_untouched_base(
    family, method, sizes, base, tmp_path
):
    folder = base(family, **sizes)
    untouched, tokenizer = load(folder, load_in_4bit=False)
    (file,) = save_gguf(untouched, tmp_path, tokenizer, method, verify=False)["gguf_files"]
    expected, _ = load(file)
    model, _ = load(folder, train_for=method)
    assert layers_of(model)
    assert model.oribi.identity.train_for == method
    ours, theirs = dict(model.named_parameters()), dict(expected.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        packed = getattr(weight, "packed", None)
        if packed is None:
            assert torch.equal(weight, theirs[name]), name
        else:
            kinds = [getattr(one, "kinds", None) or one.kind for one in (packed, theirs[name].packed)]
            assert kinds[0] == kinds[1], name
            assert torch.equal(packed.codes, theirs[name].packed.codes), name


def test_without_codes_in_memory_the_values_are_the_same(base):
    folder = base(**SIZES)
    ours, expected = load(folder, train_for="q4_k_m"), load(folder, train_for="q4_k_m", load_in_4bit=False)
    assert not layers_of(expected[0])
    stored = ours[0].state_dict()
    assert all(torch.equal(stored[name], value) for name, value in expected[0].state_dict().items())


@pytest.mark.parametrize(("family", "sizes"), [("llama", SIZES), ("qwen3_moe", EXPERTS)])
def test_the_base_is_written_beside_the_adapter(family, sizes, base, tmp_path, monkeypatch):
    # llama.cpp's activations of 8 bits change what random weights say; it is asked of SmolLM2 below
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    folder = base(family, **sizes)
    model, tokenizer = load(folder, train_for="q4_k_m")
    model = adapted(model).eval()
    written = save_gguf_adapter(model, tmp_path / "apart", "f32", tokenizer=tokenizer)
    report = written["report"]
    assert report.passed
    found = {check.name: check for check in written["report"].checks}
    assert found["codes"].outcome == Outcome.EQUAL
    assert found["codes"].figures["of"] == sum(isinstance(p, PackedWeight) for p in model.parameters())
    file = next((tmp_path / "apart").glob("*.Q4_K_M.gguf"))
    assert f"-m {file.name} --lora" in (tmp_path / "apart" / "README.md").read_text()
    untouched, tokenizer = load(folder, load_in_4bit=False)
    plain = save_gguf(untouched, tmp_path / "plain", tokenizer, "q4_k_m", verify=False)["gguf_files"][0]
    assert file.read_bytes() == Path(plain).read_bytes()


@pytest.mark.long
@pytest.mark.skipif(not llama_cpp.is_installed(), reason="xllamacpp is not installed")
def test_llama_cpp_proves_base_and_adapter_at_export(short_smollm2_file, tmp_path):
    values, tokenizer = load(short_smollm2_file, load_in_4bit=False)
    save_merged(values, tmp_path / "base", tokenizer, verify=False)
    model, tokenizer = load(tmp_path / "base", train_for="q4_k_m")
    model = adapted(model, scale=0.02).eval()
    report = save_gguf_adapter(model, tmp_path / "apart", tokenizer=tokenizer)["report"]
    found = {check.name: check for check in report.checks}
    assert report.passed
    assert found["greedy answers in llama.cpp"].figures["same_tokens"] >= 188
    assert found["probabilities in llama.cpp"].passed


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "method", "sizes"),
    [
        ("llama", "q4_k_m", SIZES),
        ("qwen3_moe", "q4_k_m", EXPERTS),
        ("gpt_oss", "q8_0", {}),
        ("granitemoe", "q5_0", {}),
    ],
)
def test_an_adapter_is_loaded_on_the_codes_again_and_proved_in_plain_peft(
    family, method, sizes, base, tmp_path
):
    model, tokenizer = load(base(family, **sizes), train_for=method)
    model = adapted(model).eval()
    with torch.no_grad():
        expected = model(ids_of()).logits
    report = save_merged(model, tmp_path, tokenizer, save_method="lora")
    assert {check.outcome for check in report.checks} <= {Outcome.EQUAL, Outcome.CLOSE}
    again, _ = load(tmp_path)
    assert again.get_base_model().oribi.identity.train_for == method
    with torch.no_grad():
        assert torch.equal(again.eval()(ids_of()).logits, expected)
    plain = dict(InTransformers(tmp_path)._model.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            assert torch.equal(plain[f"{name}.weight"], dense_weight(module.weight, torch.bfloat16))
    bare = {bare_name(name): weight for name, weight in plain.items()}
    for name, experts in expert_modules(model).items():
        for stack in STACKS:
            ours = stored_stack(experts, stack, dense_weight(getattr(experts, stack), torch.bfloat16))
            assert torch.equal(bare[f"{name}.{stack}"], ours)


def test_codes_of_another_method_than_the_adapter_learnt_on_are_noted(base, tmp_path):
    model, tokenizer = load(base(**SIZES), train_for="q4_k_m")
    save_merged(adapted(model), tmp_path, tokenizer, save_method="lora", verify=False)
    assert not any("was trained on" in note for note in load(tmp_path)[0].oribi.notes)
    found = load(tmp_path, train_for="q8_0")[0].oribi.notes
    assert any(
        "trained on q4_k_m (train_for) weights and is loaded on q8_0 (train_for) ones" in note
        for note in found
    )


@pytest.mark.parametrize(("family", "sizes"), [("llama", SIZES), ("qwen3_moe", EXPERTS)])
def test_memory_is_estimated_as_it_is_taken(family, sizes, base):
    folder = base(family, **sizes)
    model, _ = load(folder, train_for="q4_k_m")
    taken = sum(getattr(p, "packed", p).nbytes for p in model.parameters())
    known = architecture_of(str(folder), dtype=torch.float32, train_for="q4_k_m")
    assert known.weight_bytes(load_in_4bit=True) == taken


def test_every_method_keeps_the_codes_of_all_its_types():
    for method in KEPT_CODES:
        for width in (64, 256):
            sizes = {"hidden_size": width, "intermediate_size": 2 * width, "head_dim": 64}
            planned = planned_types(build(export_config("llama", **sizes)), method)
            kinds = {e[0].type.name for e in planned.entries.values()} - {"F32"}
            assert kinds <= set(BLOCK_TYPES), method
    assert set(KEPT_CODES) < set(METHODS)


REFUSED = {
    "full_finetuning": ({"full_finetuning": True, "load_in_4bit": False}, "no frozen weights"),
    "method": ({"train_for": "q3_k_m"}, "codes are not kept in memory; allowed are .*q4_k_m"),
    "nf4": ({"quantization_config": {"load_in_4bit": True}}, "contradict"),
    "labels": ({"num_labels": 2}, "classifier"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused(case, base):
    settings, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words):
        load(base(**SIZES), **{"train_for": "q4_0", **settings})


def test_a_gguf_file_is_refused(exported):
    with pytest.raises(ConfigError, match="leave train_for out"):
        load(exported("llama", "q4_k_m", **SIZES)[1], train_for="q4_k_m")


def test_a_tied_head_of_which_a_file_has_other_codes_is_refused(base):
    with pytest.raises(ConfigError, match="twice, as Q4_K and Q6_K"):
        load(base("olmo2", tie_word_embeddings=True, **SIZES), train_for="q4_k_m")


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        (
            ["--full_finetuning", "true", "--load_in_4bit", "false", "--save_method", "merged_16bit"],
            "train_for",
        ),
        (["--fsdp", "true"], "train_for"),
        (["--stage", "reward"], "train_for"),
        (["--keep_in_16bit", "o_proj"], "keep_in_16bit"),
        (["--use_dora", "true"], "use_dora"),
        (["--save_method", "gguf-adapter", "--new_tokens", "<a>"], "new_tokens"),
    ],
)
def test_settings_that_contradict_it_are_refused_with_the_config(flags, key):
    with pytest.raises(ConfigError, match=f"{key} = "):
        read_run_config(None, ["--model", "m", "--dataset", "d", "--train_for", "q4_k_m", *flags])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares a GPU's codes with a CPU's")
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_codes_of_a_gpu_are_those_of_a_cpu(kind):
    values = torch.randn(512, 2048, generator=torch.Generator().manual_seed(0)).bfloat16() * 0.02
    assert (encode(values, Type[kind]) == encode(values.cuda(), Type[kind])).all()
