"""Roles that a chat template does not write: the text stays, under the nearest role that it writes."""

import pytest

from oribi.chat.masking import Masker
from oribi.chat.named_templates import get_chat_template
from oribi.chat.rendering import ChatTemplate
from tests.chat.test_masking import upstream
from tests.data.tokenizers_small import assistant, from_messages, user

CALL = {"role": "assistant", "content": "", "function_call": {"name": "look", "arguments": "{}"}}
SYSTEM, DEVELOPER = {"role": "system", "content": "Be kind."}, {"role": "developer", "content": "Be short."}
# trains its tools' results by the role only; a developer's text is left out
DROPS = (
    "{% for m in messages %}{% if m.role in ('system', 'user', 'assistant', 'tool') %}"
    "{{ '<|im_start|>' + m.role + '\n' + (m.content or '') + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def mark(tokenizer, messages, template=None):
    return Masker(ChatTemplate(tokenizer, template)).mark(from_messages(messages))


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "granite"])
def test_a_function_message_is_written_as_the_tool_result_that_it_is(name, family_tokenizer):
    template = upstream(name) if name == "qwen3" else None
    if template is None:
        get_chat_template(family_tokenizer, {"llama3_1": "llama-3.1", "granite": "granite"}[name])
    rows = {
        role: mark(
            family_tokenizer,
            [user("q"), CALL, {"role": role, "name": "look", "content": "RESULT"}, assistant("done")],
            template,
        )
        for role in ("function", "tool")
    }
    assert "RESULT" in rows["function"].text
    assert rows["function"].text == rows["tool"].text
    assert rows["function"].spans == rows["tool"].spans
    assert rows["function"].notes == [
        "the chat template does not know the role 'function'; it is written as 'tool'"
    ]
    assert rows["tool"].notes == rows["function"].left_out == []


def test_a_role_that_the_template_writes_stays(chatml_tokenizer):
    marked = mark(
        chatml_tokenizer, [DEVELOPER, user("q"), {"role": "function", "content": "r"}, assistant("a")]
    )
    assert "<|im_start|>developer\nBe short." in marked.text
    assert "<|im_start|>function\nr" in marked.text
    assert marked.notes == []


@pytest.mark.parametrize("template", ["qwen3", DROPS], ids=["qwen3", "drops"])
def test_a_developer_message_is_written_as_the_system_message(template, family_tokenizer):
    template = upstream(template) if template == "qwen3" else template
    marked = mark(family_tokenizer, [DEVELOPER, user("q"), assistant("a")], template)
    assert (
        marked.text
        == mark(family_tokenizer, [{**DEVELOPER, "role": "system"}, user("q"), assistant("a")], template).text
    )
    assert marked.notes == ["the chat template does not know the role 'developer'; it is written as 'system'"]


@pytest.mark.parametrize("name", ["qwen3", "llama-3.1", "gemma-3"])
def test_a_developer_message_behind_the_system_message_is_joined_with_it(name, family_tokenizer):
    get_chat_template(family_tokenizer, name)
    marked = mark(family_tokenizer, [SYSTEM, DEVELOPER, user("q"), assistant("a")])
    both = {"role": "system", "content": "Be kind.\n\nBe short."}
    joined = mark(family_tokenizer, [both, user("q"), assistant("a")])
    assert (marked.text, marked.spans) == (joined.text, joined.spans)
    assert marked.notes == [
        "the chat template takes no developer message behind a system message; they are joined"
    ]


def test_instructions_within_a_conversation_stay_at_their_place(family_tokenizer):
    marked = mark(
        family_tokenizer, [SYSTEM, user("q"), assistant("a"), DEVELOPER, user("r"), assistant("b")], DROPS
    )
    assert "a<|im_end|>\n<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nr" in marked.text
    assert [marked.text[a:b] for a, b in marked.spans] == ["a<|im_end|>", "b<|im_end|>"]


def test_a_role_without_a_near_one_is_said_to_be_left_out(family_tokenizer):
    no_tools = DROPS.replace(", 'tool'", "")
    marked = mark(
        family_tokenizer,
        [user("q"), assistant("a"), {"role": "function", "content": "r"}, assistant("b")],
        no_tools,
    )
    assert marked.left_out == ["function text"]
    assert marked.notes == []
