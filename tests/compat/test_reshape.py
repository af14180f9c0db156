"""standardize_data_formats, to_sharegpt and apply_chat_template keep the calls that notebooks make."""

import datasets
import pytest

from oribi.chat.masking import Masker
from oribi.chat.rendering import ChatTemplate
from oribi.compat.reshape import (
    LLAMA_3_EXAMPLE,
    apply_chat_template,
    standardize_data_formats,
    standardize_sharegpt,
    template_from_example,
    to_sharegpt,
)
from oribi.errors import ConfigError, DataError
from tests.data.tokenizers_small import ONE_TURN, TWO_TURNS, from_messages

SHAREGPT = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "It is this."}]


@pytest.mark.parametrize("function", [standardize_sharegpt, standardize_data_formats])
def test_sharegpt_becomes_role_and_content(function):
    assert function(datasets.Dataset.from_list([{"conversations": SHAREGPT}]))["conversations"][0] == ONE_TURN


def test_any_two_keys_will_do_if_one_holds_the_roles():
    odd = [{"who": "human", "said": "What is it?"}, {"who": "gpt", "said": "It is this."}]
    assert (
        standardize_sharegpt(datasets.Dataset.from_list([{"conversations": odd}]))["conversations"][0]
        == ONE_TURN
    )


def test_a_stream_is_standardized_too():
    stream = datasets.Dataset.from_list([{"conversations": SHAREGPT}]).to_iterable_dataset()
    assert next(iter(standardize_sharegpt(stream)))["conversations"] == ONE_TURN


def test_without_conversations_the_data_set_comes_back():
    dataset = datasets.Dataset.from_list([{"text": "x"}])
    assert standardize_sharegpt(dataset) is dataset


def test_aliases_are_asked_for():
    coached = [{"from": "human", "value": "What is it?"}, {"from": "coach", "value": "It is this."}]
    dataset = datasets.Dataset.from_list([{"conversations": coached}])
    with pytest.raises(DataError, match="a message has the role 'coach'"):
        standardize_sharegpt(dataset)
    made = standardize_sharegpt(dataset, aliases_for_assistant=["coach"])
    assert made["conversations"][0] == ONE_TURN
    unclear = [{"a": "x", "b": "y"}]
    with pytest.raises(DataError, match="cannot tell which holds the role"):
        standardize_sharegpt(datasets.Dataset.from_list([{"conversations": unclear}]))


TABLE = [
    {"instruction": "Add.", "input": "1 {x}", "output": "2"},
    {"instruction": "Say hi.", "input": "", "output": "hi"},
    {"instruction": "Say ho.", "input": None, "output": "ho"},
]
PROMPT = "{instruction}[[\nYour input is:\n{input}]]"


def test_to_sharegpt_merges_columns_and_leaves_out_empty_parts():
    made = to_sharegpt(datasets.Dataset.from_list(TABLE), merged_prompt=PROMPT, output_column_name="output")
    assert made.column_names == ["conversations"]
    prompts = [row[0] for row in made["conversations"]]
    assert [p["value"] for p in prompts] == ["Add.\nYour input is:\n1 {x}", "Say hi.", "Say ho."]
    assert made["conversations"][0][1] == {"from": "gpt", "value": "2"}


def test_to_sharegpt_extends_conversations():
    dataset = datasets.Dataset.from_list([{"instruction": str(i), "output": f"a{i}"} for i in range(20)])
    made = to_sharegpt(dataset, conversation_extension=3)
    assert all(len(row) == 6 for row in made["conversations"])
    for turn in (0, 2, 4):
        assert sorted(row[turn]["value"] for row in made["conversations"]) == sorted(
            str(i) for i in range(20)
        )
    assert [row[0]["value"] for row in made["conversations"]] == [str(i) for i in range(20)]
    assert any(row[2]["value"] != row[0]["value"] for row in made["conversations"])
    assert made["conversations"][:] == to_sharegpt(dataset, conversation_extension=3)["conversations"][:]


def test_to_sharegpt_keeps_columns_if_asked_and_names_missing_ones():
    dataset = datasets.Dataset.from_list(TABLE)
    assert "output" in to_sharegpt(dataset, remove_unused_columns=False).column_names
    with pytest.raises(DataError, match="not \\['answer'\\]"):
        to_sharegpt(dataset, output_column_name="answer")
    with pytest.raises(ConfigError, match="conversation_extension = 0"):
        to_sharegpt(dataset, conversation_extension=0)


@pytest.mark.parametrize("row", [{"instruction": "x", "output": None}, {"instruction": None, "output": "y"}])
def test_to_sharegpt_refuses_nulls_instead_of_training_the_word_none(row):
    rows = [{"instruction": "x", "output": "y"}, row]
    with pytest.raises(DataError, match=r"to_sharegpt: row 2 has an empty \(null\)"):
        to_sharegpt(datasets.Dataset.from_list(rows))


def test_to_sharegpt_writes_numbers_and_structures_as_text():
    rows = [{"instruction": "x", "input": {"a": ["ü"], "b": 1}, "output": 3}]
    made = to_sharegpt(datasets.Dataset.from_list(rows), merged_prompt="{instruction}[[ {input}]]")
    assert [turn["value"] for turn in made["conversations"][0]] == ['x {"a": ["ü"], "b": 1}', "3"]


def test_roles_are_standardized_without_case_and_broken_rows_are_named():
    odd = [{"from": "Human ", "value": "What is it?"}, {"from": "GPT", "value": "It is this."}]
    made = standardize_sharegpt(datasets.Dataset.from_list([{"conversations": odd}]))
    assert made["conversations"][0] == ONE_TURN
    for broken in (None, [{"from": None, "value": "x"}]):
        rows = [{"conversations": odd}, {"conversations": broken}]
        with pytest.raises(DataError, match="row 2"):
            standardize_sharegpt(datasets.Dataset.from_list(rows))


def test_the_example_of_two_turns_becomes_a_template(family_tokenizer):
    dataset = datasets.Dataset.from_list([{"conversations": TWO_TURNS, "id": 7}])
    made = apply_chat_template(dataset, tokenizer=family_tokenizer, default_system_message="Be brief.")
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    expected = "<|begin_of_text|>" + header.format("system") + "Be brief.<|eot_id|>"
    for message in TWO_TURNS:
        expected += header.format(message["role"]) + message["content"] + "<|eot_id|>"
    assert made["text"][0] == expected
    assert made["id"][0] == 7
    masker = Masker(ChatTemplate(family_tokenizer))
    marked = masker.mark(from_messages(TWO_TURNS))
    assert [marked.text[a:b] for a, b in marked.spans] == ["It is this.<|eot_id|>", "That, too.<|eot_id|>"]


def test_an_example_without_an_end_gets_eos(plain_tokenizer):
    example = "{SYSTEM}\n### Q:\n{INPUT}\n### A:\n{OUTPUT}\n### Q:\n{INPUT}\n### A:\n{OUTPUT}"
    plain_tokenizer.chat_template = template_from_example(example, plain_tokenizer, "Be brief.")
    text = plain_tokenizer.apply_chat_template(TWO_TURNS, tokenize=False)
    assert text == (
        "Be brief.\n### Q:\nWhat is it?\n### A:\nIt is this.</s>\n### Q:\nAnd that?\n### A:\nThat, too.</s>"
    )
    prompt = plain_tokenizer.apply_chat_template(TWO_TURNS[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)


@pytest.mark.parametrize(
    ("once", "twice"),
    [
        ("Begin.\n\n### Q:\n{INPUT}\n\n### A:\n{OUTPUT}", "Begin.\n\n### Q:\n{INPUT}\n\n### A:\n{OUTPUT}\n\n### Q:\n{INPUT}\n\n### A:\n{OUTPUT}"),
        ("<s>{SYSTEM}</s>\nQ: {INPUT} A: {OUTPUT}</s>\n", "<s>{SYSTEM}</s>\nQ: {INPUT} A: {OUTPUT}</s>\nQ: {INPUT} A: {OUTPUT}</s>\n"),
        ("{SYSTEM}\nUSER: {INPUT}\nBOT: {OUTPUT}\n", "{SYSTEM}\nUSER: {INPUT}\nBOT: {OUTPUT}\nUSER: {INPUT}\nBOT: {OUTPUT}\n"),
        ("Q: {INPUT} A: {OUTPUT}</s>", "Q: {INPUT} A: {OUTPUT}</s>Q: {INPUT} A: {OUTPUT}</s>"),
    ],
)  # fmt: skip
def test_one_turn_says_what_two_say(family_tokenizer, once, twice):
    assert template_from_example(once, family_tokenizer, "Be brief.") == template_from_example(
        twice, family_tokenizer, "Be brief."
    )


def test_bos_in_the_example_is_the_tokenizers_own(family_tokenizer):
    example = "<s>{INPUT}>{OUTPUT}</s>{INPUT}>{OUTPUT}</s>"
    source = template_from_example(example, family_tokenizer, "")
    assert source.startswith("{{- bos_token -}}")
    family_tokenizer.chat_template = source
    text = family_tokenizer.apply_chat_template(TWO_TURNS, tokenize=False)
    assert text == "<s>What is it?>It is this.</s>And that?>That, too.</s>"


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        ("{INPUT}{INPUT}{OUTPUT}", "must hold {INPUT} and {OUTPUT} once or twice"),
        ("{OUTPUT}{INPUT}", "must hold {INPUT} before {OUTPUT}"),
        ("a{INPUT}b{OUTPUT}c a{INPUT}x{OUTPUT}c", "differ between {INPUT} and {OUTPUT}"),
        ("a{INPUT}b{OUTPUT}c y{INPUT}b{OUTPUT}c", "does not begin as the second"),
    ],
)
def test_an_example_that_is_no_pattern_is_named(family_tokenizer, example, reason):
    with pytest.raises(ConfigError, match=reason.replace("{", "\\{")):
        template_from_example(example, family_tokenizer, "")


def test_apply_chat_template_says_what_it_needs(family_tokenizer):
    dataset = datasets.Dataset.from_list([{"text": "x"}])
    with pytest.raises(ConfigError, match="give the tokenizer"):
        apply_chat_template(dataset)
    with pytest.raises(DataError, match="columns \\['text'\\]; it needs one of messages"):
        apply_chat_template(dataset, family_tokenizer, LLAMA_3_EXAMPLE)
