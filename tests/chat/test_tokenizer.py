"""Tokenizers are repaired where training would go wrong, say so in one line, and never change their vocabulary."""

import json

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer, GenerationConfig

from oribi.chat.tokenizer import load_tokenizer, repair
from oribi.errors import ModelError
from oribi.models.load import load_model
from tests.models.tiny_checkpoint import checkpoint
from tests.save.tiny_export import byte_level_tokenizer, sentencepiece_tokenizer


def tokenizer(**changes):
    tokenizer = byte_level_tokenizer()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def with_specials(*specials: str, **changes):
    """A tokenizer whose vocabulary has these special tokens as well."""
    made = tokenizer(**changes)
    made.add_tokens([AddedToken(name, special=True) for name in specials])
    return made


def test_a_sound_tokenizer_is_left_alone():
    made = tokenizer()
    repaired = repair(made, 384, GenerationConfig(eos_token_id=2), max_seq_length=77)
    assert repaired.notes == []
    assert repaired.eos_token_ids == [2]
    assert (made.pad_token, made.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert made.padding_side == "left"
    assert made.model_max_length == 77


@pytest.mark.parametrize("pad", [None, "<|im_end|>"])
def test_a_pad_that_is_missing_or_ends_a_text_becomes_a_spare_token(pad):
    made = tokenizer(pad_token=pad)
    size = len(made)
    repaired = repair(made, 384)
    assert made.pad_token == "<|endoftext|>"
    assert len(made) == size
    (note,) = repaired.notes
    assert note.startswith("tokenizer: pad was")
    assert note.endswith("now '<|endoftext|>'")


@pytest.mark.parametrize("name", ["<|finetune_right_pad_id|>", "<pad>", "<|vision_pad|>", "<|my_pad_token|>"])
def test_tokens_made_for_padding_are_preferred(name):
    made = with_specials(name, pad_token=None, unk_token=None)
    if name == "<|my_pad_token|>":  # known only by its name; nothing better may be there
        made.eos_token = "<|endoftext|>"
        made.chat_template = None
    repair(made, 384)
    assert made.pad_token == name


def test_a_pad_beyond_the_embeddings_is_replaced():
    made = with_specials("<far>")
    made.pad_token = "<far>"
    (note,) = repair(made, len(made) - 1).notes
    assert "'<far>' has no row in the embeddings" in note
    assert made.pad_token == "<|endoftext|>"


def test_a_pad_that_ends_a_turn_is_replaced():
    made = with_specials("<|pad|>", eos_token="<|endoftext|>", pad_token="<|im_end|>")
    repair(made, 384)
    assert made.pad_token == "<|pad|>"


def test_without_a_spare_token_pad_stays_eos_and_the_note_says_so():
    made = tokenizer(pad_token=None, eos_token="<|im_end|>", bos_token="<|endoftext|>")
    repaired = repair(made, 384)
    assert made.pad_token == made.eos_token
    assert "no unused token; padding is recognised by position" in repaired.notes[0]


def test_a_missing_chat_template_becomes_chatml_where_its_markers_are_known():
    made = tokenizer(chat_template=None)
    (note,) = repair(made, 384).notes
    assert "now ChatML" in note
    text = made.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_a_missing_chat_template_is_only_reported_elsewhere():
    made = sentencepiece_tokenizer()
    made.chat_template = None
    assert any("get_chat_template(tokenizer, ...)" in note for note in repair(made, 384).notes)
    assert made.chat_template is None


def test_an_end_of_turn_besides_eos_ends_generation_too():
    made = tokenizer(eos_token="<|endoftext|>", pad_token=None)
    repaired = repair(made, 384)
    assert repaired.eos_token_ids == [0, 2]
    assert any(
        "ends a turn with '<|im_end|>', not with eos '<|endoftext|>'" in note for note in repaired.notes
    )
    known = repair(
        tokenizer(eos_token="<|endoftext|>", pad_token="<|im_start|>"),
        384,
        GenerationConfig(eos_token_id=[0, 2]),
    )
    assert known.eos_token_ids == [0, 2]
    assert not any("ends a turn" in note for note in known.notes)


@pytest.mark.parametrize("generation", [GenerationConfig(eos_token_id=[2, 0]), None])
def test_a_missing_eos_is_taken_from_what_the_model_generates_or_its_template(generation):
    made = tokenizer(eos_token=None)
    repaired = repair(made, 384, generation)
    assert made.eos_token == "<|im_end|>"
    assert any("eos was missing, now '<|im_end|>'" in note for note in repaired.notes)


def test_a_tokenizer_that_cannot_end_a_text_is_refused():
    made = sentencepiece_tokenizer()
    made.eos_token = made.chat_template = None
    with pytest.raises(ModelError, match="no eos token and the checkpoint names none"):
        repair(made, 384)


def test_the_models_settings_follow_the_tokenizer(tmp_path):
    checkpoint(tmp_path)
    edited = with_specials("<|pad|>", pad_token="<|endoftext|>", eos_token="<|endoftext|>")
    edited.save_pretrained(tmp_path)
    model, made = load_model(str(tmp_path), dtype="float32", device_map="cpu")
    assert made.pad_token_id == model.config.pad_token_id == model.generation_config.pad_token_id
    assert made.pad_token_id not in (0, 2)
    assert model.generation_config.eos_token_id == [0, 2]


def test_fix_tokenizer_false_repairs_nothing(tmp_path):
    checkpoint(tmp_path)
    edited = byte_level_tokenizer()
    edited.pad_token = edited.eos_token
    edited.save_pretrained(tmp_path)
    model, made = load_model(
        str(tmp_path), dtype="float32", device_map="cpu", max_seq_length=64, fix_tokenizer=False
    )
    assert made.pad_token == made.eos_token
    assert model.oribi.notes == []


def test_a_class_that_cuts_otherwise_than_the_file_is_not_taken(tmp_path):
    checkpoint(tmp_path)
    expected = byte_level_tokenizer()
    expected.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    # as DeepSeek-R1-Distill-Llama has it
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": "LlamaTokenizerFast"}))
    text = "The cat's 1234 hats\n\n你好"
    mistaken = AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] != expected(text)["input_ids"]
    # transformers 5.17 takes the class at its word, 5.23 goes by the file
    model, loaded = load_model(str(tmp_path), max_seq_length=64)
    assert loaded(text)["input_ids"] == expected(text)["input_ids"]
    assert loaded.chat_template == expected.chat_template
    assert sum("takes it for a LlamaTokenizer" in note for note in model.oribi.notes) == int(mistaken)
    loaded.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again(text)["input_ids"] == expected(text)["input_ids"]


def test_a_directory_without_a_tokenizer_is_named(tmp_path):
    checkpoint(tmp_path)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="no tokenizer can be loaded from"):
        load_tokenizer(tmp_path)


def test_more_tokens_than_rows_are_reported(tmp_path):
    checkpoint(tmp_path, vocab_size=200)
    model, _ = load_model(str(tmp_path), dtype="float32", device_map="cpu")
    assert any("267 tokens but the model only 200 rows" in note for note in model.oribi.notes)
