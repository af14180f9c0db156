"""FastLanguageModel and FastModel take the calls of existing scripts, and say what they do with every keyword."""

import json

import pytest
import torch
from peft import PeftModel

from oribi import FastLanguageModel, FastModel
from oribi.compat.language_model import loading_keywords
from oribi.compat.names import IGNORED_KEYWORDS, REFUSED_KEYWORDS
from oribi.errors import ConfigError
from tests.models.tiny_checkpoint import checkpoint

IDS = torch.arange(3, 30)[None]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    checkpoint(path)
    return str(path)


def load(path, **arguments):
    return FastLanguageModel.from_pretrained(
        path, **{"max_seq_length": 64, "dtype": torch.float32, **arguments}
    )


def test_the_usual_script_runs(llama, capsys):
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=llama, max_seq_length=64, dtype=None, load_in_4bit=True, token="hf_..."
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=3407,
        use_rslora=False,
        loftq_config=None,
    )
    assert isinstance(model, PeftModel)
    model.print_trainable_parameters()
    model(IDS, labels=IDS).loss.backward()
    FastLanguageModel.for_inference(model)
    inputs = tokenizer(["the cat"], return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=4, use_cache=True).shape[1] >= inputs["input_ids"].shape[1]
    printed = capsys.readouterr().out
    assert printed.startswith("oribi: version 0.1.0 on ")
    assert "trainable params: " in printed


def test_only_the_first_process_prints(llama, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    load(llama)
    assert "oribi:" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("keyword", "value", "note"),
    [
        ("use_exact_model_name", True, "names are never replaced here"),
        ("offload_embedding", True, "moves frozen embeddings to host memory"),
        ("fast_inference", True, "the model's own generate answers"),
        ("gpu_memory_utilization", 0.9, "an inference engine that is not used"),
        ("attn_implementation", "flash_attention_2", "the decoder chooses its attention backend"),
        ("unsloth_tiled_mlp", True, "bounds the MLP's memory"),
        ("text_only", True, "only text decoders are trained"),
        ("load_in_fp8", "block", "there are no 8-bit float weights"),
        ("unsloth_vllm_standby", True, "an inference engine that is not used"),
    ],
)
def test_keywords_without_meaning_are_noted(llama, keyword, value, note):
    model, _ = load(llama, **{keyword: value})
    (found,) = [line for line in model.oribi.notes if line.startswith(keyword)]
    assert note in found


@pytest.mark.parametrize(
    ("keyword", "value"),
    [("fast_inference", False), ("gpu_memory_utilization", 0.5), ("max_lora_rank", 64),
     ("random_state", 3407), ("qat_scheme", None), ("num_labels", None), ("float8_kv_cache", False)],
)  # fmt: skip
def test_keywords_at_their_defaults_pass_in_silence(llama, keyword, value):
    assert not any(keyword in note for note in load(llama, **{keyword: value})[0].oribi.notes)


@pytest.mark.parametrize(
    ("keyword", "value", "words"),
    [
        ("qat_scheme", "int4", "quantisation-aware training is not supported"),
        ("auto_model", object, "oribi loads language models and sequence classifiers"),
        ("whisper_language", "English", "speech models are not supported"),
        ("variant", "fp16", "weights of a variant"),
    ],
)
def test_keywords_that_would_change_the_result_are_refused(llama, keyword, value, words):
    with pytest.raises(ConfigError, match=words):
        load(llama, **{keyword: value})


# sections 1.1 and 1.4 of Unsloth's from_pretrained, and what public notebooks pass: a value that each script may write
FROM_PRETRAINED = {
    "max_seq_length": 64, "dtype": None, "load_in_4bit": True, "load_in_16bit": False, "load_in_8bit": False,
    "full_finetuning": False, "token": None, "device_map": "balanced", "rope_scaling": None, "fix_tokenizer": True,
    "trust_remote_code": False, "use_gradient_checkpointing": "unsloth", "resize_model_vocab": 400, "revision": None,
    "use_exact_model_name": True, "offload_embedding": True, "float32_mixed_precision": None, "fast_inference": True,
    "gpu_memory_utilization": 0.9, "float8_kv_cache": True, "random_state": 3407, "max_lora_rank": 32,
    "disable_log_stats": True, "qat_scheme": None, "load_in_fp8": "block", "unsloth_tiled_mlp": True, "text_only": True,
    "quantization_config": None, "config": None, "attn_implementation": "eager", "num_labels": None, "id2label": None,
    "label2id": None, "cache_dir": None, "local_files_only": True, "force_download": False, "subfolder": None,
    "variant": None, "use_safetensors": True, "gguf_file": None, "unsloth_force_compile": False, "auto_model": None,
    "torch_dtype": torch.float32, "return_logits": False, "fullgraph": True, "whisper_language": None, "whisper_task": None,
    "target_parameters": None, "device_map_planner_kwargs": {"retained_rows": 128}, "use_cache": True,
}  # fmt: skip
GET_PEFT_MODEL = {
    "r": 4, "target_modules": ["q_proj"], "lora_alpha": 16, "lora_dropout": 0, "bias": "none", "layers_to_transform": None,
    "layers_pattern": None, "finetune_last_n_layers": None, "use_gradient_checkpointing": "unsloth", "random_state": 3407,
    "max_seq_length": 2048, "use_rslora": False, "modules_to_save": None, "init_lora_weights": True, "loftq_config": {},
    "temporary_location": "_unsloth_temporary_saved_buffers", "qat_scheme": None, "target_parameters": None,
    "ensure_weight_tying": False, "use_dora": False,
}  # fmt: skip


def test_every_keyword_that_scripts_write_works_or_is_in_the_tables(llama):
    known = loading_keywords() | IGNORED_KEYWORDS.keys() | REFUSED_KEYWORDS.keys()
    assert set(FROM_PRETRAINED) <= known
    assert not IGNORED_KEYWORDS.keys() & REFUSED_KEYWORDS.keys()
    model, _ = FastModel.from_pretrained(llama, **FROM_PRETRAINED)
    FastModel.get_peft_model(
        model, **GET_PEFT_MODEL, finetune_vision_layers=False, finetune_language_layers=True,
        finetune_attention_modules=True, finetune_mlp_modules=True, finetune_audio_layers=False, task_type=None,
    )  # fmt: skip
    model, _ = load(llama, device_map="unsloth")
    FastLanguageModel.get_peft_model(model, **GET_PEFT_MODEL)


@pytest.mark.parametrize("kind", ["AutoModelForImageTextToText", "Gemma3ForConditionalGeneration"])
def test_classes_for_images_are_taken_for_their_text_decoder(llama, kind):
    model, _ = load(llama, auto_model=kind)
    assert any(f"auto_model={kind} has no effect" in note for note in model.oribi.notes)


@pytest.mark.parametrize(
    ("keyword", "near"),
    [
        ("load_in_4bits", "load_in_4bit"),
        ("max_sequence_length", "max_seq_length"),
        ("use_safetensor", "use_safetensors"),
    ],
)
def test_an_unknown_keyword_names_the_nearest(llama, keyword, near):
    with pytest.raises(ConfigError, match=f"unknown keyword {keyword}; did you mean {near}?"):
        load(llama, **{keyword: True})


def test_torch_dtype_is_dtype_and_gives_way_to_it(llama):
    assert load(llama, torch_dtype="float16", load_in_4bit=False)[0].dtype == torch.float32
    model, _ = FastLanguageModel.from_pretrained(
        llama, max_seq_length=64, torch_dtype="float16", load_in_4bit=False
    )
    assert model.dtype == torch.float16


def test_modes_switch_everything_and_back(llama):
    model, _ = load(llama)
    model = FastLanguageModel.get_peft_model(
        model, r=4, lora_dropout=0.5, use_gradient_checkpointing="memory"
    )
    base = model.get_base_model()
    assert FastLanguageModel.for_inference(model) is model
    assert not any(m.training for m in model.modules())
    assert not base.is_gradient_checkpointing
    first, second = model(IDS).logits, model(IDS).logits
    assert torch.equal(first, second)
    assert model.for_training() is model
    assert all(m.training for m in model.modules())
    assert base.is_gradient_checkpointing
    assert base.oribi.checkpointing == "memory"
    model.for_training(use_gradient_checkpointing=False)
    assert not base.is_gradient_checkpointing
    model.for_inference()
    assert not model.training


def test_qat_is_refused_and_unneeded_arguments_pass(llama):
    model, _ = load(llama)
    with pytest.raises(ConfigError, match="qat_scheme is refused"):
        FastLanguageModel.get_peft_model(model, qat_scheme="int4")
    FastLanguageModel.get_peft_model(model, r=4, max_seq_length=2048, temporary_location="elsewhere")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, {"q", "k", "v", "o", "gate", "up", "down"}),
        ({"finetune_mlp_modules": False}, {"q", "k", "v", "o"}),
        ({"finetune_attention_modules": False}, {"gate", "up", "down"}),
        ({"target_modules": ["q_proj"], "finetune_attention_modules": False}, {"q"}),
        (
            {"target_modules": "all-linear", "finetune_vision_layers": False},
            {"q", "k", "v", "o", "gate", "up", "down"},
        ),
    ],
)
def test_fast_model_chooses_modules_by_its_flags(llama, flags, expected):
    model, _ = FastModel.from_pretrained(
        llama, max_seq_length=64, dtype=torch.float32, return_logits=False, fullgraph=True
    )
    model = FastModel.get_peft_model(model, r=4, lora_alpha=8, random_state=3407, **flags)
    found = {
        name.split("_proj.lora_A")[0].rpartition(".")[2]
        for name, _ in model.named_parameters()
        if "lora_A" in name
    }
    assert found == expected


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"finetune_language_layers": False}, "only the layers of the text decoder can be trained"),
        ({"finetune_audio_layers": True}, "only the layers of the text decoder can be trained"),
        ({"finetune_attention_modules": False, "finetune_mlp_modules": False}, "are both off"),
        ({"task_type": "SEQ_CLS"}, "the model is loaded for 'CAUSAL_LM'"),
    ],
)
def test_fast_model_refuses_what_is_not_loaded(llama, flags, words):
    model, _ = load(llama)
    with pytest.raises(ConfigError, match=words):
        FastModel.get_peft_model(model, **flags)


def test_a_saved_adapter_comes_back_through_the_same_call(llama, tmp_path):
    model, tokenizer = load(llama)
    model = FastLanguageModel.get_peft_model(model, r=4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == llama
    again, _ = load(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(again.eval()(IDS).logits, model.eval()(IDS).logits)
    assert FastLanguageModel.get_peft_model(again, r=4) is again


def test_methods_are_bound_to_the_instance_and_no_class(llama, tmp_path):
    model, tokenizer = load(llama)
    model = FastLanguageModel.get_peft_model(model, r=4)
    names = ("save_pretrained_merged", "push_to_hub_merged", "save_pretrained_gguf", "push_to_hub_gguf")
    assert all(callable(vars(model)[name]) and not hasattr(type(model), name) for name in names)
    model.save_pretrained_merged(
        str(tmp_path / "merged"), tokenizer, save_method="merged_16bit", verify=False
    )
    assert (tmp_path / "merged/model.safetensors").is_file()


def test_gguf_files_lie_where_scripts_look_for_them(llama, tmp_path):
    model, tokenizer = load(llama)
    written = model.save_pretrained_gguf(f"{tmp_path}/model/", tokenizer, "f16", verify=False)
    assert written["save_directory"] == f"{tmp_path}/model/"
    assert written["gguf_directory"] == f"{tmp_path}/model_gguf"
    assert [path.parent.name for path in tmp_path.rglob("*.gguf")] == ["model_gguf"]
    assert written["gguf_files"] == [str(path) for path in tmp_path.rglob("*.gguf")]
    assert not (tmp_path / "model").exists()
