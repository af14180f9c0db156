"""Masks and Modelfiles under the chat templates of the models people tune in 2026.

`templates/` holds templates written in the manner of repositories whose own TRL does not ship.
"""

import copy
from pathlib import Path

import pytest

from oribi.chat.masking import BARE, Masker
from oribi.chat.rendering import ChatTemplate
from oribi.errors import DataError
from oribi.gguf.modelfile import NoModelfile, modelfile
from tests.chat.test_masking import spans_of, trained_text, upstream
from tests.data.tokenizers_small import (
    FAMILY_TOKENS,
    TWO_TURNS,
    WEATHER,
    WITH_TOOLS,
    assistant,
    byte_level,
    call,
    from_messages,
    user,
)
from tests.gguf.test_modelfile import require_same_prompts_in_ollama

OWN = Path(__file__).parent / "templates"
TOKENS = [
    "<|tool_call>", "<tool_call|>", "<|tool_response>", "[INST]", "[/INST]", "[ARGS]", "[THINK]", "[/THINK]", "<|eot|>", "<|eom|>",
    "[|endofturn|]", "[|system|]", "[|user|]", "[|assistant|]", "[|tool|]", "<｜hy_begin▁of▁sentence｜>", "<｜hy_User｜>",
    "<｜hy_place▁holder▁no▁3｜>", "<｜hy_place▁holder▁no▁2｜>", "<｜hy_Assistant｜>", "<|begin_of_sentence|>", "[gMASK]", "<sop>",
    "<|observation|>", "<seed:bos>", "<seed:eos>", "<seed:think>", "</seed:think>",
]  # fmt: skip
# a thought, a call, its result, a thought, an answer
AGENT = [
    WITH_TOOLS[0],
    assistant("", reasoning_content="I must look.", tool_calls=[call("weather", city="Bern")]),
    *WITH_TOOLS[2:3],
    assistant("It is sunny.", reasoning_content="So it is."),
]
QWEN_CALL = "<tool_call>\n<function=weather>\n<parameter=city>\nBern\n</parameter>\n</function>\n</tool_call><|im_end|>"
JSON_CALL = '{"name": "weather", "arguments": {"city": "Bern"}}'
NO_CALLS = "tool calls, so the turn is not trained"
# template -> what ends an answer within a conversation and at its end, what is trained of AGENT, and what the report says of it
CASES: dict[str, tuple[str, str, list[str], set[str]]] = {
    **dict.fromkeys(
        ("qwen3_5_think", "qwen3_5_nothink", "qwen3_6"),
        ("<|im_end|>", "<|im_end|>",
         [f"I must look.\n</think>\n\n{QWEN_CALL}", "So it is.\n</think>\n\nIt is sunny.<|im_end|>"], set()),
    ),
    "gemma4_v5": (
        "<turn|>", "<turn|>",
        ['<|channel>thought\nI must look.\n<channel|><|tool_call>call:weather{city:<|"|>Bern<|"|>}<tool_call|><|tool_response>',
         "So it is.\n<channel|>It is sunny.<turn|>"], set(),
    ),
    "lfm2_2_5_v2": (
        "<|im_end|>", "<|im_end|>",
        ["<think>I must look.</think><|tool_call_start|>[weather(city='Bern')]<|tool_call_end|><|im_end|>",
         "<think>So it is.</think>It is sunny.<|im_end|>"], set(),
    ),
    "ministral3": (
        "</s>", "</s>",
        ['[THINK]I must look.[/THINK][TOOL_CALLS]weather[ARGS]{"city": "Bern"}</s>', "[THINK]So it is.[/THINK]It is sunny.</s>"],
        set(),
    ),
    "granite4": (
        "<|end_of_text|>", "<|end_of_text|>",
        [f"<tool_call>\n{JSON_CALL}\n</tool_call><|end_of_text|>", "It is sunny.<|end_of_text|>"], {"thinking"},
    ),
    "olmo3": (
        "<|im_end|>", "</s>",
        ['<function_calls>weather(city="Bern")</function_calls><|im_end|>', "It is sunny.</s>"], {"thinking"},
    ),
    "exaone4": (
        "[|endofturn|]", "[|endofturn|]",
        [f"I must look.\n</think>\n\n<tool_call>{JSON_CALL}</tool_call>[|endofturn|]",
         "So it is.\n</think>\n\nIt is sunny.[|endofturn|]"], set(),
    ),
    "hunyuan": (
        "<｜hy_place▁holder▁no▁2｜>", "<｜hy_place▁holder▁no▁2｜>", ["It is sunny.<｜hy_place▁holder▁no▁2｜>"],
        {"thinking", "tool text", NO_CALLS},
    ),
    "ernie4_5": ("</s>", "</s>", ["It is sunny.</s>"], {"thinking", "tool text", NO_CALLS}),
    "glm4": ("", "", ["It is sunny."], {"thinking", BARE}),
    "seed_oss": (
        "<seed:eos>", "<seed:eos>",
        ["<seed:think>I must look.</seed:think>\n<seed:tool_call>\n<function=weather>\n<parameter=city>Bern</parameter>\n"
         "</function>\n</seed:tool_call><seed:eos>", "<seed:think>So it is.</seed:think>\nIt is sunny.<seed:eos>"], set(),
    ),
}  # fmt: skip


def source(name):
    own = OWN / f"{name}.jinja"
    return own.read_text(encoding="utf-8") if own.is_file() else upstream(name)


@pytest.fixture
def tokenizer():
    return copy.deepcopy(byte_level(tuple(dict.fromkeys([*FAMILY_TOKENS, *TOKENS])), bos="<s>", eos="</s>"))


@pytest.mark.parametrize("system", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", CASES)
def test_every_answer_and_its_end_are_trained(name, system, tokenizer):
    within, final, _, _ = CASES[name]
    messages = [{"role": "system", "content": "Be brief."}] * system + TWO_TURNS
    spans, marked, masker = spans_of(tokenizer, from_messages(messages), template=source(name))
    assert spans == [f"It is this.{within}", f"That, too.{final}"]
    assert masker.ways == {"layout": 1}
    assert marked.left_out == []
    # an answer that the template does not end is ended by the tokenizer's EOS
    assert marked.closed is bool(final)
    # a prompt that ends with a space shares a token with the answer
    assert trained_text(tokenizer, marked).replace(" It is", "It is").replace(" That,", "That,") == "".join(
        spans
    ) + ("" if final else "</s>")


@pytest.mark.parametrize("name", CASES)
def test_thoughts_and_calls_are_trained_as_they_are_generated_or_named(name, tokenizer):
    _, _, trained, left_out = CASES[name]
    spans, marked, masker = spans_of(tokenizer, from_messages(AGENT, [WEATHER]), template=source(name))
    assert spans == trained
    assert set(marked.left_out) == left_out
    assert masker.ways == {"layout": 1}


@pytest.mark.parametrize("name", ["qwen3_5_think", "qwen3_6", "gemma4_v5", "lfm2_2_5_v2", "exaone4"])
def test_thoughts_that_a_template_drops_of_earlier_turns_are_trained_where_turns_are_split(name, tokenizer):
    masker = Masker(ChatTemplate(tokenizer, source(name)))
    conversation = from_messages([*AGENT, user("And now?"), assistant("It rains.")], [WEATHER])
    whole = masker.mark(conversation)
    assert [whole.text[a:b] for a, b in whole.spans] == [f"It rains.{CASES[name][1]}"]
    assert whole.left_out.count(BARE) == 2
    found = [[one.text[a:b] for a, b in one.spans] for one in map(masker.mark, masker.split(conversation))]
    assert [span for spans in found[:2] for span in spans] == CASES[name][2]


def test_a_call_whose_turn_cannot_be_told_is_refused(tokenizer):
    with pytest.raises(DataError, match="cannot tell exactly which text"):
        spans_of(tokenizer, from_messages(WITH_TOOLS, [WEATHER]), template=source("glm4"))


ALIKE = ("qwen3_5_nothink", "qwen3_6", "lfm2_v2", "gemma4", "glm4moe", "granite4", "seed_oss")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.long) if name in ALIKE else name
        for name in (*CASES, "lfm2_v2", "gemma4", "glm4moe")
    ],
)
def test_ollama_renders_it_as_trained(name, tokenizer):
    tokenizer.chat_template = source(name)
    assert tokenizer.bos_token == "<s>"
    require_same_prompts_in_ollama(tokenizer)


def test_a_template_that_writes_the_date_has_no_modelfile(tokenizer):
    tokenizer.chat_template = upstream("muse_glimmer")
    with pytest.raises(NoModelfile, match="writes today's date"):
        modelfile("m.gguf", tokenizer, [], None, adds_bos=False)


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    ["qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8", "lfm2", "lfm2_v2", "muse_glimmer", "cohere2", "nemotron_3_nano",
     "glm4moe"],
)  # fmt: skip
def test_masks_lie_within_what_trl_marks_by_hand(name, tokenizer):
    by_hand = ChatTemplate(tokenizer, upstream(f"{name}_training"))
    conversation = from_messages(TWO_TURNS)
    spans, _, _ = spans_of(tokenizer, conversation, template=upstream(name))
    text, blocks = by_hand.render_with_generation_spans(conversation.messages)
    assert len(blocks) == len(spans) == 2
    assert all(ours in text[first:last] for ours, (first, last) in zip(spans, blocks))
