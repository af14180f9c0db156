"""Any value in any field of a model's or an adapter's JSON files loads, or ends in one line that names the file, soon.

A sample of fields and values with a fixed seed; ORIBI_FUZZ=20000 takes all of them.
"""

import copy
import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from oribi import FastLanguageModel
from oribi.errors import ModelError, OribiError
from oribi.lora.contents import read_adapter
from oribi.memory.architecture import architecture_of
from oribi.models.files import HubOptions, locate, open_weights
from oribi.models.open import open_model
from oribi.tensors import TensorSource
from tests.models.tiny_checkpoint import checkpoint, edit_config

SAMPLE = int(os.environ.get("ORIBI_FUZZ", 25))
BAD = (
    0, -1, 3, 0.5, 1e308, 10**9, 10**12, "text", "", True, None, [], [1], {}, {"a": 1}, float("nan"), float("inf"),
    [[[]]], "\x00é", ["a", "a"],
)  # fmt: skip
# fields that real files have beside those of the tiny ones
MORE = {
    "config.json": (
        "attn_implementation", "_attn_implementation", "quantization_config", "rope_scaling", "rope_theta", "text_config",
        "sliding_window", "torch_dtype", "layer_types", "auto_map", "head_dim", "experts_implementation",
    ),
    "generation_config.json": (
        "temperature", "top_p", "top_k", "max_length", "num_beams", "do_sample", "suppress_tokens", "bad_words_ids",
        "repetition_penalty", "cache_implementation", "eos_token_id",
    ),
    "tokenizer_config.json": (
        "chat_template", "padding_side", "added_tokens_decoder", "extra_special_tokens", "additional_special_tokens",
    ),
    "tokenizer.json": (),
    "adapter_config.json": (),
}  # fmt: skip


def load(folder: Path) -> tuple[Any, Any]:
    return FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, dtype="float32", load_in_4bit=False, device_map="cpu"
    )


def use(folder: Path) -> None:
    """Loads a model, answers with it, and shows it without its weights."""
    model, tokenizer = load(folder)
    batch = tokenizer("hello", return_tensors="pt")
    model.eval()
    with torch.no_grad():
        model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=2)
    open_model(str(folder)).tokenizer()
    architecture_of(str(folder))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with a tiny model of some families, and an adapter of one of them."""
    root = tmp_path_factory.mktemp("models")
    for family in ("llama", "gemma3_text", "smollm3", "muse_glimmer_text", "cohere2"):
        checkpoint(root / family, family)
    model, tokenizer = load(root / "llama")
    model = FastLanguageModel.get_peft_model(model, r=2, target_modules=["q_proj", "v_proj"])
    model.save_pretrained(root / "adapter")
    return root


def fields(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every field, also of inner ones."""
    items = (
        value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    )
    for key, inner in items:
        yield (*path, key)
        yield from fields(inner, (*path, key))


def changed(whole: Any, path: tuple, value: Any) -> Any:
    found = target = copy.deepcopy(whole)
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return found


@pytest.mark.parametrize(
    ("family", "name"),
    [(family, "config.json") for family in ("llama", "gemma3_text", "smollm3")]
    + [("llama", name) for name in MORE if "config.json" not in name or name.startswith(("gen", "tok"))]
    + [("adapter", "adapter_config.json")],
)  # fmt: skip
def test_any_value_of_any_field_loads_or_is_named(models, tmp_path, family, name):
    folder = shutil.copytree(models / family, tmp_path / family)
    file = folder / name
    whole = json.loads(file.read_text())
    paths = [*fields(whole), *((key,) for key in MORE[name] if key not in whole)]
    cases = [(path, value) for path in paths for value in BAD]
    for path, value in random.Random(name).sample(cases, min(SAMPLE, len(cases))):
        file.write_text(json.dumps(changed(whole, path, value)))
        started = time.process_time()
        said = name
        try:
            if family == "adapter":
                load(folder)
                read_adapter(str(folder))
            else:
                use(folder)
        except OribiError as error:
            said = str(error)
        assert name in said or "base_model" in said, (path, value, said)
        assert len(said) < 2500
        assert time.process_time() - started < 30, (path, value)


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"]
)
@pytest.mark.parametrize(
    "content", [b"", b"[]", b"3", b"[" * 100_000, b"\xff\xfe{}", b'{"a": ', b"9" * 5000], ids=range(7)
)
def test_a_file_that_is_no_json_object_is_named(models, tmp_path, name, content):
    folder = shutil.copytree(models / "llama", tmp_path / "llama")
    (folder / name).write_bytes(content)
    with pytest.raises(ModelError, match=name):
        load(folder)


def test_a_json_file_with_a_byte_order_mark_is_read(models, tmp_path):
    folder = shutil.copytree(models / "llama", tmp_path / "llama")
    file = folder / "generation_config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    load(folder)


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("llama", {"num_attention_heads": 0}, "num_attention_heads = 0: must be a whole number"),
        ("llama", {"num_attention_heads": 3}, "multiple"),
        ("llama", {"head_dim": 15}, "head_dim"),
        ("llama", {"num_key_value_heads": 3}, "num_attention_heads = 4 is no multiple of num_key_value_heads = 3"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000: must be a whole number from 1 to 4,096"),
        ("llama", {"num_hidden_layers": 4000}, "the files hold 4 layers"),
        ("llama", {"vocab_size": 10**12}, "vocab_size = 1000000000000: must be"),
        ("llama", {"vocab_size": 10**9}, "the files' embeddings are [384, 64]"),
        ("llama", {"vocab_size": "text"}, "vocab_size"),
        ("llama", {"hidden_act": ["silu"]}, "hidden_act"),
        ("llama", {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "spiral"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 0.0, "rope_theta": 1e4}}, "rope"),
        ("llama", {"max_position_embeddings": 0}, "max_position_embeddings = 0"),
        ("llama", {"eos_token_id": "</s>"}, "eos_token_id"),
        ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ("llama", {"quantization_config": []}, "quantization_config"),
        ("llama", {"rms_norm_eps": 0.0}, "rms_norm_eps = 0.0: must be a number above 0"),
        ("llama", {"dtype": "int8"}, "dtype = 'int8' is no float type"),
        ("llama", {"model_type": "lama"}, "did you mean llama?"),
        ("gemma3_text", {"layer_types": ["full_attention"]}, "layer_types"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers: must be 0 or 1 for each of 4 layers"),
        ("muse_glimmer_text", {"layer_rope_theta": [1e4]}, "layer_rope_theta: must be a base, or 0 for each of 4 layers"),
        ("cohere2", {"logit_scale": 0.0}, "logit_scale = 0.0: must be a number other than 0"),
    ],
)  # fmt: skip
def test_a_config_that_no_network_can_have_is_refused_before_it_is_built(
    models, tmp_path, family, changes, says
):
    folder = shutil.copytree(models / family, tmp_path / family)
    edit_config(folder, **changes)
    started = time.process_time()
    with pytest.raises(ModelError) as error:
        load(folder)
    assert "config.json" in str(error.value)
    assert says in str(error.value)
    assert time.process_time() - started < 10


def test_ids_of_no_token_are_dropped_with_a_note(models, tmp_path):
    folder = shutil.copytree(models / "llama", tmp_path / "llama")
    edit_config(folder, pad_token_id=-1)
    assert "pad_token_id of config.json: -1 is none of 384 tokens; not used" in load(folder)[0].oribi.notes


@pytest.mark.parametrize("kernel", ["flash_attention_2", "flash_attention_3", "someone/kernels"])
def test_attention_named_by_a_config_is_not_followed_and_said(models, tmp_path, kernel):
    folder = shutil.copytree(models / "llama", tmp_path / "llama")
    edit_config(folder, _attn_implementation=kernel)
    model, _ = load(folder)
    assert model.config._attn_implementation != kernel
    assert any("_attn_implementation of config.json: not followed" in note for note in model.oribi.notes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "LORRA"}, "peft_type = 'LORRA': PEFT knows no such adapter; did you mean LORA?"),
        ({"target_modules": "(q_proj"}, "not a regular expression"),
        ({"target_modules": "(([a-z._0-9]+)+)+!"}, "not matched within"),
        ({"rank_pattern": {"(([a-z._0-9]+)+)+!": 2}}, "not matched within"),
        ({"rank_pattern": {"[": 2}}, "not a regular expression"),
        ({"lora_alpha": 1e300}, "lora_alpha = 1e+300: must be a number from -1e6 to 1e6"),
        ({"trainable_token_indices": [10**6]}, "token 1000000, and the base has 384 rows"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"r": "8"}, "r = '8': must be a whole number"),
        ({"base_model_name_or_path": "x" * 300}, "no possible name of a model"),
    ],
    ids=range(10),
)
def test_an_adapters_settings_are_refused_by_name(models, tmp_path, monkeypatch, changes, says):
    monkeypatch.setattr("oribi.models.adapter_config._SECONDS", 1.0)
    folder = shutil.copytree(models / "adapter", tmp_path / "adapter")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ModelError) as error:
        load(folder)
    assert "adapter_config.json" in str(error.value)
    assert says in str(error.value)


@pytest.mark.parametrize("content", [b"[]", b'{"r": 8', b"\xff"])
def test_an_adapter_config_that_is_no_object_is_refused_wherever_it_is_read(models, tmp_path, content):
    folder = shutil.copytree(models / "adapter", tmp_path / "adapter")
    (folder / "adapter_config.json").write_bytes(content)
    for read in (
        lambda: load(folder),
        lambda: read_adapter(str(folder)),
        lambda: open_model(str(folder)).tokenizer(),
    ):
        with pytest.raises(ModelError, match=r"adapter_config\.json"):
            read()


@pytest.fixture
def sharded(tmp_path) -> Path:
    """A model in two shards, with an index."""
    checkpoint(tmp_path, shard_size="200KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    return tmp_path


def source_of(folder: Path) -> TensorSource:
    return open_weights(locate(str(folder), HubOptions()), HubOptions())


def test_a_tensor_in_two_shards_is_read_where_the_index_says(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    name, home = next(iter(index.items()))
    expected = load_file(sharded / home)[name]
    for other in set(index.values()) - {home}:
        tensors = load_file(sharded / other)
        save_file({**tensors, name: torch.full_like(expected, 9.0)}, sharded / other, {"format": "pt"})
    assert torch.equal(source_of(sharded).read(name, torch.device("cpu"), None), expected)


def test_a_tensor_that_the_index_names_in_vain_is_missed(sharded):
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.layers.0.extra"] = next(iter(index["weight_map"].values()))
    file.write_text(json.dumps(index))
    with pytest.raises(
        ModelError, match=r"1 tensors are missing that the index looks for in it, model\.layers\.0\.extra"
    ):
        source_of(sharded)


def test_a_tensor_in_two_files_without_an_index_is_refused(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    first = sorted(sharded.glob("model-*.safetensors"))[0]
    shutil.copy(first, sharded / "copy.safetensors")
    with pytest.raises(ModelError, match="no index says which counts"):
        source_of(sharded)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_file_that_may_not_be_read_is_named(models, tmp_path, name):
    folder = shutil.copytree(models / "llama", tmp_path / "llama")
    (folder / name).chmod(0)
    with pytest.raises(ModelError, match=name):
        load(folder)


@pytest.mark.parametrize("name", ["x" * 300, "~nobody-of-this-name/model", "a\0b", "\udcff/x"])
def test_a_name_that_no_file_can_have_is_refused(name):
    with pytest.raises(ModelError):
        load(name)
