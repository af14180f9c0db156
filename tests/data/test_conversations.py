"""Rows of every format, recognised from the first one, and what is said about rows that do not fit."""

import pytest

from oribi.chat.conversation import Conversation
from oribi.data.conversations import recognise_format
from oribi.data.converters import Document, Tokens
from oribi.errors import DataError
from tests.data.tokenizers_small import ONE_TURN, assistant, user


def convert(row, **options):
    row_format = recognise_format(row, **options)
    return row_format.name, row_format.convert(row)


def messages_of(row, **options):
    return convert(row, **options)[1].messages


FORMATS = {
    "messages (column 'messages')": {"messages": ONE_TURN},
    "messages (column 'conversation')": {"conversation": ONE_TURN},
    "ShareGPT (column 'conversations')": {
        "conversations": [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "It is this."}]
    },
    "instruction (Alpaca) + output": {"instruction": "What is it?", "input": "", "output": "It is this."},
    "instruction (Alpaca) + response": {"instruction": "What is it?", "response": "It is this."},
    "question + answer": {"question": "What is it?", "answer": "It is this.", "id": 3},
    "query + response": {"query": "What is it?", "response": "It is this."},
    "prompt + completion": {"prompt": [user("What is it?")], "completion": [assistant("It is this.")]},
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_become_the_same_conversation(name):
    found, example = convert(FORMATS[name])
    assert found == name
    assert example.messages == ONE_TURN


def test_alpaca_with_input_system_and_history():
    row = {
        "instruction": "Add.",
        "input": "1 2",
        "output": "3",
        "system": "Be brief.",
        "history": [["Hi", "Hello"]],
    }
    assert messages_of(row) == [
        {"role": "system", "content": "Be brief."},
        user("Hi"),
        assistant("Hello"),
        user("Add.\n\n1 2"),
        assistant("3"),
    ]


def test_prompt_and_completion_in_text_train_the_completion():
    _, example = convert({"prompt": "1 + 1 =", "completion": " 2"})
    assert example == Document("1 + 1 = 2", trained_from=7)


def test_a_prompt_of_messages_is_context_even_where_the_assistant_speaks():
    row = {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")]}
    assert convert(row)[1].trained == [False, False, False, None]


def test_a_prompt_in_text_with_a_completion_in_messages():
    assert convert({"prompt": "What is it?", "completion": ONE_TURN[1:]})[1].messages == ONE_TURN


def test_pairs_may_have_a_system_message():
    row = {"question": "What is it?", "answer": "It is this.", "system": "Be brief."}
    assert messages_of(row) == [{"role": "system", "content": "Be brief."}, *ONE_TURN]


def test_a_turn_of_only_tool_calls_or_thinking_has_empty_content():
    row = {"messages": [user("x"), {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]}
    assert messages_of(row)[1]["content"] == ""
    row = {"messages": [user("x"), assistant("y") | {"tool_calls": []}]}
    assert messages_of(row)[1] == assistant("y")


def test_text_and_blocks_of_text():
    assert convert({"text": "Hello"})[1] == Document("Hello")
    assert convert({"text": "Hello", "begins": False, "ends": False})[1] == Document(
        "Hello", begins=False, ends=False
    )
    assert convert({"content_of_page": "Hello"}) == ("text (column 'content_of_page')", Document("Hello"))


def test_text_field_wins_over_messages_only_if_asked():
    row = {"conversations": ONE_TURN, "text": "rendered"}
    assert isinstance(convert(row)[1], Conversation)
    assert convert(row, text_field="text")[1] == Document("rendered")


def test_a_text_field_that_no_row_has_is_refused():
    with pytest.raises(DataError, match="no 'bdoy', the column of plain text that was asked for"):
        convert({"body": "rendered", "text": "raw"}, text_field="bdoy")
    assert convert({"text": "a file of text"}, text_field="body")[1] == Document("a file of text")


@pytest.mark.parametrize(
    ("more", "labels"),
    [
        ({}, [1, 2, 3]),
        ({"labels": [-100, 2, 3]}, [-100, 2, 3]),
        ({"completion_mask": [0, 0, 1]}, [-100, -100, 3]),
        ({"assistant_masks": [0, 1, 0]}, [-100, 2, -100]),
    ],
)
def test_tokens_are_taken_as_they_are(more, labels):
    assert convert({"input_ids": [1, 2, 3], **more})[1] == Tokens([1, 2, 3], labels)


def test_column_maps_and_role_aliases():
    row = {"task": "What is it?", "solution_text": "It is this.", "text": "other"}
    assert messages_of(row, columns={"instruction": "task", "output": "solution_text"}) == ONE_TURN
    coached = {"messages": [user("What is it?"), {"role": "coach", "content": "It is this."}]}
    assert messages_of(coached, role_aliases={"coach": "assistant"}) == ONE_TURN


def test_tools_may_be_json_text_and_nulls_are_no_fields():
    row = {"messages": [{**ONE_TURN[0], "name": None}, ONE_TURN[1]], "tools": '[{"type": "function"}]'}
    _, example = convert(row)
    assert example.tools == [{"type": "function"}]
    assert example.messages == ONE_TURN


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "it?"}]
    assert messages_of({"messages": [user(parts), ONE_TURN[1]]}) == ONE_TURN


def test_messages_in_columns_are_messages():
    columns = {"role": ["user", "assistant"], "content": ["What is it?", "It is this."]}
    assert messages_of({"messages": columns}) == ONE_TURN


def test_a_system_column_beside_messages_is_the_first_message():
    _, example = convert({"system": "Be brief.", "messages": ONE_TURN})
    assert example.messages == [{"role": "system", "content": "Be brief."}, *ONE_TURN]
    assert len(example.trained) == 3


def test_marks_do_not_reach_the_template():
    _, example = convert({"messages": [ONE_TURN[0], {**ONE_TURN[1], "weight": 1}]})
    assert example.messages == ONE_TURN
    assert example.trained == [None, True]


WRONG = {
    "unknown keys": (
        {"lang": "en", "page": 3},
        "row has keys ['lang', 'page']; expected 'messages', 'prompt' + 'completion', 'instruction' + 'output', 'question' + 'answer', or "
        "'text' alone. Rename the columns in the file, or name them in the run file: columns: {instruction: <your column>, output: "
        "<your column>} (in Python columns={'instruction': ...}, or formatting_func).",
    ),
    "preferences": (
        {"chosen": "a", "rejected": "b"},
        "row has 'chosen' and 'rejected', answers to compare: write stage: dpo (or orpo, kto, reward) in the run file. To fine-tune "
        "on one of them instead (stage: sft), name it: columns: {messages: chosen} or columns: {completion: chosen} (in Python "
        "columns={'messages': 'chosen'}).",
    ),
    "preferences beside a question": (
        {
            "conversations": [{"from": "human", "value": "a"}],
            "chosen": {"value": "b"},
            "rejected": {"value": "c"},
        },
        "row has 'chosen' and 'rejected', answers to compare: write stage: dpo (or orpo, kto, reward) in the run file. To fine-tune "
        "on one of them instead (stage: sft), name it: columns: {messages: chosen} or columns: {completion: chosen} (in Python "
        "columns={'messages': 'chosen'}).",
    ),
    "no messages": ({"messages": []}, "'messages' is an empty list: remove the row."),
    "no role": (
        {"messages": [{"content": "x"}]},
        "message 1 has keys ['content']; it needs 'role' and 'content' (or 'from' and 'value').",
    ),
    "unknown role": (
        {"messages": [{"role": "boss", "content": "x"}]},
        "message 1 has role 'boss'; known are system, developer, user, assistant, tool, function, ipython and ai, bot, chatgpt, "
        "function_response, gpt, human, input, model, observation, output, prompter, tool_response, tool_result. Correct it, or name "
        "it in the run file: role_aliases: {boss: assistant} (in Python role_aliases={'boss': 'assistant'}).",
    ),
    "null content": (
        {"messages": [user("x"), {"role": "assistant", "content": None}]},
        "message 2 (assistant) has no content: dict {'role': 'assistant', 'content': None}. Give it text, or remove the message.",
    ),
    "empty content": (
        {"messages": [user("x"), assistant(" \n")]},
        "message 2 (assistant) has empty content. Give it text, or remove the message.",
    ),
    "messages as text": (
        {"messages": [1], "x": 1},
        "message 1 is int 1; it must be an object with 'role' and 'content'.",
    ),
    "number as content": ({"messages": [user(3)]}, "message 1 has content int 3; it must be text."),
    "image": (
        {"messages": [user([{"type": "image", "url": "x"}])]},
        "message 1 has parts of type ['image']; oribi trains on text only.",
    ),
    "message as text": (
        {"messages": ["hello"]},
        "message 1 is str 'hello'; it must be an object with 'role' and 'content'.",
    ),
    "weight": (
        {"messages": [user("x"), assistant("y", weight=0.5)]},
        "message 2 has weight = 0.5; it must be 0 (context) or 1 (trained).",
    ),
    "train": (
        {
            "messages": [
                user(
                    "x",
                )
                | {"train": "yes"}
            ]
        },
        "message 1 has train = 'yes'; it must be true or false.",
    ),
    "empty output": (
        {"instruction": "x", "output": ""},
        "'output' is empty: fill it in, or remove the row.",
    ),
    "null output": (
        {"instruction": "x", "output": None},
        "row has an empty (null) 'output'; its keys are ['instruction', 'output'].",
    ),
    "number as text": ({"text": 3, "id": 4}, "'text' is int 3; it must be text."),
    "unequal labels": (
        {"input_ids": [1, 2], "labels": [1]},
        "'labels' has 1 entries, 'input_ids' 2: they must be equally long.",
    ),
    "no ids": ({"input_ids": []}, "'input_ids' is empty: remove the row."),
    "tools": (
        {"messages": ONE_TURN, "tools": "weather()"},
        "'tools' is text but no JSON (Expecting value: line 1 column 1 (char 0)): str 'weather()'.",
    ),
    "one tool": (
        {"messages": ONE_TURN, "tools": {"a": 1}},
        "'tools' is dict {'a': 1}; it must be a list of JSON schemas.",
    ),
    "empty prompt": (
        {"prompt": [], "completion": "x"},
        "'prompt' is list []; it must be text or a list of messages.",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_row_says_what_is_wrong_and_what_to_do(name):
    row, message = WRONG[name]
    with pytest.raises(DataError) as error:
        convert(row)
    assert str(error.value) == message


def test_messages_must_be_a_list_in_later_rows_too():
    with pytest.raises(DataError, match="'messages' is str 'hello'; it must be a list of messages"):
        recognise_format({"messages": ONE_TURN}).convert({"messages": "hello"})


def test_a_later_row_is_held_to_the_first():
    row_format = recognise_format({"messages": ONE_TURN})
    with pytest.raises(DataError, match="row has no 'messages'; its keys are \\['text'\\]"):
        row_format.convert({"text": "x"})


def test_a_column_map_must_fit():
    with pytest.raises(DataError, match="row has keys \\['text'\\], but columns names \\['task'\\]"):
        recognise_format({"text": "x"}, columns={"instruction": "task"})
