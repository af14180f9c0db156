"""Masks from rendering: what is trained is what the assistant wrote and the token that ends it, or it is an error."""

import copy
from importlib import resources

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from oribi.chat.masking import BARE, BARE_ROW, Masker
from oribi.chat.named_templates import get_chat_template
from oribi.chat.rendering import ChatTemplate
from oribi.data.encoding import UNTRAINED, Encoder
from oribi.errors import DataError
from tests.data.tokenizers_small import (
    CHATML,
    FAMILY_TOKENS,
    TWO_TURNS,
    WEATHER,
    WITH_THINKING,
    WITH_TOOLS,
    assistant,
    byte_level,
    call,
    from_messages,
    sentence_piece,
    trained_runs,
    user,
)


def spans_of(tokenizer, conversation, train_on="responses", template=None):
    masker = Masker(ChatTemplate(tokenizer, template), train_on)
    marked = masker.mark(conversation)
    return [marked.text[a:b] for a, b in marked.spans], marked, masker


def trained_text(tokenizer, marked):
    encoded = Encoder(tokenizer).encode([marked], [False])[0]
    return tokenizer.decode([t for t, label in zip(encoded.ids, encoded.labels) if label != UNTRAINED])


# Any text without the letters of which the special tokens of the templates here consist
words = st.text(st.characters(codec="utf-8", exclude_characters="<|>[]/\r"), min_size=1).filter(str.strip)
turns = st.lists(st.tuples(words, words), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60)
@given(pairs=turns, system=st.none() | words)
def test_trained_tokens_decode_to_the_answers_and_their_ends(pairs, system):
    tokenizer = copy.deepcopy(byte_level(("<|endoftext|>", "<|im_start|>")))
    tokenizer.chat_template = CHATML
    messages = [{"role": "system", "content": system}] if system is not None else []
    for question, answer in pairs:
        messages += [
            user(question),
            assistant("." + answer),
        ]  # a line break first would join the header's token
    spans, marked, masker = spans_of(tokenizer, from_messages(messages))
    expected = [f".{answer}<|im_end|>" for _, answer in pairs]
    assert spans == expected
    assert trained_text(tokenizer, marked) == "".join(expected)
    assert masker.ways == {"layout": 1}


@settings(deadline=None, max_examples=40)
@given(
    pairs=turns, name=st.sampled_from(["llama-3", "gemma", "mistral-tekken", "qwen-3", "command-r", "phi-3"])
)
def test_templates_that_trim_train_the_trimmed_answers(pairs, name):
    tokenizer = copy.deepcopy(byte_level(tuple(FAMILY_TOKENS), bos="<s>", eos="</s>", add_bos=True))
    get_chat_template(tokenizer, name)
    end = tokenizer.eos_token
    messages = [m for q, a in pairs for m in (user(q), assistant("." + a))]
    spans, marked, _ = spans_of(tokenizer, from_messages(messages))
    trims = name in ("llama-3", "gemma", "command-r")
    assert spans == [f".{a.rstrip() if trims else a}{end}" for _, a in pairs]
    encoded = Encoder(tokenizer).encode([marked], [False])[0]
    assert encoded.ids == tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
    assert trained_text(tokenizer, marked) == "".join(spans)


@settings(deadline=None, max_examples=25)
@given(pairs=turns, kind=st.sampled_from(["bpe", "unigram"]))
@example(pairs=[("0", " 0")], kind="bpe")
def test_sentence_piece_tokenizers_train_every_answer(pairs, kind):
    tokenizer = copy.deepcopy(sentence_piece(kind))
    get_chat_template(tokenizer, "mistral")
    messages = [m for q, a in pairs for m in (user(q), assistant(a))]
    spans, marked, _ = spans_of(tokenizer, from_messages(messages))
    assert spans == [f" {a}</s>" for _, a in pairs]
    encoded = Encoder(tokenizer).encode([marked], [False])[0]
    trained = [label for label in encoded.labels if label != UNTRAINED]
    assert trained.count(tokenizer.eos_token_id) == len(pairs)
    assert encoded.ids.count(tokenizer.bos_token_id) == 1
    # byte fallback keeps every character; a first space may lie in a token of the prompt, and decoding drops one
    if kind == "bpe":
        decoded = trained_runs(tokenizer, encoded)
        assert len(decoded) == len(spans)
        assert {span.removesuffix(text) for text, span in zip(decoded, spans)} <= {"", " ", "  "}


def test_only_the_last_response(chatml_tokenizer):
    spans, _, _ = spans_of(chatml_tokenizer, from_messages(TWO_TURNS), "last_response")
    assert spans == ["That, too.<|im_end|>"]


def test_everything(chatml_tokenizer):
    spans, marked, _ = spans_of(chatml_tokenizer, from_messages(TWO_TURNS), "everything")
    assert spans == [marked.text]


@pytest.mark.parametrize("mark", [{"train": False}, {"weight": 0}])
def test_a_message_can_be_left_out(chatml_tokenizer, mark):
    messages = [TWO_TURNS[0], {**TWO_TURNS[1], **mark}, *TWO_TURNS[2:]]
    spans, marked, _ = spans_of(chatml_tokenizer, from_messages(messages))
    assert spans == ["That, too.<|im_end|>"]
    assert marked.text == chatml_tokenizer.apply_chat_template(TWO_TURNS, tokenize=False)


def test_a_message_can_be_trained_besides_the_last(chatml_tokenizer):
    messages = [TWO_TURNS[0], {**TWO_TURNS[1], "train": True}, *TWO_TURNS[2:]]
    spans, _, _ = spans_of(chatml_tokenizer, from_messages(messages), "last_response")
    assert spans == ["It is this.<|im_end|>", "That, too.<|im_end|>"]


def test_other_roles_cannot_be_trained(chatml_tokenizer):
    with pytest.raises(DataError, match="message 1 \\(user\\) is marked for training"):
        spans_of(chatml_tokenizer, from_messages([{**TWO_TURNS[0], "train": True}, TWO_TURNS[1]]))


def test_an_answer_that_quotes_the_markup_is_trained_whole(chatml_tokenizer):
    """Searching for markers would end the answer at the quote."""
    quoted = "Write '<|im_start|>user' before a question, and <|im_start|>assistant\nbefore an answer."
    spans, _, _ = spans_of(chatml_tokenizer, from_messages([user("How?"), assistant(quoted)]))
    assert spans == [quoted + "<|im_end|>"]


def test_a_question_that_quotes_an_answer_is_not_trained(chatml_tokenizer):
    question = "What follows <|im_start|>assistant\n?"
    spans, _, _ = spans_of(chatml_tokenizer, from_messages([user(question), assistant("An answer.")]))
    assert spans == ["An answer.<|im_end|>"]


def upstream(name):
    """A template of a model's repository, as TRL ships it."""
    source = resources.files("trl").joinpath("chat_templates", f"{name}.jinja")
    if not source.is_file():
        pytest.skip(f"this version of trl has no {name}.jinja")
    return source.read_text(encoding="utf-8")


THOUGHTS_AND_ANSWERS = {  # the last turn with its thought, as the template writes it
    "qwen3": "<think>\nSecond thought\n</think>\n\nThat, too.<|im_end|>",
    "gptoss": "<|channel|>analysis<|message|>Second thought<|end|>"
    "<|start|>assistant<|channel|>final<|message|>That, too.<|return|>",
    "gemma4_v5": "<|channel>thought\nSecond thought\n<channel|>That, too.<turn|>",
    "glm4moe": "\n<think>Second thought</think>\nThat, too.",
    "nemotron_3_nano": "Second thought\n</think>\nThat, too.<|im_end|>",
}


@pytest.mark.parametrize("name", THOUGHTS_AND_ANSWERS)
def test_a_turn_whose_thought_the_template_drops_is_not_trained_bare(name, family_tokenizer):
    spans, marked, _ = spans_of(family_tokenizer, from_messages(WITH_THINKING), template=upstream(name))
    assert spans == [THOUGHTS_AND_ANSWERS[name]]
    assert "First thought" not in marked.text
    assert marked.left_out == ["thinking", BARE]


@pytest.mark.parametrize("name", THOUGHTS_AND_ANSWERS)
def test_split_turns_are_trained_with_their_thoughts(name, family_tokenizer):
    masker = Masker(ChatTemplate(family_tokenizer, upstream(name)))
    spans = []
    for part in masker.split(from_messages(WITH_THINKING)):
        marked = masker.mark(part)
        spans.append([marked.text[a:b] for a, b in marked.spans])
        assert BARE not in marked.left_out
    last = THOUGHTS_AND_ANSWERS[name]
    first = last.replace("Second thought", "First thought").replace("That, too.", "It is this.")
    assert spans == [[first], [last]]


def test_thoughts_closed_within_the_content_count_as_thoughts(family_tokenizer):
    messages = [user("a"), assistant("t1</think>\n\nb"), user("c"), assistant("t2\n</think>\n\nd")]
    spans, marked, _ = spans_of(family_tokenizer, from_messages(messages), template=upstream("qwen3"))
    assert spans == ["<think>\nt2\n</think>\n\nd<|im_end|>"]
    assert marked.left_out == ["thinking", BARE]


def test_empty_thoughts_leave_nothing_out(family_tokenizer):
    messages = [user("a"), assistant("<think>\n\n</think>\n\nb"), user("c"), assistant("d")]
    spans, marked, _ = spans_of(family_tokenizer, from_messages(messages), template=upstream("qwen3"))
    assert spans == ["b<|im_end|>", "d<|im_end|>"]
    assert marked.left_out == []


def test_a_template_that_opens_a_thought_and_never_writes_one_trains_no_thinking_row(family_tokenizer):
    conversation = from_messages(WITH_THINKING)
    spans, marked, _ = spans_of(family_tokenizer, conversation, template=upstream("deepseek_r1_distill"))
    assert (spans, marked.untrained) == ([], BARE_ROW)


def test_a_template_without_thoughts_trains_the_answers(family_tokenizer):
    """Its prompts are those of inference, with no thought in any of them."""
    spans, marked, _ = spans_of(family_tokenizer, from_messages(WITH_THINKING), template=CHATML)
    assert spans == ["It is this.<|im_end|>", "That, too.<|im_end|>"]
    assert marked.left_out == ["thinking", "thinking"]


def test_a_dropped_thought_is_seen_where_texts_are_rewritten(family_tokenizer):
    rewriting = upstream("qwen3").replace("content.lstrip('\\n')", "content.lstrip('\\n') | upper")
    messages = [user("a"), assistant("b", reasoning_content="T1"), user("c"), assistant("d")]
    spans, marked, masker = spans_of(family_tokenizer, from_messages(messages), template=rewriting)
    assert [span.upper() for span in spans] == ["D<|IM_END|>"]
    assert BARE in marked.left_out or masker.ways["layout"] == 0


def agent(text="", **more):
    first = assistant(text, tool_calls=[call("weather", city="Bern")], **more)
    return from_messages([WITH_TOOLS[0], first, *WITH_TOOLS[2:]], [WEATHER])


AGENT_ROWS = {  # (template, what the calling turn says besides) -> what is trained
    ("gptoss", "reasoning_content"): ["<|channel|>final<|message|>It is sunny.<|return|>"],
    ("gptoss", "content"): ["<|channel|>final<|message|>It is sunny.<|return|>"],
    ("gemma4_v5", "content"): [
        '<|tool_call>call:weather{city:<|"|>Bern<|"|>}<tool_call|><|tool_response>',
        "It is sunny.<turn|>",
    ],
    ("deepseek_r1_distill", "reasoning_content"): ["It is sunny.<｜end▁of▁sentence｜>"],
    ("deepseek_r1_distill", "content"): ["It is sunny.<｜end▁of▁sentence｜>"],
}


@pytest.mark.parametrize(("name", "field"), AGENT_ROWS)
def test_agent_rows_train_what_the_template_writes_as_in_generation(name, field, family_tokenizer):
    family_tokenizer.add_tokens(["<tool_call|>", "<|tool_response>"], special_tokens=True)
    words = {"reasoning_content": "I must look."} if field == "reasoning_content" else {"text": "I look."}
    spans, marked, masker = spans_of(family_tokenizer, agent(**words), template=upstream(name))
    assert spans == AGENT_ROWS[name, field]
    assert masker.ways == {"layout": 1}
    assert marked.left_out


def test_split_agent_rows_train_the_call_with_its_thought(family_tokenizer):
    masker = Masker(ChatTemplate(family_tokenizer, upstream("gptoss")))
    marked = masker.mark(masker.split(agent(reasoning_content="I must look."))[0])
    assert [marked.text[a:b] for a, b in marked.spans] == [
        "<|channel|>analysis<|message|>I must look.<|end|><|start|>assistant to=functions.weather<|channel|>"
        'commentary json<|message|>{"city": "Bern"}<|call|>'
    ]


def test_a_second_round_of_calls_that_the_template_runs_together_is_refused(family_tokenizer):
    messages = agent("I look.").messages
    twice = from_messages([*messages[:3], *messages[1:]], [WEATHER])
    with pytest.raises(DataError, match="cannot tell exactly"):
        spans_of(family_tokenizer, twice, template=upstream("deepseekv3"))


def test_thinking_gets_the_name_that_the_template_reads(family_tokenizer):
    template = (
        "{% for m in messages %}{{ m.role }}:{% if m.thinking %}({{ m.thinking }}){% endif %}{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    spans, marked, _ = spans_of(family_tokenizer, from_messages(WITH_THINKING), template=template)
    assert spans == ["(First thought)It is this.<|end|>", "(Second thought)That, too.<|end|>"]
    assert marked.left_out == []


def test_tool_calls_in_json_text_become_an_object(family_tokenizer):
    get_chat_template(family_tokenizer, "qwen-2.5")
    text_call = call("weather")
    text_call["function"]["arguments"] = '{"city": "Bern"}'
    messages = [WITH_TOOLS[0], assistant("", tool_calls=[text_call]), *WITH_TOOLS[2:]]
    spans, _, _ = spans_of(family_tokenizer, from_messages(messages, [WEATHER]))
    assert (
        spans[0] == '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call><|im_end|>'
    )


def test_tool_calls_become_json_text_where_the_template_joins_text(family_tokenizer):
    template = (
        "{% for m in messages %}{{ m.role + ':' + (m.content or '') }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    spans, _, _ = spans_of(family_tokenizer, from_messages(WITH_TOOLS, [WEATHER]), template=template)
    assert spans == ['weather {"city": "Bern"}<|end|>', "It is sunny.<|end|>"]


def test_tool_arguments_that_are_no_json_are_an_error(family_tokenizer):
    get_chat_template(family_tokenizer, "qwen-2.5")
    broken = call("weather")
    broken["function"]["arguments"] = "city=Bern"
    with pytest.raises(DataError, match="'weather' has arguments that are text but no JSON"):
        spans_of(family_tokenizer, from_messages([user("?"), assistant("", tool_calls=[broken])], [WEATHER]))


def test_a_template_that_does_not_write_tool_calls_trains_no_empty_turn(chatml_tokenizer):
    spans, marked, _ = spans_of(chatml_tokenizer, from_messages(WITH_TOOLS))
    assert spans == ["It is sunny.<|im_end|>"]
    assert marked.left_out == ["tool calls, so the turn is not trained"]


SHOUTING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content | upper) + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_that_rewrites_texts_is_masked_by_prefixes(chatml_tokenizer):
    spans, _, masker = spans_of(chatml_tokenizer, from_messages(TWO_TURNS), template=SHOUTING)
    assert spans == ["IT IS THIS.<|im_end|>", "THAT, TOO.<|im_end|>"]
    assert masker.ways == {"prefixes": 1}


FRAMED = (
    "{{ '<|im_start|>' ~ messages | length ~ '\n' }}" + SHOUTING
)  # no prefix of it is a prefix of the whole
BLOCKS = FRAMED.replace(
    "{{ '<|im_start|>' + m.role + '\n' + (m.content | upper) + '<|im_end|>\n' }}",
    "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content | upper }}<|im_end|>"
    "{% endgeneration %}{{ '\n' }}{% else %}{{ m.content | upper }}<|im_end|>{{ '\n' }}{% endif %}",
)


def test_generation_blocks_mask_where_nothing_else_can(chatml_tokenizer):
    spans, _, masker = spans_of(chatml_tokenizer, from_messages(TWO_TURNS), template=BLOCKS)
    assert spans == ["IT IS THIS.<|im_end|>", "THAT, TOO.<|im_end|>"]
    assert masker.ways == {"generation blocks": 1}


def test_a_template_that_cannot_be_masked_is_an_error_not_a_guess(chatml_tokenizer):
    with pytest.raises(DataError, match="cannot tell exactly which text"):
        spans_of(chatml_tokenizer, from_messages(TWO_TURNS), template=FRAMED)


def test_a_template_that_refuses_a_conversation_says_why(chatml_tokenizer):
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="refuses this conversation \\(roles must alternate\\)"):
        spans_of(chatml_tokenizer, from_messages(TWO_TURNS), template=template)


def test_a_template_that_fails_says_how(chatml_tokenizer):
    with pytest.raises(DataError, match="failed on this conversation \\(TypeError"):
        spans_of(chatml_tokenizer, from_messages(TWO_TURNS), template="{{ messages[0]['content'] + 1 }}")


def test_a_tokenizer_without_a_template_is_an_error(plain_tokenizer):
    with pytest.raises(DataError, match="no chat template"):
        ChatTemplate(plain_tokenizer)


TRAINING_TEMPLATES = ["qwen2_5", "qwen3", "llama3", "gemma3", "cohere", "gptoss"]


@pytest.mark.parametrize("name", TRAINING_TEMPLATES)
def test_masks_of_upstream_templates_lie_within_their_generation_blocks(name, family_tokenizer):
    """TRL ships versions of the models' templates that mark the assistant's part by hand."""
    folder = resources.files("trl").joinpath("chat_templates")
    plain, marked_by_hand = folder.joinpath(f"{name}.jinja"), folder.joinpath(f"{name}_training.jinja")
    if not plain.is_file() or not marked_by_hand.is_file():
        pytest.skip(f"this version of trl has no {name}_training.jinja")
    conversation = from_messages(TWO_TURNS)
    spans, marked, masker = spans_of(
        family_tokenizer, conversation, template=plain.read_text(encoding="utf-8")
    )
    assert masker.ways == {"layout": 1}
    by_hand = ChatTemplate(family_tokenizer, marked_by_hand.read_text(encoding="utf-8"))
    text, blocks = by_hand.render_with_generation_spans(conversation.messages)
    assert len(blocks) == len(spans)
    for ours, (first, last) in zip(spans, blocks):
        assert ours in text[first:last]


def test_an_answer_that_is_written_twice_is_trained_twice(chatml_tokenizer):
    twice = CHATML.replace("+ message['content'] +", "+ message['content'] + '/' + message['content'] +")
    spans, _, _ = spans_of(chatml_tokenizer, from_messages(TWO_TURNS), template=twice)
    assert spans == ["It is this./It is this.<|im_end|>", "That, too./That, too.<|im_end|>"]


def test_an_answer_that_also_stands_elsewhere_is_an_error(chatml_tokenizer):
    template = "{{ messages[-1].content }}" + CHATML
    with pytest.raises(DataError, match="cannot tell exactly which text"):
        spans_of(chatml_tokenizer, from_messages(TWO_TURNS), template=template)


def test_a_template_that_refuses_placeholders_is_masked_by_prefixes(chatml_tokenizer):
    wary = (
        "{% if messages | length > 3 and messages[1].content | length < 2 %}{{ raise_exception('too short') }}{% endif %}"
        + CHATML
    )
    spans, _, masker = spans_of(chatml_tokenizer, from_messages(TWO_TURNS), template=wary)
    assert spans == ["It is this.<|im_end|>", "That, too.<|im_end|>"]
    assert masker.ways == {"prefixes": 1}


def test_a_conversation_that_the_assistant_opens(chatml_tokenizer):
    refusing = "{% if not messages %}{{ raise_exception('no messages') }}{% endif %}" + CHATML
    messages = [assistant("Welcome!"), *TWO_TURNS[:2]]
    for template in (CHATML, refusing):
        spans, _, masker = spans_of(chatml_tokenizer, from_messages(messages), template=template)
        assert spans == ["Welcome!<|im_end|>", "It is this.<|im_end|>"]
        assert masker.ways == {"layout": 1}


THINKING_CALLS = (
    "{%- set ns = namespace(last=-1) -%}{%- for m in messages if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endfor -%}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content and loop.last %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + (c.function | tojson) + '</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}{% endif %}"
)


def test_a_call_whose_thinking_is_left_out_later_is_not_trained(family_tokenizer):
    messages = [dict(m) for m in WITH_TOOLS]
    messages[1]["reasoning_content"] = "A thought"
    spans, marked, masker = spans_of(
        family_tokenizer, from_messages(messages, [WEATHER]), template=THINKING_CALLS
    )
    assert spans == ["It is sunny.<|im_end|>"]
    assert marked.left_out == ["thinking", BARE]
    assert masker.ways == {"layout": 1}


def test_layouts_are_found_once_and_do_not_pile_up(chatml_tokenizer, monkeypatch):
    monkeypatch.setattr("oribi.chat.masking.KEPT_LAYOUTS", 2)
    masker = Masker(ChatTemplate(chatml_tokenizer))
    rendered = []
    render = masker.template.render
    monkeypatch.setattr(masker.template, "render", lambda *a, **k: rendered.append(1) or render(*a, **k))
    counts = []
    for turns_given in (1, 1, 2, 3, 1):
        before = len(rendered)
        masker.mark(from_messages([*TWO_TURNS[:2]] * turns_given))
        counts.append(len(rendered) - before)
    assert counts[1] == 1
    assert counts[0] > 1
    assert counts[4] > 1
    assert len(masker._layouts) <= 2
