"""A merged checkpoint, read back by plain transformers, computes what the adapted model computes, whatever was adapted."""

import json

import peft
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from oribi.errors import ConfigError, ExportError
from oribi.save.gguf import save_gguf
from oribi.save.merged import save_merged
from oribi.save.shards import shard_bytes
from oribi.save.trained import MergedModel
from tests.save.tiny_export import VOCAB, adapted, byte_level_tokenizer, export_config, tiny_model

IDS = torch.arange(20, 60)[None]
MERGES = {
    "lora": {},
    "rank pattern": {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"up_proj": 3}},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dropout": {"lora_dropout": 0.3},
    "all biases": {"bias": "all"},
    "lora bias": {"lora_bias": True},
    "modules to save": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "new tokens": {"trainable_token_indices": [3, 77, 200]},
    "embeddings and head": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "dora embeddings": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
}


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def reloaded(folder) -> torch.Tensor:
    return logits_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", MERGES)
def test_merged_model_in_transformers_equals_the_adapted_model(kind, tied, tmp_path):
    base = tiny_model(export_config("llama", tie_word_embeddings=tied))
    before = logits_of(base)
    tuned = adapted(base, **MERGES[kind])
    expected = logits_of(tuned)
    assert relative(before, expected) > 1e-3  # the adapter does something
    save_merged(tuned, tmp_path / "merged", dtype=torch.float32, verify=not tied)
    assert relative(reloaded(tmp_path / "merged"), expected) < 1e-5


@pytest.mark.parametrize("model_type", ["phi3", "gemma3_text", "qwen3", "granite"])
def test_families_merge(model_type, tmp_path):
    tuned = adapted(tiny_model(export_config(model_type)))
    save_merged(tuned, tmp_path / "merged", dtype=torch.float32)
    assert relative(reloaded(tmp_path / "merged"), logits_of(tuned)) < 1e-5


@pytest.mark.parametrize("second", ["lora", "dora"])
def test_several_active_adapters_add_up(second, tmp_path):
    tuned = adapted(tiny_model(export_config("llama")), use_dora=second == "dora")
    tuned.add_adapter(
        "more", LoraConfig(r=3, target_modules=["q_proj", "down_proj"], use_dora=second == "dora")
    )
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if ".more." in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    only_first = logits_of(tuned)
    tuned.base_model.set_adapter(["default", "more"])
    expected = logits_of(tuned.eval())
    assert relative(only_first, expected) > 1e-3
    save_merged(tuned, tmp_path / "merged", dtype=torch.float32)
    assert relative(reloaded(tmp_path / "merged"), expected) < 1e-5


def test_the_sum_is_rounded_once(tmp_path):
    tuned = adapted(tiny_model(export_config("llama")).to(torch.bfloat16))
    save_merged(tuned, tmp_path / "merged")
    written = load_file(tmp_path / "merged" / "model.safetensors")
    layer = tuned.base_model.model.model.layers[1].mlp.down_proj
    exact = layer.base_layer.weight.float() + layer.get_delta_weight("default").float()
    assert torch.equal(written["model.layers.1.mlp.down_proj.weight"], exact.to(torch.bfloat16))


def test_new_rows_of_a_larger_vocabulary_come_from_the_trained_model(tmp_path):
    save_merged(tiny_model(export_config("llama")), tmp_path / "base", dtype=torch.float32)
    model = tiny_model(export_config("llama"))
    model.resize_token_embeddings(export_config("llama").vocab_size + 5, mean_resizing=False)
    tuned = adapted(model, trainable_token_indices=[386, 388])
    save_merged(tuned, tmp_path / "merged", base=str(tmp_path / "base"), dtype=torch.float32)
    assert relative(reloaded(tmp_path / "merged"), logits_of(tuned)) < 1e-5
    assert json.loads((tmp_path / "merged/config.json").read_text())["vocab_size"] == 389


def test_shards_and_their_index_load(tmp_path):
    tuned = adapted(tiny_model(export_config("llama")))
    save_merged(
        tuned, tmp_path / "merged", byte_level_tokenizer(), max_shard_size="200KB", dtype=torch.float32
    )
    assert len(list((tmp_path / "merged").glob("model-*-of-*.safetensors"))) > 3
    assert relative(reloaded(tmp_path / "merged"), logits_of(tuned)) < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("the cat 12")["input_ids"] == byte_level_tokenizer()("the cat 12")["input_ids"]


def test_an_export_replaces_an_earlier_one_of_other_shards(tmp_path):
    first, second = (adapted(tiny_model(export_config("llama"), seed=seed)) for seed in (1, 2))
    save_merged(first, tmp_path / "merged", max_shard_size="200KB", dtype=torch.float32)
    (tmp_path / "merged" / "notes.txt").write_text("mine")
    save_merged(second, tmp_path / "merged", dtype=torch.float32)
    assert relative(reloaded(tmp_path / "merged"), logits_of(second)) < 1e-5
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert names == {
        "notes.txt", "model.safetensors", "config.json", "generation_config.json", "README.md", "export_report.json",
        "probes.json",
    }  # fmt: skip


def test_the_adapter_loads_in_plain_peft(tmp_path):
    tuned = adapted(tiny_model(export_config("llama")), use_rslora=True)
    save_merged(tuned, tmp_path / "adapter", byte_level_tokenizer(), save_method="lora")
    save_merged(tiny_model(export_config("llama")), tmp_path / "base", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    assert relative(logits_of(loaded), logits_of(tuned)) < 1e-5
    assert (tmp_path / "adapter" / "tokenizer.json").exists()


def test_another_models_checkpoint_is_no_base(tmp_path):
    save_merged(tiny_model(export_config("llama", intermediate_size=192)), tmp_path / "base")
    tuned = adapted(tiny_model(export_config("llama")))
    with pytest.raises(ExportError, match=r"is \(64, 192\) in the base and \(64, 128\) in the trained"):
        save_merged(tuned, tmp_path / "merged", base=str(tmp_path / "base"))
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_a_missing_original_says_how_to_get_it(tmp_path):
    tuned = adapted(tiny_model(export_config("llama")))
    tuned.config._name_or_path = "someone/somewhere"
    with pytest.raises(ExportError, match="not on this machine. Give base='dequantized'"):
        save_merged(tuned, tmp_path / "merged", base="original")


def test_a_folder_of_another_kind_is_no_base(tmp_path):
    tuned = adapted(tiny_model(export_config("llama")))
    with pytest.raises(ExportError, match="cannot serve as base of a merge: .* neither config.json nor"):
        save_merged(tuned, tmp_path / "merged", base=str(tmp_path))


def test_merged_adapters_are_refused():
    tuned = adapted(tiny_model(export_config("llama")))
    tuned.merge_adapter()
    with pytest.raises(ExportError, match="unmerge_adapter"):
        MergedModel(tuned)


def test_adapters_of_other_kinds_are_refused():
    tuned = peft.get_peft_model(
        tiny_model(export_config("llama")), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    )
    with pytest.raises(ExportError, match="save_method='lora'"):
        MergedModel(tuned)


def test_a_value_beyond_float16_is_refused(tmp_path):
    tuned = adapted(tiny_model(export_config("llama")))
    with torch.no_grad():
        tuned.base_model.model.model.norm.weight[3] = 1e5
    with pytest.raises(ExportError, match="model.norm.weight has a value that passes the range"):
        save_merged(tuned, tmp_path / "merged", dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_unknown_arguments_are_named(tmp_path):
    model = tiny_model(export_config("llama"))
    with pytest.raises(ConfigError, match="save_method = 'merged_8bit'; expected one of merged_16bit"):
        save_merged(model, tmp_path, save_method="merged_8bit")
    with pytest.raises(ExportError, match="this model has none"):
        save_merged(model, tmp_path, save_method="lora")
    with pytest.raises(ConfigError, match="max_shard_size = 'large'"):
        save_merged(model, tmp_path, max_shard_size="large")


def test_sizes_are_read_as_people_write_them():
    assert [shard_bytes(size) for size in ("5GB", "1.5 MB", "2GiB", 77)] == [5 * 10**9, 1500000, 2 << 30, 77]


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox"])
def test_models_outside_the_family_table_merge_too(model_type, settings, tmp_path):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB}
    config = AutoConfig.for_model(model_type, intermediate_size=128, **sizes)
    base = AutoModelForCausalLM.from_config(config).eval()
    targets = {"gpt2": ["c_attn", "c_proj"], "gpt_neox": ["query_key_value", "dense"]}[model_type]
    tuned = adapted(base, target_modules=targets, fan_in_fan_out=model_type == "gpt2", **settings)
    report = save_merged(tuned, tmp_path / "merged", byte_level_tokenizer(), dtype=torch.float32)
    assert relative(reloaded(tmp_path / "merged"), logits_of(tuned)) < 1e-5
    assert report.checks[0].figures["kl"] < 1e-6


def test_a_family_without_a_gguf_layout_is_named(tmp_path):
    config = AutoConfig.for_model("gpt2", n_embd=64, n_layer=1, n_head=4, vocab_size=VOCAB)
    with pytest.raises(ExportError, match="no GGUF for model_type 'gpt2'; it writes llama, mistral"):
        save_gguf(AutoModelForCausalLM.from_config(config), tmp_path, byte_level_tokenizer())
