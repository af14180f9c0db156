"""Tokenizers for the tests of chats and data; each test gets its own copy, because templates are set on them."""

import copy

import pytest

from tests.data.tokenizers_small import CHATML, FAMILY_TOKENS, byte_level, sentence_piece


@pytest.fixture
def chatml_tokenizer():
    """ChatML tokens, no BOS, ChatML as its own template, as of Qwen."""
    tokenizer = copy.deepcopy(byte_level(("<|endoftext|>", "<|im_start|>")))
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture
def family_tokenizer():
    """Has the tokens of every named template, and adds BOS."""
    return copy.deepcopy(byte_level(tuple(FAMILY_TOKENS), bos="<s>", eos="</s>", add_bos=True))


@pytest.fixture
def family_tokenizer_without_bos():
    """Has the tokens of every named template and a BOS that it does not add."""
    return copy.deepcopy(byte_level(tuple(FAMILY_TOKENS), bos="<s>", eos="</s>"))


@pytest.fixture
def plain_tokenizer():
    """SentencePiece-like with BOS and EOS only, as of Llama 2."""
    return copy.deepcopy(sentence_piece("bpe"))
