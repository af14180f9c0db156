"""Image-text checkpoints load, train and save as text models, and their parts for images stay as they are."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig

from oribi import FastLanguageModel, FastModel, SFTConfig, SFTTrainer
from oribi.compat.language_model import FastVisionModel
from oribi.errors import ConfigError
from oribi.families import family_of
from oribi.models.open import decoder_config
from oribi.models.unfused import beside_decoder
from oribi.models.wrapper import class_named
from tests.save.test_adapter_files import WRAPPERS, logits, move, write_wrapper

QUICK = ("gemma3", "gemma4", "paligemma")  # one of each kind in every run of the tests
LOAD = {"dtype": torch.float32, "device_map": "cpu", "max_seq_length": 64}
# as of llava-hf: a processor's template, which reads contents as lists of parts
PARTS = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
MESSAGES = [{"role": "user", "content": "a fox"}, {"role": "assistant", "content": "runs"}]


@pytest.mark.parametrize(
    ("kind", "load_in_4bit"),
    [
        pytest.param(kind, nf4, marks=() if nf4 and kind in QUICK else pytest.mark.long)
        for kind in WRAPPERS
        for nf4 in (True, False)
    ],
)
def test_it_is_trained_and_merged_as_a_text_model(kind, load_in_4bit, tmp_path, capsys):
    write_wrapper(kind, tmp_path / "base")
    (tmp_path / "base/preprocessor_config.json").write_text('{"size": 16}')
    model, tokenizer = FastModel.from_pretrained(str(tmp_path / "base"), load_in_4bit=load_in_4bit, **LOAD)
    said = [note for note in model.oribi.notes if "image" in note]
    assert len(said) == 1
    decoder = decoder_config(AutoConfig.from_pretrained(tmp_path / "base"), [])
    assert model.oribi.fused is (family_of(decoder) is not None)
    if not load_in_4bit:
        whole = class_named(AutoConfig.from_pretrained(tmp_path / "base"))
        theirs = whole.from_pretrained(tmp_path / "base", dtype=torch.float32)
        assert (logits(model) - logits(theirs)).abs().max() < 1e-4
    model = FastModel.get_peft_model(
        model, r=4, finetune_vision_layers=False, finetune_language_layers=True, finetune_attention_modules=True,
        finetune_mlp_modules=True, random_state=3407,
    )  # fmt: skip
    assert not any("vision" in n or "visual" in n for n, p in model.named_parameters() if p.requires_grad)
    rows = Dataset.from_list([{"text": "the red fox runs over old hills"}] * 4)
    trainer = SFTTrainer(
        model=model,
        tokenizer=tokenizer.tokenizer,
        train_dataset=rows,
        args=SFTConfig(
            output_dir=str(tmp_path / "run"), max_steps=2, dataset_text_field="text", per_device_train_batch_size=2,
            gradient_accumulation_steps=1, report_to="none", save_strategy="no", disable_tqdm=True,
        ),
    )  # fmt: skip
    assert trainer.train().metrics["train_runtime"] > 0
    move(model)
    expected = logits(model)
    model.save_pretrained_merged(str(tmp_path / "merged"), tokenizer, dtype="float32", held_out=["a red fox"])
    config = AutoConfig.from_pretrained(tmp_path / "merged")
    assert config.architectures == AutoConfig.from_pretrained(tmp_path / "base").architectures
    merged = class_named(config).from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (logits(merged) - expected).abs().max() < 1e-4
    assert (tmp_path / "merged/preprocessor_config.json").is_file()
    # what was not trained is there as it was, to the bit
    base = class_named(config).from_pretrained(tmp_path / "base", dtype=torch.float32).state_dict()
    parts = tuple(f"{name}." for name in beside_decoder(merged))
    towers = [name for name in base if name.startswith(parts)]
    assert towers
    assert all(torch.equal(base[name], merged.state_dict()[name]) for name in towers)


def test_a_processors_chat_template_is_taken_and_given_texts_as_parts(tmp_path):
    write_wrapper("llava", tmp_path / "base")
    (tmp_path / "base/chat_template.jinja").unlink()
    (tmp_path / "base/chat_template.json").write_text(json.dumps({"chat_template": PARTS}))
    model, tokenizer = FastVisionModel.from_pretrained(str(tmp_path / "base"), **LOAD)
    assert "chat template: the processor's, from chat_template.json" in model.oribi.notes
    as_parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in MESSAGES]
    for messages in (MESSAGES, as_parts):
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert text == "USER: a fox<|im_end|>ASSISTANT: runs<|im_end|>"
    tokenizer.save_pretrained(tmp_path / "saved")
    again = type(tokenizer).from_pretrained(tmp_path / "saved")
    assert again.apply_chat_template(MESSAGES, tokenize=False) == text


def test_vision_layers_that_a_script_wants_trained_are_answered_in_words(tmp_path, capsys):
    write_wrapper("gemma3", tmp_path / "base")
    model, _ = FastVisionModel.from_pretrained(str(tmp_path / "base"), **LOAD)
    FastVisionModel.get_peft_model(model, r=4, finetune_vision_layers=True)
    assert "finetune_vision_layers=True: only the text decoder is trained" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="only the layers of the text decoder can be trained"):
        FastVisionModel.get_peft_model(
            model, r=4, finetune_vision_layers=True, finetune_language_layers=False
        )


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"finetune_mlp_modules": False}, {"in_proj_qkv", "in_proj_z", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"}),
        ({"finetune_attention_modules": False}, {"gate_proj", "up_proj", "down_proj"}),
    ],
)  # fmt: skip
def test_mixers_and_mlp_are_told_apart(flags, expected, tmp_path):
    write_wrapper("qwen3_5", tmp_path / "base")
    model, _ = FastModel.from_pretrained(str(tmp_path / "base"), load_in_4bit=False, **LOAD)
    model = FastModel.get_peft_model(model, r=4, finetune_vision_layers=False, **flags)
    found = {n.split(".lora_A")[0].rpartition(".")[2] for n, _ in model.named_parameters() if "lora_A" in n}
    assert found == expected


@pytest.mark.parametrize("kind", ["gemma3", "gemma4", "paligemma", "qwen3_vl"])
def test_the_last_layers_are_those_of_the_text_decoder(kind, tmp_path):
    write_wrapper(kind, tmp_path / "base")
    model, _ = FastModel.from_pretrained(str(tmp_path / "base"), load_in_4bit=False, **LOAD)
    model = FastModel.get_peft_model(model, r=4, finetune_last_n_layers=1)
    move(model)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names
    assert all(".layers.1." in name for name in names)
    expected = logits(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    assert torch.equal(logits(FastModel.from_pretrained(str(tmp_path / "adapter"), **LOAD)[0]), expected)


@pytest.mark.parametrize("kind", ["gemma4", "paligemma"])
def test_a_head_of_its_own_is_trained_whatever_the_text_decoders_config_says(kind, tmp_path):
    write_wrapper(kind, tmp_path / "base")
    model, _ = FastModel.from_pretrained(str(tmp_path / "base"), load_in_4bit=False, **LOAD)
    model.config.get_text_config().tie_word_embeddings = True  # as text decoders' configs say by default
    model = FastModel.get_peft_model(model, r=4, target_modules=["q_proj", "embed_tokens", "lm_head"])
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("lm_head.lora_A" in name for name in names)
    assert sum("embed_tokens.modules_to_save" in name for name in names) == 1
    assert not any("(tied)" in note for note in model.oribi.notes)


def test_the_tokenizer_answers_for_a_processor_after_a_copy_too(tmp_path):
    import copy

    write_wrapper("gemma3", tmp_path / "base")
    _, tokenizer = FastLanguageModel.from_pretrained(str(tmp_path / "base"), **LOAD)
    assert tokenizer.tokenizer is tokenizer
    copied = copy.deepcopy(tokenizer)
    assert copied.tokenizer is copied
