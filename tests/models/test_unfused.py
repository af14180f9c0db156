"""Of a model outside the family table it is said, and estimated, what stays in 16 bits under load_in_4bit."""

import json

import bitsandbytes as bnb
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from oribi.errors import ConfigError, ModelError
from oribi.kernels.nf4 import nf4_bytes
from oribi.lora.attach import attach_lora
from oribi.models.load import load_model
from oribi.models.unfused import sizes_of_config
from oribi.save.merged import save_merged
from oribi.train.arguments import SFTConfig
from oribi.train.trainer import SFTTrainer
from tests.save.test_adapter_files import logits, move
from tests.save.tiny_export import byte_level_tokenizer

SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 384,
    "intermediate_size": 64,
}  # fmt: skip
EXPERTS = {
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 4},
    # a clamp that no kernel has
    "gpt_oss": {
        "num_local_experts": 4,
        "head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "swiglu_limit": 5.0,
    },
}


def tiny(model_type: str):
    return AutoConfig.for_model(model_type, **SIZES, **EXPERTS.get(model_type, {}))


@pytest.mark.parametrize("model_type", [*EXPERTS, "gpt_neox"])
def test_the_sizes_of_a_config_are_those_of_the_loaded_model(model_type, tmp_path):
    config = tiny(model_type)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte_level_tokenizer().save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), dtype=torch.float32)
    estimated = sizes_of_config(config).parts(4, load_in_4bit=True)
    packed = kept = experts = 0
    for name, parameter in model.named_parameters():
        if isinstance(parameter, bnb.nn.Params4bit):
            packed += parameter.quant_state.shape.numel()
        elif "expert" in name:
            experts += parameter.nbytes
        else:
            kept += parameter.nbytes
    assert packed > 0
    assert estimated == {
        "linear layers": nf4_bytes(packed), "experts": experts, "embeddings and other weights": kept
    }  # fmt: skip
    note = next(note for note in model.oribi.notes if note.startswith("load_in_4bit: "))
    assert "stay in 32 bits" in note
    assert ("not experts" in note) == bool(experts) == (model_type in EXPERTS)


_LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "n_group": 1,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "topk_group": 1, "num_key_value_heads": 4,
}  # fmt: skip
OTHERS = {
    "biogpt": {"num_key_value_heads": None},  # a head tied under a name of its own
    "jetmoe": {"num_local_experts": 4, "kv_channels": 16},  # a class that cannot compute its layers again
    # one without a longest text
    "xlnet": {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128, "vocab_size": 384},
    "apertus": {},  # parameters of no dimension
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 384},  # weights that lie transposed
    # kernels that read weights by themselves, and none of the usual names
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "num_key_value_heads": None},
    "deepseek_v3": _LATENT,  # rows that a CPU computes wrongly in NF4
    # experts by the usual names, which PEFT adapts as stacks; of the last with matrices [in, out]
    "olmoe": EXPERTS["olmoe"],
    "llama4_text": {"intermediate_size_mlp": 128, "num_local_experts": 4, "head_dim": 16},
}


def settings_of(model_type: str) -> dict:
    return {name: value for name, value in {**SIZES, **OTHERS[model_type]}.items() if value is not None}


@pytest.mark.parametrize("model_type", [pytest.param(name, marks=pytest.mark.long) for name in OTHERS])
def test_any_class_of_transformers_trains_in_4_bits_and_is_saved_as_trained(model_type, tmp_path):
    config = AutoConfig.for_model(model_type, **settings_of(model_type))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    byte_level_tokenizer().save_pretrained(tmp_path / "base")
    model, tokenizer = load_model(str(tmp_path / "base"), dtype=torch.float32, max_seq_length=64)
    said = [note for note in model.oribi.notes if note.startswith("load_in_4bit: ")]
    assert len(said) == 1
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    model = attach_lora(model, r=4)
    said = [note for note in model.oribi.notes if note.startswith("gradient checkpointing: ")]
    assert bool(said) is (model_type in ("jetmoe", "xlnet"))
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"text": "the red fox runs over old hills"}] * 4),
        args=SFTConfig(output_dir=str(tmp_path / "run"), max_steps=1, report_to="none", save_strategy="no"),
    )
    assert trainer.train().training_loss > 0
    assert any(p.detach().abs().sum() > 0 for name, p in model.named_parameters() if "lora_B" in name)
    move(model)
    expected = logits(model)
    save_merged(model, tmp_path / "merged", tokenizer, dtype="float32", held_out=["a red fox"])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (logits(merged) - expected).abs().max() < 1e-4
    # the adapter, in plain PEFT on the 16-bit checkpoint
    model, _ = load_model(str(tmp_path / "base"), dtype=torch.float32, max_seq_length=64, load_in_4bit=False)
    before = logits(model)
    model = attach_lora(model, r=4)
    move(model)
    assert ((expected := logits(model)) - before).abs().max() > 0.02
    model.save_pretrained(str(tmp_path / "adapter"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert (logits(PeftModel.from_pretrained(plain, tmp_path / "adapter")) - expected).abs().max() < 1e-4


_STATES = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}
STATE_SPACES = {
    "granitemoehybrid": {**_STATES, "num_local_experts": 0, "shared_intermediate_size": 64, "layer_types": ["mamba", "attention"]},
    "falcon_h1": {**_STATES, "mamba_d_ssm": 128},
    "nemotron_h": {
        "num_hidden_layers": None, "layers_block_type": ["mamba", "mlp", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 16,
        "ssm_state_size": 16,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=pytest.mark.long if name != "granitemoehybrid" else ())
        for name in STATE_SPACES
    ],
)
def test_a_weight_that_kernels_read_by_themselves_is_neither_packed_nor_adapted(model_type, tmp_path):
    settings = {**SIZES, **STATE_SPACES[model_type]}
    config = AutoConfig.for_model(model_type, **{k: v for k, v in settings.items() if v is not None})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte_level_tokenizer().save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), dtype=torch.float32, max_seq_length=64)
    packed = {
        name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)
    }
    assert {"in_proj", "q_proj"} <= packed
    assert "out_proj" not in packed
    sizes = sizes_of_config(config)
    assert sizes.packed == sum(
        m.weight.quant_state.shape.numel() for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)
    )
    adapted = attach_lora(model, r=4, target_modules="all-linear")
    on = {
        name.split(".lora_A")[0].rpartition(".")[2]
        for name, _ in adapted.named_parameters()
        if "lora_A" in name
    }
    assert on == packed
    model, _ = load_model(str(tmp_path), dtype=torch.float32, max_seq_length=64)
    adapted = attach_lora(model, r=4, target_modules=["q_proj", "in_proj", "out_proj"])
    assert not any("out_proj.lora" in name for name, _ in adapted.named_parameters())
    assert any(note.startswith("out_proj stays as it is") for note in adapted.oribi.notes)


def test_a_longest_text_is_asked_for_where_a_model_names_none(tmp_path):
    config = AutoConfig.for_model("bloom", hidden_size=64, n_layer=1, n_head=4, vocab_size=384)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte_level_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="this bloom model names no longest text; give it"):
        load_model(str(tmp_path), dtype=torch.float32, max_seq_length=None)


@pytest.mark.parametrize(
    ("model_type", "words"),
    [("musicgen", "which of its parts is the text model cannot be told"), ("pi0", "does not answer in text")],
)
def test_a_composite_model_that_is_no_language_model_is_refused_in_one_line(model_type, words, tmp_path):
    config = {"model_type": model_type}
    if model_type == "musicgen":
        config |= {"text_encoder": {"model_type": "t5"}, "audio_encoder": {"model_type": "encodec"},
                   "decoder": {"model_type": "musicgen_decoder"}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"none": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    byte_level_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=words) as error:
        load_model(str(tmp_path), dtype=torch.float32)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A tiny gpt_neox and its tokenizer."""
    folder = tmp_path_factory.mktemp("gpt_neox")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny("gpt_neox")).save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


DENSE = "gpt_neox.layers.1.attention.dense.weight"
NORM = "gpt_neox.final_layer_norm.weight"
CHANGES = {
    "a linear layer missing": (lambda t, c: t.pop(DENSE), f"1 missing: {DENSE}"),
    "a linear layer of another shape": (
        lambda t, c: t.update({DENSE: torch.zeros(64, 128)}),
        rf"1 of another shape: {DENSE}: \[64, 128\], expected \[64, 64\]",
    ),
    "a norm of another shape": (
        lambda t, c: t.update({NORM: torch.zeros(32)}),
        rf"1 of another shape: {NORM}: \[32\], expected \[64\]",
    ),
    "three layers missing": (
        lambda t, c: c.update(num_hidden_layers=5), r"36 missing: gpt_neox\.layers\.2\.attention\.dense\.bias",
    ),
    "a wider model in config.json": (lambda t, c: c.update(intermediate_size=128), "6 of another shape: .*128"),
    "every name under another prefix": (
        lambda t, c: [t.update({f"other.{name}": t.pop(name)}) for name in list(t)], "28 missing",
    ),
}  # fmt: skip


def changed(stored, folder, change):
    tensors, config = (
        load_file(stored / "model.safetensors"),
        json.loads((stored / "config.json").read_text()),
    )
    for file in stored.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("load_in_4bit", [True, False])
@pytest.mark.parametrize("name", CHANGES)
def test_a_tensor_that_is_missing_or_of_another_shape_is_an_error_that_names_it(
    name, load_in_4bit, stored, tmp_path
):
    change, message = CHANGES[name]
    with pytest.raises(ModelError, match=message):
        load_model(changed(stored, tmp_path, change), dtype=torch.float32, load_in_4bit=load_in_4bit)


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_tensors_that_the_model_does_not_use_are_named_once(load_in_4bit, stored, tmp_path):
    def add(tensors, config):
        tensors["gpt_neox.layers.1.extra.weight"] = torch.zeros(3)
        tensors["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.zeros(8)  # as older checkpoints do

    model, _ = load_model(changed(stored, tmp_path, add), dtype=torch.float32, load_in_4bit=load_in_4bit)
    notes = [note for note in model.oribi.notes if "not used by" in note]
    assert notes == [
        "1 tensors of the checkpoint are not used by GPTNeoXForCausalLM: gpt_neox.layers.1.extra.weight"
    ]


@pytest.mark.parametrize("kind", ["cut short", "no safetensors", "a value of another type"])
def test_damaged_weights_or_configs_outside_the_table_are_one_message(kind, stored, tmp_path):
    folder = changed(stored, tmp_path, lambda t, c: c.update(hidden_act=7) if "type" in kind else None)
    file = tmp_path / "model.safetensors"
    if kind == "cut short":
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "no safetensors":
        file.write_bytes(b"version https://git-lfs")
    with pytest.raises(ModelError, match="gpt_neox model: |hidden_act"):
        load_model(folder, dtype=torch.float32)
