"""What a row says beside the columns of its format: used where it has a place, named where it has none, or refused."""

import datetime
import decimal
import json

import datasets
import numpy as np
import pytest

from oribi.chat.conversation import Conversation
from oribi.data.conversations import recognise_format
from oribi.data.converters import Document, Tokens
from oribi.errors import ConfigError, DataError
from tests.data.tokenizers_small import ONE_TURN, WEATHER, assistant, call, user


def convert(row, **options):
    return recognise_format(row, **options).convert(row)


def system(text):
    return {"role": "system", "content": text}


THOUGHT = "First this, then that."
# row -> its messages, and the columns that are named as unused
USED = {
    "alpaca of the hub": (
        {"instruction": "Add.", "input": "1 2", "output": "3", "text": "Below is an instruction"},
        [user("Add.\n\n1 2"), assistant("3")],
        ["text"],
    ),
    "dolly": (
        {"instruction": "Who?", "context": "The pier.", "response": "Ada.", "category": "closed_qa"},
        [user("Who?\n\nThe pier."), assistant("Ada.")],
        ["category"],
    ),
    "openorca": (
        {"id": "t.1", "system_prompt": "Be a pirate.", "question": "Where?", "response": "Arr."},
        [system("Be a pirate."), user("Where?"), assistant("Arr.")],
        ["id"],
    ),
    "sql-create-context": (
        {"question": "How many?", "context": "CREATE TABLE ship", "answer": "SELECT"},
        [user("How many?\n\nCREATE TABLE ship"), assistant("SELECT")],
        [],
    ),
    "medical-o1": (
        {"Question": "What?", "Complex_CoT": THOUGHT, "Response": "This."},
        [user("What?"), assistant("This.", reasoning_content=THOUGHT)],
        [],
    ),
    "problem, thinking, solution": (
        {"problem": "What?", "thinking": THOUGHT, "solution": "This."},
        [user("What?"), assistant("This.", reasoning_content=THOUGHT)],
        [],
    ),
    "nemotron": (
        {"input": [user("q")], "output": "a", "reasoning": "on", "system_prompt": "Think.", "version": "1"},
        [system("Think."), user("q"), assistant("a")],
        ["reasoning", "version"],
    ),
    "an instruction for the whole task": (
        {"instruction": "Be brief.", "question": "What?", "answer": "This."},
        [system("Be brief."), user("What?"), assistant("This.")],
        [],
    ),
    "documents": (
        {"query": "What?", "documents": ["one", "two"], "response": "This."},
        [user("What?\n\none\n\ntwo"), assistant("This.")],
        [],
    ),
    "hotpot": (
        {"question": "What?", "context": {"title": ["t"]}, "answer": "This.", "level": "easy"},
        [user('What?\n\n{"title": ["t"]}'), assistant("This.")],
        ["level"],
    ),
    "arc": (
        {"question": "Which?", "choices": {"text": ["this", "that"], "label": ["1", "2"]}, "answer": "1"},
        [user("Which?\n\n1. this\n2. that"), assistant("1")],
        [],
    ),
    "input that is no text": (
        {"instruction": "Add.", "input": [1, {"x": "ü"}], "output": "3"},
        [user('Add.\n\n[1, {"x": "ü"}]'), assistant("3")],
        [],
    ),
    "input that is a number": (
        {"instruction": "Add 5.", "input": 5, "output": "10"},
        [user("Add 5.\n\n5"), assistant("10")],
        [],
    ),
    "a context that the question holds": (
        {"question": "By this: The pier was built in 1911. When?", "context": "The pier was built in 1911.", "answer": "1911"},
        [user("By this: The pier was built in 1911. When?"), assistant("1911")],
        [],
    ),
    "ultrachat": ({"prompt": "What is it?", "prompt_id": "x", "messages": ONE_TURN}, ONE_TURN, ["prompt", "prompt_id"]),
    "magpie": ({"conversations": ONE_TURN, "instruction": "x", "response": "y"}, ONE_TURN, ["instruction", "response"]),
    "text beside messages": ({"text": "source page", "messages": ONE_TURN}, ONE_TURN, ["text"]),
    "text beside a pair": (
        {"text": "source page", "question": "What is it?", "answer": "It is this."}, ONE_TURN, ["text"],
    ),
    "system beside messages": (
        {"system_message": "Be brief.", "messages": ONE_TURN}, [system("Be brief."), *ONE_TURN], [],
    ),
    "another system message": (
        {"system": "Be long.", "messages": [system("Be brief."), *ONE_TURN]}, [system("Be brief."), *ONE_TURN], ["system"],
    ),
    "thoughts beside one answer": (
        {"reasoning": THOUGHT, "messages": ONE_TURN}, [ONE_TURN[0], {**ONE_TURN[1], "reasoning_content": THOUGHT}], [],
    ),
    "thoughts beside two answers": (
        {"reasoning": THOUGHT, "messages": ONE_TURN * 2}, ONE_TURN * 2, ["reasoning"],
    ),
    "ms-swift": (
        {"query": "q2", "response": "a2", "system": "s", "history": [["q1", "a1"]]},
        [system("s"), user("q1"), assistant("a1"), user("q2"), assistant("a2")],
        [],
    ),
    "ms-swift's pairs": (
        {"system": "s", "conversation": [{"human": "q", "assistant": "a"}]}, [system("s"), user("q"), assistant("a")], [],
    ),
    "capybara": (
        {"source": "s", "conversation": [{"input": "q", "output": "a"}]}, [user("q"), assistant("a")], ["source"],
    ),
    "history as JSON text": (
        {"instruction": "q2", "output": "a2", "history": '[["q1", "a1"]]'},
        [user("q1"), assistant("a1"), user("q2"), assistant("a2")],
        [],
    ),
    "history of messages": (
        {"instruction": "q2", "output": "a2", "history": [user("q1"), assistant("a1")]},
        [user("q1"), assistant("a1"), user("q2"), assistant("a2")],
        [],
    ),
    "empty history": ({"instruction": "q", "output": "a", "history": "[]"}, [user("q"), assistant("a")], []),
    "no input": ({"instruction": "q", "input": "nan", "output": "a"}, [user("q"), assistant("a")], []),
    "not a number": ({"instruction": "q", "input": float("nan"), "output": "a"}, [user("q"), assistant("a")], []),
    "a number as answer": ({"problem": "6 x 7", "answer": 42}, [user("6 x 7"), assistant("42")], []),
    "a date as answer": ({"question": "When?", "answer": datetime.date(1911, 5, 4)}, [user("When?"), assistant("1911-05-04")], []),
    "a decimal as answer": ({"question": "?", "answer": decimal.Decimal("1.50")}, [user("?"), assistant("1.50")], []),
    "messages as JSON text": ({"messages": json.dumps(ONE_TURN), "id": 1}, ONE_TURN, ["id"]),
    "messages as pandas writes them": ({"messages": str(ONE_TURN)}, ONE_TURN, []),
    "messages as pandas reads them": ({"messages": np.array(ONE_TURN, dtype=object)}, ONE_TURN, []),
    "prompt as JSON text": ({"prompt": json.dumps(ONE_TURN[:1]), "completion": json.dumps(ONE_TURN[1:])}, ONE_TURN, []),
    "names in capitals and with spaces": (
        {" Question": "q", "Answer ": "a", "System Prompt": "s"}, [system("s"), user("q"), assistant("a")], [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", USED)
def test_columns_are_used_where_they_have_a_place_and_named_where_not(name):
    row, messages, unused = USED[name]
    example = convert(row)
    assert example.messages == messages
    assert example.unused == unused


TOOL_COLUMNS = ("tools", "functions", "tool_defs", "available_tools", "Tools")


@pytest.mark.parametrize("name", TOOL_COLUMNS)
def test_tools_go_by_many_names_and_may_be_bare_functions_or_json_text(name):
    for given in ([WEATHER], [WEATHER["function"]], json.dumps([WEATHER]), [json.dumps(WEATHER)]):
        example = convert({"messages": ONE_TURN, name: given})
        assert (example.tools, example.unused) == ([WEATHER], [])


def test_calls_as_answers_are_tool_calls():
    row = {
        "id": 1,
        "query": "Weather?",
        "tools": [WEATHER],
        "answers": '[{"name": "weather", "arguments": {"city": "Bern"}}]',
    }
    example = convert(row)
    function = {"name": "weather", "arguments": {"city": "Bern"}}
    assert example.messages[1]["tool_calls"] == [{"type": "function", "function": function}]
    assert example.unused == ["id"]


REFUSED = {
    "label beside a completion": ({"prompt": "p", "completion": "c", "label": False}, "row has 'label' = False beside an answer"),
    "label as number": ({"messages": ONE_TURN, "label": 1}, "row has 'label' = 1 beside an answer"),
    "label as word": ({"question": "q", "answer": "a", "kto_tag": "undesirable"}, "row has 'kto_tag'"),
    "system beside plain completions": (
        {"prompt": "p", "completion": "c", "system": "s"}, r"row has \['system'\] beside a plain prompt and completion.*columns: \{instruction: prompt",
    ),
    "context beside plain completions": ({"prompt": "p", "completion": "c", "context": "x"}, r"row has \['context'\]"),
    "images": ({"messages": ONE_TURN, "images": ["x.png"]}, "row has 'images'; oribi trains on text only"),
    "the number of a choice": ({"question": "q", "choices": ["x", "y"], "answer": 1}, "'answer' is int 1, the number of a choice"),
    "an answer that is no text": ({"question": "q", "answer": {"value": "x"}}, "'answer' is dict .*; it must be text"),
    "bytes": ({"question": "q", "answer": b"x"}, "'answer' is bytes"),
    "history of one text": ({"instruction": "q", "output": "a", "history": [["h1"]]}, r"'history' holds list \['h1'\]"),
    "kwargs": ({"messages": ONE_TURN, "chat_template_kwargs": "thinking"}, "'chat_template_kwargs' is text but no JSON"),
    "a table that was not split": ({"instruction;output": "q;a"}, "the only column is 'instruction;output'.*separate its columns by that"),
    "half of a pair": ({"question": "q"}, "the only column is 'question'.*dataset_text_field: question"),
    "messages under another name": ({"data": json.dumps(ONE_TURN)}, r"holds messages as JSON text.*columns: \{messages: data\}"),
    "chat as plain words": ({"chat": "USER: hi", "system": "s"}, "'chat' is str 'USER: hi'; it must be a list of messages"),
    "nested ids": ({"input_ids": [[1, 2]]}, r"'input_ids' holds list \[1, 2\]; it must be a list of whole numbers"),
    "packed tokens": ({"input_ids": [1, 2, 3], "seq_lengths": [1, 2]}, "several packed examples"),
    "restarting positions": ({"input_ids": [1, 2, 3], "position_ids": [0, 0, 1]}, "several packed examples"),
    "a hole in the attention mask": ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "hides tokens in the middle"),
    "an attention mask of another length": ({"input_ids": [1, 2], "attention_mask": [1]}, "'attention_mask' has 1 entries"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_and_must_not_be_dropped_is_refused(name):
    row, message = REFUSED[name]
    with pytest.raises(DataError, match=message):
        convert(row)


def test_masks_of_tokens_are_honoured():
    padded = {"input_ids": [0, 5, 6, 7, 0], "attention_mask": [0, 1, 1, 1, 0]}
    assert convert(padded) == Tokens([5, 6, 7], [5, 6, 7])
    both = {**padded, "labels": [-100, -100, 6, 7, -100], "loss_mask": [0, 1, 1, 0, 0]}
    assert convert(both) == Tokens([5, 6, 7], [-100, 6, -100])
    assert convert({"input_ids": np.array([5, 6]), "length": 2}).unused == ["length"]


def test_a_null_is_no_column_and_no_format():
    row_format = recognise_format({"id": 1, "messages": ONE_TURN, "category": None})
    assert row_format.convert({"id": 1, "messages": ONE_TURN, "category": None}).unused == ["id"]
    with pytest.raises(
        DataError, match=r"row has an empty \(null\) 'messages'; its keys are \['id', 'messages'\]"
    ):
        recognise_format({"id": 1, "messages": None})


def test_later_rows_may_have_more_columns_but_not_another_format():
    row_format = recognise_format({"question": "q", "answer": "a"})
    more = row_format.convert({"question": "q", "answer": "a", "context": "c", "topic": "t"})
    assert (more.messages[0], more.unused) == (user("q\n\nc"), ["topic"])
    with pytest.raises(DataError, match="the row is messages .* too, and the rows before it are question"):
        row_format.convert({"question": "q", "answer": "a", "messages": ONE_TURN})


def test_a_renamed_column_leaves_the_one_of_its_name_unused():
    row = {"question": "q", "output": "raw", "solution_text": "a"}
    example = convert(row, columns={"answer": "solution_text"})
    assert example.messages == [user("q"), assistant("a")]
    assert example.unused == ["output"]
    with pytest.raises(ConfigError, match="did you mean columns = {'answer': 'solution_text'}"):
        convert(row, columns={"solution_text": "answer"})
    with pytest.raises(ConfigError, match=r"did you mean question\?"):
        convert(row, columns={"qestion": "output"})
    with pytest.raises(ConfigError, match="role_aliases: teacher: a role must be one of system"):
        convert({"messages": ONE_TURN}, role_aliases={"coach": "teacher"})


def test_a_column_map_is_read_without_case_too():
    row = {"Task": "q", "My Reply": "a"}
    assert convert(row, columns={"Question": "task", "answer": "my reply"}).messages == [
        user("q"),
        assistant("a"),
    ]
    assert convert({"Body": "t"}, text_field="body") == Document("t")


def test_nemo_names_the_role_that_is_not_trained():
    row = {
        "mask": "User",
        "type": "x",
        "conversations": [{"from": "User", "value": "q"}, {"from": "Assistant", "value": "a"}],
    }
    example = convert(row)
    assert (example.trained, example.unused) == ([False, None], ["type"])


CALL = {"x": 0, "y": 1, "text": None}
MOVE = {
    "type": "function",
    "function": {
        "name": "move",
        "parameters": {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}}, "required": ["x"]},
    },
}  # fmt: skip


def arguments_of(arguments, tools, **more):
    messages = [{**user("go"), **more}, assistant("", tool_calls=[call("move", **arguments)])]
    example = convert({"messages": messages, "tools": tools})
    return example.messages[1]["tool_calls"][0]["function"]["arguments"], example


def test_nulls_of_arguments_stay_where_the_tool_requires_or_allows_them():
    assert arguments_of(CALL, [MOVE])[0] == {"x": 0, "y": 1}
    assert arguments_of({"x": None, "y": None}, [MOVE])[0] == {"x": None}
    nullable = json.loads(json.dumps(MOVE))
    for allowed in (
        {"type": ["integer", "null"]},
        {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        {"enum": [1, None]},
        {"type": "integer", "nullable": True},
    ):
        nullable["function"]["parameters"]["properties"]["y"] = allowed
        assert arguments_of({"x": 1, "y": None}, [nullable])[0] == {"x": 1, "y": None}


def test_nulls_of_a_tool_without_a_schema_stay_unless_a_columnar_format_wrote_them():
    assert arguments_of(CALL, None)[0] == CALL
    assert arguments_of(CALL, None, tool_calls=None)[0] == {"x": 0, "y": 1}


def test_a_filled_schema_is_the_one_that_the_row_had():
    filled = json.loads(json.dumps(MOVE))
    filled["function"]["parameters"]["properties"]["text"] = None
    arguments, example = arguments_of(CALL, [filled])
    assert (arguments, example.tools) == ({"x": 0, "y": 1}, [MOVE])
    assert example.notes == [
        "a null that the tool's schema neither requires nor allows is left out of a call"
    ]


def test_a_data_set_gives_the_rows_that_it_was_made_of():
    say = {"type": "function", "function": {"name": "say", "parameters": {"type": "object", "properties": {"text": {"type": ["string", "null"]}}, "required": ["text"]}}}  # fmt: skip
    rows = [
        {
            "messages": [user("go"), assistant("", tool_calls=[call("move", x=0, y=1)])],
            "tools": json.dumps([MOVE]),
        },
        {
            "messages": [user("say"), assistant("", tool_calls=[call("say", text=None)])],
            "tools": json.dumps([say]),
        },
    ]
    row_format = recognise_format(rows[0])
    for row, given in zip(rows, datasets.Dataset.from_list(rows)):
        assert row_format.convert(given) == row_format.convert(row)


def test_text_is_text_whatever_stands_beside_it():
    assert convert({"text": "t", "id": 1}) == Document("t")
    assert convert({"text": "t", "id": 1}).unused == ["id"]
    assert isinstance(convert({"messages": ONE_TURN, "text": "t"}), Conversation)
