"""Roles and texts of rendered prompts, as the templates of all families write them."""

import pytest

from oribi.chat.named_templates import get_chat_template
from oribi.data.turns import turns_of
from tests.data.tokenizers_small import byte_level

TALK = [
    {"role": "user", "content": "Where is\n\nthe boat?"}, {"role": "assistant", "content": "In the harbour."},
    {"role": "user", "content": "user: and now?"},
]  # fmt: skip
TURNS = [(message["role"], message["content"]) for message in TALK]


def ids_of(tokenizer, messages) -> list[int]:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize(
    "name",
    [
        "chatml",
        "llama-3",
        "gemma",
        "gemma-3",
        "phi-3",
        "phi-4",
        "qwen-2.5",
        "qwen-3",
        "granite",
        "smollm",
        "olmo",
        "deepseek-r1",
        "gpt-oss",
        "lfm-2",
        "gemma-4",
        "command-r",
    ],
)
def test_turns_are_found_in_every_named_template(family_tokenizer, name):
    tokenizer = get_chat_template(family_tokenizer, name)
    found = turns_of(tokenizer, ids_of(tokenizer, TALK))
    assert [
        turn for turn in found if turn[0] != "system"
    ] == TURNS  # some write a system message of their own


def test_marks_around_the_question_are_turns():
    tokenizer = byte_level(("[INST]", "[/INST]"), bos="<s>", eos="</s>")
    text = "<s>[INST] Where is\n\nthe boat? [/INST] In the harbour.</s>[INST] user: and now? [/INST]"
    assert turns_of(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"]) == TURNS


def test_a_system_message_is_a_turn(chatml_tokenizer):
    system = {"role": "system", "content": "Be brief."}
    assert turns_of(chatml_tokenizer, ids_of(chatml_tokenizer, [system, *TALK])) == [
        ("system", "Be brief."),
        *TURNS,
    ]


@pytest.mark.parametrize("text", ["Once upon a time.", "", "### Instruction:\nWhere?\n\n### Response:\n"])
def test_a_text_without_turns_is_left_whole(chatml_tokenizer, text):
    assert turns_of(chatml_tokenizer, chatml_tokenizer(text)["input_ids"]) is None
