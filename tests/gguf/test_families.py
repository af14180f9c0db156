"""Every family's GGUF file, written in Python alone, says in llama.cpp what the trained model says."""

import re

import gguf
import pytest
import torch
from transformers import GenerationConfig

from oribi.errors import ExportError
from oribi.families import FAMILIES
from oribi.gguf.file import GGUFFile
from oribi.gguf.llama_cpp import LlamaCpp
from oribi.models.open import open_model
from oribi.save.gguf import save_gguf, save_gguf_adapter
from tests.models.tiny import ROPES
from tests.save.tiny_export import (
    EXPORTED,
    FAMILY_CHANGES,
    Distance,
    adapted,
    byte_level_tokenizer,
    distance_from_llama_cpp,
    export_config,
    pieces_of,
    tiny_model,
)

pytest.importorskip("xllamacpp", reason="llama.cpp judges these files")
PROMPT = list(range(20, 60))  # longer than the tiny windows


def test_every_family_with_a_gguf_layout_is_tested():
    assert set(FAMILY_CHANGES) == {name for name, family in FAMILIES.items() if family.gguf is not None}


def judged(exported) -> Distance:
    model, file = exported
    return distance_from_llama_cpp(model, file, PROMPT)


@pytest.mark.parametrize("model_type", EXPORTED)
def test_llama_cpp_computes_each_family_as_trained(model_type, exported):
    found = judged(exported(model_type, pieces=pieces_of(model_type)))
    assert found.agreeing == 1.0
    # llama.cpp looks GELU up in a float16 table
    assert found.worst < (2e-2 if model_type.startswith("gemma") else 2e-3)


@pytest.mark.parametrize("model_type", EXPORTED)
def test_the_gguf_package_lists_every_tensor_of_a_file(model_type, exported):
    _, file = exported(model_type, pieces=pieces_of(model_type))
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if (architecture := numbers.get(FAMILIES[model_type].gguf.architecture)) is None:
        pytest.skip("this version of the package knows no such architecture, which llama.cpp has")
    listed = {gguf.TENSOR_NAMES[kind].format(bid="N") for kind in gguf.MODEL_TENSORS[architecture]}
    stems = {re.sub(r"^blk\.\d+", "blk.N", name) for name in GGUFFile(file).tensors}
    assert {re.sub(r"\.(weight|bias|scale)$", "", stem) for stem in stems} <= listed


@pytest.mark.parametrize("model_type", ["qwen3_5_text", pytest.param("gemma4_text", marks=pytest.mark.long)])
def test_an_adapter_acts_in_llama_cpp_as_trained(model_type, tmp_path):
    model = tiny_model(export_config(model_type))
    base = save_gguf(model, tmp_path / "base", byte_level_tokenizer(), "f32", verify=False)["gguf_files"][0]
    linears = {name.rpartition(".")[2] for name, one in model.named_modules() if type(one) is torch.nn.Linear}
    model = adapted(model, target_modules=sorted(linears - {"lm_head", "per_layer_model_projection"}))
    adapter = save_gguf_adapter(model, tmp_path / "lora", "f32")["gguf_files"][0]
    found = distance_from_llama_cpp(model, base, PROMPT, adapter=adapter)
    assert found.agreeing == 1.0
    assert found.worst < (2e-2 if model_type.startswith("gemma") else 2e-3)
    assert distance_from_llama_cpp(model, base, PROMPT).worst > 0.1


def test_tokens_that_a_model_never_says_are_not_said_in_llama_cpp(tmp_path):
    model = adapted(tiny_model(export_config("llama")))
    base = model.get_base_model()

    def answer() -> list[int]:
        return model.generate(torch.tensor([PROMPT]), max_new_tokens=6, do_sample=False)[
            0, len(PROMPT) :
        ].tolist()

    base.generation_config = GenerationConfig(eos_token_id=2)
    said = answer()
    base.generation_config = GenerationConfig(eos_token_id=2, suppress_tokens=said[:3])
    saved = save_gguf(model, tmp_path, byte_level_tokenizer(), "f32", held_out=["the red fox", "a cat sits"])
    assert saved["report"].passed
    assert LlamaCpp(saved["gguf_files"][0], 256).generate(PROMPT, 6).tokens == answer() != said
    assert open_model(saved["gguf_files"][0]).generation.suppress_tokens == said[:3]


def test_an_adapter_that_llama_cpp_does_not_apply_is_refused(tmp_path):
    model = adapted(
        tiny_model(export_config("gemma4_text")), target_modules=["q_proj", "per_layer_model_projection"]
    )
    with pytest.raises(ExportError, match="no LoRA update to model.per_layer_model_projection.weight"):
        save_gguf_adapter(model, tmp_path)


@pytest.mark.slow
def test_llama_cpp_leaves_out_the_rotation_where_a_deep_exaone_does(exported):
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    found = judged(exported("exaone4", num_hidden_layers=64, layer_types=kinds * 16, sliding_window=4096))
    assert found.agreeing == 1.0
    assert found.worst < 2e-3


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn", "longrope", "dynamic"])
def test_llama_cpp_computes_each_rope_as_trained(kind, exported):
    found = judged(exported(rope_parameters=ROPES[kind], max_position_embeddings=64))
    assert found.agreeing == 1.0
    assert found.worst < 2e-3


def test_a_family_with_tied_embeddings_has_no_output_tensor(exported):
    found = judged(exported(tie_word_embeddings=True))
    assert found.agreeing == 1.0
    assert found.worst < 2e-3


@pytest.mark.parametrize(
    ("model_type", "changes", "words"),
    [
        ("gemma2", {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar is 32"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 1]}, "every 4th layer"),
        ("qwen3", {"rope_parameters": ROPES["llama3"]}, "no llama3 RoPE"),
        ("exaone4", {"sliding_window": 5}, "models of 64 layers have windows, and no others"),
        ("granitemoehybrid", {"position_embedding_type": None}, "every layer is rotated"),
        ("seed_oss", {"mlp_bias": True}, "no place for model.layers.0.mlp.gate_proj.bias"),
        (
            "olmo3",
            {
                "rope_parameters": {
                    kind: {"rope_type": "default", "rope_theta": theta}
                    for kind, theta in (("full_attention", 1e4), ("sliding_attention", 1e3))
                }
            },
            "sliding layers have the base of the others, 10000",
        ),
        (
            "ministral3",
            {"rope_parameters": {**ROPES["yarn"], "mscale": 0.5, "mscale_all_dim": 0.5}},
            "YaRN without mscale",
        ),
        (
            "llama",
            {"rope_parameters": {**ROPES["yarn"], "beta_fast": 4.0}},
            "YaRN with beta_fast 32 and beta_slow 1, not 4 and 1",
        ),
        ("qwen3_5_text", {"linear_value_head_dim": 32}, "values have as many dimensions as those of keys"),
        (
            "qwen3_5_text",
            {"layer_types": ["linear_attention", "full_attention", "full_attention", "linear_attention"]},
            "every 2th layer, and no other, is full_attention",
        ),
        ("gemma4_text", {"vocab_size_per_layer_input": 320}, "inputs for all 384 tokens, not for 320"),
        (
            "gemma4_unified_text",
            {"layer_types": ["sliding_attention", "full_attention"] * 4},
            "read those of the last two layers that have them",
        ),
        ("olmo2", {"attention_bias": True}, "no place for model.layers.0.self_attn.o_proj.bias"),
        ("ernie4_5_moe", {"moe_layer_interval": 2}, "every layer after the first dense ones has experts"),
        ("ernie4_5_moe", {"moe_norm_min": 0.1}, r"taken for at least 6.1e-05 \(moe_norm_min\)"),
    ],
)
def test_what_llama_cpp_would_compute_differently_is_refused(model_type, changes, words, tmp_path):
    model = tiny_model(export_config(model_type, **changes))
    with pytest.raises(ExportError, match=words):
        save_gguf(model, tmp_path, byte_level_tokenizer(), "f32", verify=False)
    assert not list(tmp_path.iterdir())


def test_a_window_that_llama_cpp_ignores_is_reported(tmp_path):
    model = tiny_model(export_config("mistral", sliding_window=64))
    notes = save_gguf(model, tmp_path, byte_level_tokenizer(), "f32", verify=False)["report"].notes
    assert notes == ["llama.cpp ignores this model's window: answers differ beyond 64 tokens of context"]


def test_a_weight_that_is_not_finite_stops_the_export(tmp_path):
    model = tiny_model(export_config("llama")).requires_grad_(False)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(
        ExportError, match=r"model.layers.2.mlp.up_proj.weight has a value that is not finite"
    ):
        save_gguf(model, tmp_path / "out", byte_level_tokenizer(), "f32", verify=False)
    assert not list(tmp_path.iterdir())
