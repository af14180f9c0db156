"""Which token ends an answer: one answer for masks, reports, generation and exports."""

import pytest

from oribi.chat.ends import end_id, stop_ids, turn_end_id
from oribi.chat.named_templates import get_chat_template
from oribi.chat.rendering import ChatTemplate
from oribi.data.encoding import UNTRAINED
from oribi.data.prepare import prepare_dataset
from oribi.errors import DataError, TemplateLimitError
from tests.data.tokenizers_small import TWO_TURNS
from tests.save.tiny_export import sentencepiece_tokenizer

GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + m['role'] + '\n' + m['content'] | trim + "
    "'<end_of_turn>\n' }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        ("{% for m in messages %}{{ m.role ~ m.content }}<|end|>{% endfor %}", ("<|end|>", "<|end|>")),
        # closed once more at the very end, as Phi-3 does
        ("{% for m in messages %}{{ m.role ~ m.content }}<|end|>{% endfor %}</s>", ("<|end|>", "<|end|>")),
        # two tokens, as Command A writes them
        (
            "{% for m in messages %}<|start|>{{ m.content }}<|end|><|end_of_turn|>{% endfor %}",
            ("<|end|><|end_of_turn|>",) * 2,
        ),
        # another token at the end, as gpt-oss
        (
            "{% for m in messages %}<|start|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}{% endfor %}",
            ("<|end|>", "<|return|>"),
        ),
        # nothing: the next turn's token is not this turn's end
        ("{% for m in messages %}<|user|>{{ m.content }}{% endfor %}", ("", "")),
        # only at the end
        ("{% for m in messages %}\n#{{ m.content }}{% endfor %}</s>", ("", "</s>")),
        # text that is no token
        ("{% for m in messages %}{{ m.role }}: {{ m.content }} END\n{% endfor %}", (" END", " END")),
    ],
)
def test_what_ends_a_turn_is_found_by_rendering(family_tokenizer, template, ends):
    assert ChatTemplate(family_tokenizer, template).turn_ends == ends


def test_a_template_that_ignores_the_assistant_is_an_error(chatml_tokenizer):
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="does not write the assistant's message"):
        ChatTemplate(chatml_tokenizer, template).turn_ends  # noqa: B018


def test_the_end_of_a_turn_is_found_in_the_template():
    made = sentencepiece_tokenizer()
    assert made.convert_ids_to_tokens(turn_end_id(made)) == "<end_of_turn>"
    made.chat_template = GEMMA
    assert made.convert_ids_to_tokens(turn_end_id(made)) == "<end_of_turn>"
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert turn_end_id(made) is None
    made.chat_template = "{{ raise_exception('no chats here') }}"
    assert turn_end_id(made) is None


@pytest.mark.parametrize(
    "name", ["chatml", "llama-3.1", "mistral", "alpaca", "gemma-4", "gpt-oss", "command-r"]
)
def test_masks_reports_and_generation_name_the_same_end(name, family_tokenizer):
    tokenizer = get_chat_template(family_tokenizer, name)
    end = turn_end_id(tokenizer)
    assert end == end_id(tokenizer, ChatTemplate(tokenizer).ends[-1])
    assert end in stop_ids(tokenizer, None)
    made = prepare_dataset(
        [{"messages": TWO_TURNS}],
        tokenizer,
        max_seq_length=999,
        use_cache=False,
        progress=False,
        announce=None,
    )
    assert [label for label in made.dataset[0]["labels"] if label != UNTRAINED][-1] == end
    assert made.report.end_token_ids[-1] == end
    assert made.report.end_tokens[tokenizer.convert_ids_to_tokens(end)] > 0


def test_of_two_end_tokens_generation_stops_at_the_first(family_tokenizer):
    family_tokenizer.chat_template = (
        "{% for m in messages %}<|start|>{{ m.content }}<|end|><|end_of_turn|>{% endfor %}"
    )
    assert ChatTemplate(family_tokenizer).ends == ["<|end|><|end_of_turn|>"]
    assert family_tokenizer.convert_ids_to_tokens(turn_end_id(family_tokenizer)) == "<|end|>"


def test_an_end_that_is_no_special_token_ends_generation_too(family_tokenizer):
    family_tokenizer.add_tokens(["[DONE]"])
    family_tokenizer.chat_template = "{% for m in messages %}{{ m.role ~ m.content }}[DONE]{% endfor %}"
    assert stop_ids(family_tokenizer, [7]) == [
        7,
        family_tokenizer.eos_token_id,
        family_tokenizer.convert_tokens_to_ids("[DONE]"),
    ]


def test_a_template_for_a_single_question_has_an_end(chatml_tokenizer):
    chatml_tokenizer.chat_template = (
        "{% if messages | length > 2 %}{{ raise_exception('one question only') }}{% endif %}"
        + chatml_tokenizer.chat_template
    )
    assert ChatTemplate(chatml_tokenizer).turn_ends == ("<|im_end|>", "<|im_end|>")


def test_a_template_that_never_ends_is_an_error_and_no_missing_end(chatml_tokenizer, monkeypatch):
    monkeypatch.setattr("oribi.chat.limits.MAX_STEPS", 10_000)
    chatml_tokenizer.chat_template = (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    )
    with pytest.raises(TemplateLimitError):
        turn_end_id(chatml_tokenizer)
    assert stop_ids(chatml_tokenizer, None) == [chatml_tokenizer.eos_token_id]
