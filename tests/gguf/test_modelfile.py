"""The Modelfile's Go template is derived from the chat template and gives Ollama the tokenizer's own text."""

import re

import pytest
from transformers import GenerationConfig

from oribi.chat.ends import stop_ids, template_starts_with_bos, turn_end_id
from oribi.chat.named_templates import NAMES, get_chat_template
from oribi.gguf.modelfile import NoModelfile, modelfile, read_turns
from tests.save.tiny_export import TEMPLATE, byte_level_tokenizer, sentencepiece_tokenizer

CONVERSATIONS = [
    [("user", "Hi")],
    [("system", "Be brief."), ("user", "Hi")],
    [("user", "1+1?"), ("assistant", "2"), ("user", "And 2+2?")],
    [
        ("system", "Count."),
        ("user", "1"),
        ("assistant", "2"),
        ("user", "3"),
        ("assistant", "4"),
        ("user", "5"),
    ],
]
# what no Go template can say: the date stands in the system's turn
NOT_EXPRESSIBLE = {"gpt-oss", "gptoss"}


def run_go(template: str, system: str, messages: list[tuple[str, str]]) -> str:
    """Runs the part of Go's template language that Modelfiles use here."""
    pieces = re.split(r"(\{\{.*?\}\})", template)
    position = 0

    def block(scope: dict, active: bool) -> str:
        nonlocal position
        out = ""
        while position < len(pieces):
            piece = pieces[position]
            position += 1
            if not piece.startswith("{{"):
                out += piece if active else ""
                continue
            word = piece[2:-2].strip()
            if word in ("end",) or word.startswith("else"):
                position -= 1
                return out
            if word.startswith("range"):
                start = position
                for role, content in messages or [("", "")]:
                    position = start
                    out += block({**scope, ".Role": role, ".Content": content}, active and bool(messages))
                position += 1
            elif word.startswith("if "):
                out += branches(word[3:], scope, active)
            elif word == '"{{"':
                out += "{{" if active else ""
            elif word == "$first := true" or word == "$first = false":
                if active:
                    first[0] = word.endswith("true")
            elif active:
                out += {"$.System": system, ".System": system}.get(word, scope.get(word, ""))
        return out

    def branches(condition: str, scope: dict, active: bool) -> str:
        nonlocal position
        taken, out = False, ""
        while True:
            holds = truth(condition, scope) and not taken
            out += block(scope, active and holds)
            taken = taken or holds
            word = pieces[position][2:-2].strip()
            position += 1
            if word == "end":
                return out
            condition = word.removeprefix("else if ")

    def truth(condition: str, scope: dict) -> bool:
        if condition.startswith("eq .Role"):
            return scope[".Role"] == condition.split('"')[1]
        if condition == "and $first $.System":
            return first[0] and bool(system)
        assert condition == ".System"
        return bool(system)

    first = [False]
    return block({}, True)


def require_same_prompts_in_ollama(tokenizer) -> None:
    """The Modelfile's template gives what the tokenizer's chat template gives."""
    adds_bos = template_starts_with_bos(tokenizer)
    text = modelfile("m.gguf", tokenizer, [], None, adds_bos=adds_bos)
    template = re.search(r'TEMPLATE """(.*?)"""', text, flags=re.DOTALL)[1]
    default = re.search(r'SYSTEM """(.*?)"""', text, flags=re.DOTALL)
    for conversation in CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in conversation]
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        system = conversation[0][1] if conversation[0][0] == "system" else default[1] if default else ""
        found = run_go(template, system, conversation)
        assert (tokenizer.bos_token if adds_bos else "") + found == expected


@pytest.mark.parametrize("name", sorted(set(NAMES) - NOT_EXPRESSIBLE))
def test_ollama_renders_every_named_template_as_trained(name):
    tokenizer = byte_level_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer = get_chat_template(tokenizer, name)
    require_same_prompts_in_ollama(tokenizer)


def test_stops_and_parameters_are_written():
    tokenizer = byte_level_tokenizer()
    generation = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.95, eos_token_id=0)
    stops = [*stop_ids(tokenizer, 0), tokenizer.convert_tokens_to_ids("#")]
    text = modelfile("m.Q4_K_M.gguf", tokenizer, stops, generation, adds_bos=False)
    assert text.startswith("FROM ./m.Q4_K_M.gguf\n")
    assert text.count("PARAMETER stop") == 2
    assert 'PARAMETER stop "<|endoftext|>"\nPARAMETER stop "<|im_end|>"\n' in text
    assert "PARAMETER temperature 0.6\nPARAMETER top_p 0.95\n" in text


def test_a_template_with_a_text_before_every_conversation():
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}Some instructions.\n"
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    text = modelfile("m.gguf", tokenizer, [], None, adds_bos=False)
    assert '"""Some instructions.\n{{ range .Messages }}' in text


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "no chat template"),
        (
            "{% for m in messages %}[{{ loop.index % 5 }}]{{ m['content'] }}{% endfor %}",
            "not a sequence of turns",
        ),
        (
            "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ '!' if loop.length > 5 }}{% endfor %}<assistant>",
            "not a sequence of turns",
        ),
        ("{{ messages[-1]['content'] }}", "drops, repeats or changes a message"),
        ("{{ raise_exception('tools only') }}", "refuses a plain conversation: tools only"),
        (
            "{{ 'With' if messages[0]['role'] == 'system' else 'Without' }} {% for m in messages %}<{{ m['role'] }}>"
            "{{ m['content'] }}{% endfor %}<assistant>",
            "text of its own",
        ),
        (TEMPLATE + '"""', 'holds """'),
    ],
)
def test_what_go_cannot_say_is_not_written(template, words):
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(NoModelfile, match=re.escape(words)):
        modelfile("m.gguf", tokenizer, [], None, adds_bos=False)


def test_braces_of_the_template_reach_ollama():
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '{{' + m['role'] + '}} ' + m['content'] }};{% endfor %}{{ '{{A}} ' }}"
    )
    turns = read_turns(tokenizer, adds_bos=False)
    assert run_go(turns.go_template(), "", [("user", "x")]) == "{{user}} x;{{A}} "


def test_the_token_that_ends_an_answer_is_found_in_the_template():
    assert turn_end_id(byte_level_tokenizer()) == 2
    sentencepiece = sentencepiece_tokenizer()
    assert turn_end_id(sentencepiece) == sentencepiece.convert_tokens_to_ids("<end_of_turn>")
    assert stop_ids(sentencepiece, None) == [2, turn_end_id(sentencepiece)]
    plain = byte_level_tokenizer()
    plain.chat_template = None
    assert turn_end_id(plain) is None
    assert stop_ids(plain, [7, 2]) == [7, 2]
