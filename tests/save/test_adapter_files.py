"""What is saved as an adapter acts in plain PEFT on the class that users load, or is refused."""

import json
import re
import shutil
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from oribi.compat.language_model import FastLanguageModel
from oribi.errors import ExportError, ModelError
from oribi.lora.contents import read_adapter
from oribi.models.adapter_files import RECORD_FILE
from oribi.models.wrapper import class_named
from oribi.save.check import Outcome
from oribi.save.gguf import save_gguf_adapter
from oribi.train.arguments import SFTConfig
from oribi.train.trainer import SFTTrainer
from tests.models.tiny_checkpoint import checkpoint
from tests.save.tiny_export import byte_level_tokenizer

IDS = torch.arange(3, 43)[None]
LOAD = {"dtype": "float32", "device_map": "cpu", "max_seq_length": 64}
TEXT = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
VISION = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 16, "patch_size": 8}  # fmt: skip
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 8,
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
YARN = {
    "rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 8, "rope_theta": 1e4, "mscale": 1.0,
    "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5,
}  # fmt: skip
WRAPPERS = {
    "gemma3": {"text_config": {**TEXT, **SLIDING}, "vision_config": VISION, "mm_tokens_per_image": 4},
    "mistral3": {
        "text_config": {**TEXT, "model_type": "ministral3", "rope_parameters": YARN},
        "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 32},
    },
    "llava": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**VISION, "model_type": "clip_vision_model"},
    },
    "llava_onevision": {
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": {**VISION, "model_type": "siglip_vision_model"},
    },
    "internvl": {
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": {**VISION, "image_size": [16, 16], "patch_size": [8, 8]},
    },
    "qwen2_5_vl": {"text_config": {**TEXT, **MROPE}, "vision_config": {**QWEN_VISION, "window_size": 16}},
    "qwen3_vl": {
        "text_config": {**TEXT, **MROPE},
        "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    },
    "paligemma": {
        "text_config": {**TEXT, "model_type": "gemma"},
        "vision_config": {**VISION, "model_type": "siglip_vision_model"},
    },
    "aya_vision": {
        "text_config": {**TEXT, **SLIDING, "model_type": "cohere2"},
        "vision_config": {**VISION, "model_type": "siglip_vision_model"},
    },
    "mllama": {
        "text_config": {**TEXT, "cross_attention_layers": [1]},
        "vision_config": {**VISION, "num_global_layers": 1, "attention_heads": 2, "intermediate_layers_indices": [0],
                          "supported_aspect_ratios": [[1, 1]], "vision_output_dim": 128},
    },
    "smolvlm": {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": VISION},
    "gemma4": {
        "text_config": {**TEXT, **SLIDING, "global_head_dim": 16, "hidden_size_per_layer_input": 64,
                        "vocab_size_per_layer_input": 384, "num_kv_shared_layers": 0},
        "vision_config": {**VISION, "num_key_value_heads": 2, "head_dim": 32},
    },
    "gemma4_unified": {
        "text_config": {**TEXT, **SLIDING, "global_head_dim": 16, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
        "vision_config": {"mm_embed_dim": 64, "mm_posemb_size": 8, "patch_size": 8, "pooling_kernel_size": 1, "output_proj_dims": 64},
    },
    "muse_glimmer": {
        "text_config": {**TEXT, **SLIDING, "layer_rope_theta": [1e4, 0]}, "out_hidden_size": 256, "projector_hidden_size": 32,
        "vision_config": {**VISION, "pos_emb_height": 2, "pos_emb_width": 2},
    },
    "qwen3_5": {
        "text_config": {**TEXT, "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
                        "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
        "vision_config": QWEN_VISION,
    },
}  # fmt: skip
WRAPPERS["qwen3_5_moe"] = {
    "text_config": {**WRAPPERS["qwen3_5"]["text_config"], "num_experts": 4, "num_experts_per_tok": 2,
                    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
    "vision_config": QWEN_VISION,
}  # fmt: skip


@torch.no_grad()
def logits(model, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model.eval()(input_ids=ids).logits.float()


def load(path: Path, **arguments):
    return FastLanguageModel.from_pretrained(str(path), **{**LOAD, "load_in_4bit": False, **arguments})


def move(model) -> None:
    """Moves every trained weight off its initial value."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def adapted(model, **arguments):
    model = FastLanguageModel.get_peft_model(model, r=4, **arguments)
    move(model)
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("save") / "llama"
    checkpoint(folder, num_hidden_layers=2, vocab_size=267)  # as many rows as the tokenizer has tokens
    return folder


def write_wrapper(kind: str, folder: Path) -> None:
    config = AutoConfig.for_model(kind, **WRAPPERS[kind], tie_word_embeddings=False)
    torch.manual_seed(0)
    model = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]._from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)


def plain_models(folder: Path):
    """The model in every class that programs build from the folder."""
    config = AutoConfig.from_pretrained(folder)
    kinds = [class_named(config)] + [AutoModelForCausalLM] * (
        type(config) in AutoModelForCausalLM._model_mapping
    )
    return [kind.from_pretrained(folder, dtype=torch.float32) for kind in kinds]


# -- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WRAPPERS)
def test_an_adapter_of_a_multimodal_model_acts_in_every_class_that_programs_build(kind, tmp_path):
    write_wrapper(kind, tmp_path / "base")
    model, _ = load(tmp_path / "base")
    model = adapted(model, modules_to_save=["lm_head"], rank_pattern={"o_proj": 2}, layers_to_transform=[1])
    expected = logits(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(
        re.match(r"base_model\.model\.model\.(language|text)_model\.layers\.1\.", name) for name in names
    )
    for plain in plain_models(tmp_path / "base"):
        bare = logits(plain)
        theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter")
        assert (logits(theirs) - expected).abs().max() < 1e-4 < (bare - expected).abs().max(), type(plain)
    again, _ = load(tmp_path / "adapter", load_in_4bit=None)
    assert torch.equal(logits(again), expected)
    assert read_adapter(str(tmp_path / "adapter")).problems == []


def test_the_text_decoders_own_names_of_older_adapters_are_read(tmp_path):
    write_wrapper("gemma3", tmp_path / "base")
    model, _ = load(tmp_path / "base")
    model = adapted(model)
    PeftModel.save_pretrained(model, str(tmp_path / "old"))
    again, _ = load(tmp_path / "old")
    assert torch.equal(logits(again), logits(model))
    (problem,) = read_adapter(str(tmp_path / "old")).problems
    assert "does nothing" in problem


def test_the_merged_model_and_the_original_base_of_a_multimodal_checkpoint(tmp_path):
    write_wrapper("gemma3", tmp_path / "base")
    model, tokenizer = load(tmp_path / "base")
    model = adapted(model)
    for base in ("dequantized", "original"):
        model.save_pretrained_merged(str(tmp_path / base), tokenizer, base=base, dtype="float32")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / base, dtype=torch.float32)
        assert type(merged).__name__ == "Gemma3ForConditionalGeneration"
        assert (logits(merged) - logits(model)).abs().max() < 1e-4


# -- rows of the vocabulary ----------------------------------------------------------------------------------------


def grow(how: str, path: Path):
    """A model with two more tokens than its checkpoint, or two tokens whose rows a script has set."""
    if how == "resize_model_vocab":
        return load(path, resize_model_vocab=269)[0]
    model, _ = load(path)
    if how != "rows of tokens that exist":
        model.resize_token_embeddings(269)
    if how != "resize_token_embeddings":
        with torch.no_grad():
            for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
                table[-2:] = table[7:9] * 3
    return model


@pytest.mark.parametrize(
    "how",
    ["resize_token_embeddings", "resize_model_vocab", "rows set by the script", "rows of tokens that exist"],
)
@pytest.mark.parametrize("extra", [{}, {"target_modules": ["q_proj", "lm_head"]}], ids=["", "head"])
def test_rows_that_the_checkpoint_lacks_travel_in_the_adapter(how, extra, llama, tmp_path):
    model = adapted(grow(how, llama), **extra)
    rows = len(model.get_input_embeddings().weight)
    ids = torch.tensor([[5, rows - 1, 6, rows - 2, 7]])
    expected = logits(model, ids)
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["<a>", "<b>"] if rows == 269 else [])
    report = model.save_pretrained_merged(str(tmp_path / "a"), tokenizer, save_method="lora")
    assert report.passed
    assert torch.equal(logits(load(tmp_path / "a")[0], ids), expected)
    plain = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    plain.resize_token_embeddings(rows)
    theirs = PeftModel.from_pretrained(plain, tmp_path / "a")
    assert (logits(theirs, ids) - expected).abs().max() < 1e-4


def test_tables_that_are_the_checkpoints_are_not_written(llama, tmp_path):
    adapted(load(llama)[0]).save_pretrained(str(tmp_path))
    assert not any("embed_tokens" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


# -- a base that was changed ---------------------------------------------------------------------------------------


def merge_an_adapter(model):
    return adapted(model).merge_and_unload()


@torch.no_grad()
def set_one_value(model):
    model.model.layers[1].mlp.up_proj.weight[3, 5] += 0.01
    return model


def load_another_state(model):
    state = {name: value * 1.01 for name, value in model.state_dict().items() if "norm" in name}
    model.load_state_dict(state, strict=False)
    return model


CHANGES = [merge_an_adapter, set_one_value, load_another_state]


@pytest.mark.parametrize("load_in_4bit", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_no_adapter_is_written_for_a_base_that_was_changed_in_memory(change, load_in_4bit, llama, tmp_path):
    if load_in_4bit and change is set_one_value:
        pytest.skip("packed weights have no values to set")
    model, tokenizer = load(llama, load_in_4bit=load_in_4bit)
    model = adapted(change(model))
    assert any("were changed after it was loaded" in note for note in model.oribi.notes)
    writes = [
        lambda: model.save_pretrained(str(tmp_path / "a")),
        lambda: model.save_pretrained_merged(str(tmp_path / "a"), tokenizer, save_method="lora"),
        lambda: save_gguf_adapter(model, tmp_path / "a"),
        lambda: model.save_pretrained_merged(str(tmp_path / "a"), tokenizer, base="original"),
    ]
    for write in writes:
        with pytest.raises(ExportError, match="changed after"):
            write()
    assert not (tmp_path / "a" / "adapter_model.safetensors").exists()
    expected = logits(model)
    model.save_pretrained_merged(str(tmp_path / "m"), tokenizer, dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert (logits(merged) - expected).abs().max() < 1e-3


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_an_adapter_merged_for_a_while_is_written_as_it_is(load_in_4bit, llama, tmp_path):
    model, tokenizer = load(llama, load_in_4bit=load_in_4bit)
    model = adapted(model)
    expected = logits(model)
    model.merge_adapter()
    model.save_pretrained(str(tmp_path / "while"))
    model.unmerge_adapter()
    model.save_pretrained(str(tmp_path / "after"))
    for name in ("while", "after"):
        assert torch.equal(logits(load(tmp_path / name, load_in_4bit=None)[0]), expected)


def test_of_a_base_in_parts_nothing_is_told(llama):
    model, _ = load(llama)
    merge_an_adapter(model)
    assert model.oribi.changed_weights(model)
    model.model.shards = object()
    assert model.oribi.changed_weights(model) == []


# -- what is said --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_the_export_compares_answers_in_plain_peft(load_in_4bit, llama, tmp_path):
    model, tokenizer = load(llama, load_in_4bit=load_in_4bit)
    report = adapted(model).save_pretrained_merged(str(tmp_path), tokenizer, save_method="lora")
    figures = next(check.figures for check in report.checks if check.name == "answers in plain PEFT")
    assert figures["kl"] < 1e-5 < figures["kl_without_adapter"]
    record = json.loads((tmp_path / RECORD_FILE).read_text())
    assert record["base"]["weights"] == ("nf4" if load_in_4bit else "float32")
    assert record["chat_template"] == tokenizer.chat_template


def test_a_base_that_is_gone_is_said_and_not_skipped(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "base")
    model, tokenizer = load(tmp_path / "base")
    model = adapted(model)
    shutil.rmtree(tmp_path / "base")
    report = model.save_pretrained_merged(str(tmp_path / "a"), tokenizer, save_method="lora")
    (check,) = (check for check in report.checks if check.outcome is Outcome.NOT_TESTED)
    assert "is not on this machine" in check.says


def test_a_gguf_adapter_of_nf4_weights_says_what_it_does_not_belong_to(llama, tmp_path):
    for load_in_4bit in (True, False):
        model = adapted(load(llama, load_in_4bit=load_in_4bit)[0])
        notes = save_gguf_adapter(model, tmp_path / str(load_in_4bit))["report"].notes
        assert any("74 % instead of 85 %" in note for note in notes) == load_in_4bit


def test_several_adapters_and_other_names_are_written_each_with_its_record(llama, tmp_path):
    from peft import LoraConfig

    model = adapted(load(llama)[0])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("other")
    move(model)
    expected = logits(model)
    model.save_pretrained(str(tmp_path))
    assert (tmp_path / "other" / RECORD_FILE).is_file()
    assert torch.equal(logits(load(tmp_path / "other")[0]), expected)
    model.load_adapter(str(tmp_path / "other"), "again")
    model.set_adapter("again")
    assert torch.equal(logits(model), expected)


# -- checkpoints ---------------------------------------------------------------------------------------------------


def trainer_of(model, tokenizer, folder: Path, steps: int) -> SFTTrainer:
    args = SFTConfig(
        output_dir=str(folder), max_steps=steps, save_steps=1, save_strategy="steps", disable_tqdm=True,
        per_device_train_batch_size=1, dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    rows = [{"input_ids": list(range(3, 20)), "labels": list(range(3, 20))}] * 4
    return SFTTrainer(model, args, train_dataset=Dataset.from_list(rows), tokenizer=tokenizer)


def test_checkpoints_on_a_changed_base_say_so_and_load_nowhere_else(llama, tmp_path):
    model, tokenizer = load(llama)
    trainer = trainer_of(adapted(merge_an_adapter(model)), tokenizer, tmp_path, 1)
    trainer.train()
    with pytest.raises(ModelError, match="was trained on weights that were changed in memory"):
        load(tmp_path / "checkpoint-1")
    with pytest.raises(ExportError, match="save_pretrained_merged"):
        trainer.save_model(str(tmp_path / "final"))


def test_a_run_of_a_multimodal_model_resumes_from_the_names_it_wrote(tmp_path):
    write_wrapper("gemma3", tmp_path / "base")
    model, tokenizer = load(tmp_path / "base")
    trainer_of(adapted(model), tokenizer, tmp_path / "run", 1).train()
    again, tokenizer = load(tmp_path / "base")
    again = FastLanguageModel.get_peft_model(again, r=4)
    trainer_of(again, tokenizer, tmp_path / "run", 1).train(resume_from_checkpoint=True)
    assert torch.equal(logits(again), logits(model))


def test_a_multimodal_models_adapter_as_gguf_has_llama_cpps_names(tmp_path):
    write_wrapper("gemma3", tmp_path / "base")
    model, _ = load(tmp_path / "base")
    result = save_gguf_adapter(adapted(model), tmp_path / "lora", "f32")
    names = [tensor.name for tensor in gguf.GGUFReader(result["gguf_files"][0]).tensors]
    assert names
    assert all(re.fullmatch(r"blk\.\d+\.\w+\.weight\.lora_[ab]", name) for name in names), names[0]
