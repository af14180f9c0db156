"""One message: roles, parts, thoughts, tool calls, and the marks that say what of it is trained."""

import json

import pytest

from oribi.data.conversations import recognise_format
from oribi.errors import DataError
from tests.data.tokenizers_small import assistant, call, from_messages, user


def answer(**message):
    example = from_messages([user("q"), {"role": "assistant", **message}])
    return example.messages[1], example.trained[1]


@pytest.mark.parametrize("role", ["User", " user ", "HUMAN", "prompter"])
def test_roles_are_compared_without_case_and_spaces(role):
    example = from_messages([{"role": role, "content": "q"}, {"Role": "GPT", "Content": "a"}])
    assert example.messages == [user("q"), assistant("a")]


def test_role_aliases_are_compared_so_too():
    row = {"messages": [user("q"), {"role": "COACH", "content": "a"}]}
    assert recognise_format(row, role_aliases={"Coach": "assistant"}).convert(row).messages[1] == assistant(
        "a"
    )


@pytest.mark.parametrize(
    "name", ["train", "training", "trainable", "loss", "weight", "loss_mask", "loss_scale"]
)
def test_marks_say_what_is_trained(name):
    assert answer(content="a", **{name: 0}) == (assistant("a"), False)
    assert answer(content="a", **{name: 1.0}) == (assistant("a"), True)
    assert answer(content="a", **{name: True}) == (assistant("a"), True)
    assert answer(content="a", **{name: None}) == (assistant("a"), None)


@pytest.mark.parametrize("name", ["mask", "masked"])
def test_what_is_masked_is_not_trained(name):
    assert answer(content="a", **{name: True}) == (assistant("a"), False)
    assert answer(content="a", **{name: False}) == (assistant("a"), None)


def text(words, **marks):
    return {"type": "text", "text": words, **marks}


PARTS = {
    "one part is not": ([text("Let me think. ", train=False), text("4.", train=True)], ((0, 14),)),
    "no mark is trained": ([text("one "), text("two ", weight=0), text("three")], ((4, 8),)),
    "all are": ([text("one ", loss=True), text("two", loss=True)], True),
    "none is": ([text("one ", training=False), text("two", training=False)], False),
    "no marks": ([text("one "), "two"], None),
}


@pytest.mark.parametrize("name", PARTS)
def test_marks_of_parts_are_spans(name):
    parts, trained = PARTS[name]
    assert answer(content=parts)[1] == trained


def test_offsets_of_axolotl_include_the_last_character():
    detail = [
        {"begin_offset": 0, "end_offset": 8, "train": False},
        {"begin_offset": 9, "end_offset": 18, "train": True},
        {"begin_offset": 19, "end_offset": 30, "train": False},
    ]
    message, trained = answer(content="I'm doing very well, thank you!", train_detail=detail)
    assert message == assistant("I'm doing very well, thank you!")
    assert trained == ((0, 9), (19, 31))


THOUGHT = "First this."
THOUGHTS = {
    "reasoning_content": {"reasoning_content": THOUGHT},
    "thought": {"reasoning_content": THOUGHT},
    "reasoning": {"reasoning": THOUGHT},  # read under its own name, and renamed to the template's
    "thinking": {"thinking": THOUGHT},
}


@pytest.mark.parametrize("name", THOUGHTS)
def test_thoughts_of_a_message(name):
    assert answer(content="a", **{name: THOUGHT})[0] == assistant("a", **THOUGHTS[name])


def test_thoughts_in_parts_and_details():
    thinking = [{"type": "thinking", "thinking": THOUGHT}, text("a")]
    assert answer(content=thinking)[0] == assistant("a", reasoning_content=THOUGHT)
    details = [{"type": "reasoning.text", "text": THOUGHT}]
    assert answer(content="a", reasoning_details=details)[0] == assistant("a", reasoning_content=THOUGHT)


CALL = {"type": "function", "function": {"name": "now", "arguments": {"x": 1}}}
CALLS = {
    "json text": '[{"name": "now", "arguments": {"x": 1}}]',
    "one object": {"name": "now", "arguments": {"x": 1}},
    "texts": ['{"name": "now", "arguments": {"x": 1}}'],
    "langchain": [{"name": "now", "args": {"x": 1}, "type": "tool_call"}],
    "llama": [{"name": "now", "parameters": {"x": 1}}],
    "as they should be": [CALL],
}


@pytest.mark.parametrize("name", CALLS)
def test_tool_calls_of_every_form(name):
    assert answer(tool_calls=CALLS[name])[0] == assistant("", tool_calls=[CALL])


def test_an_older_function_call_is_a_tool_call():
    assert answer(content=None, function_call=CALL["function"])[0] == assistant("", tool_calls=[CALL])


@pytest.mark.parametrize("role", ["function_call", "tool_call"])
def test_calls_as_messages_are_one_turn_of_the_assistant(role):
    said = {"role": role, "content": json.dumps(CALL["function"])}
    example = from_messages([user("q"), said, said, {"role": "observation", "content": "1"}, assistant("a")])
    assert example.messages == [
        user("q"),
        assistant("", tool_calls=[CALL, CALL]),
        {"role": "tool", "content": "1"},
        assistant("a"),
    ]
    assert len(example.trained) == 4


RESULTS = {
    "objects": [{"title": "Flood", "url": "x"}, {"title": "Fair", "url": "y"}],
    "objects with a text": [{"title": "Flood", "text": "It rains."}],
    "numbers": [1, 2, 3],
    "an object": {"sunny": True},
    "a number": 3,
}


@pytest.mark.parametrize("name", RESULTS)
def test_what_a_tool_answers_is_text_or_json(name):
    said = {"role": "tool", "content": RESULTS[name], "tool_call_id": "call00001"}
    example = from_messages([user("q"), assistant("", tool_calls=[call("news")]), said, assistant("a")])
    assert json.loads(example.messages[2]["content"]) == RESULTS[name]
    assert len(example.notes) == 1


WRONG = {
    "numbers": ({"content": [1, 2]}, r"message 2 has content list \[1, 2\]; each part must be text"),
    "objects": ({"content": [{"title": "x"}]}, "each part must be text"),
    "an image": ({"content": [text("x"), {"type": "image_url"}]}, r"parts of type \['image_url'\]; oribi trains on text only"),
    "an image without a type": ({"content": [{"image": "x"}]}, "each part must be text"),
    "a mark": ({"content": "a", "loss": "yes"}, "message 2 has loss = 'yes'; it must be true or false"),
    "half a mark": ({"content": "a", "weight": 0.5}, "message 2 has weight = 0.5"),
    "two marks": ({"content": "a", "train": True, "weight": 0}, "message 2 has marks that contradict each other"),
    "offsets": ({"content": "a", "train_detail": [{"begin_offset": 0, "end_offset": 1, "train": True}]}, "within its 1 characters"),
    "calls": ({"content": "a", "tool_calls": [3]}, "message 2 has the tool call int 3"),
    "calls as words": ({"content": "a", "tool_calls": "now()"}, "'tool_calls of message 2' is text but no JSON"),
    "thoughts": ({"content": "a", "thinking": 3}, "message 2 has thinking int 3; it must be text"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_message_is_named(name):
    message, expected = WRONG[name]
    with pytest.raises(DataError, match=expected):
        answer(**message)


def test_a_role_must_be_text():
    with pytest.raises(DataError, match=r"message 1 has role \['user'\]; it must be text"):
        from_messages([{"role": ["user"], "content": "q"}])


def test_other_keys_of_messages_are_named_and_those_of_templates_are_not():
    row = {
        "messages": [{**user("q"), "info": {"x": 1}, "name": "Ada"}, assistant("a", tool_calls=[call("f")])]
    }
    example = recognise_format(row).convert(row)
    assert example.message_keys == ["info"]
    assert example.messages[0]["name"] == "Ada"
