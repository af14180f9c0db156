"""Values from models, files and users are written as they are, or not at all, in every format that exports write."""

import html
import re

import pytest
import yaml

from oribi.errors import ConfigError
from oribi.gguf.modelfile import NoModelfile, Unwritable, for_go_template, for_modelfile, modelfile
from oribi.save.card import fenced, for_markdown, for_yaml, model_card
from oribi.save.check import Check, Outcome
from oribi.save.export import file_name
from oribi.save.report import ExportReport
from tests.save.tiny_export import TEMPLATE, byte_level_tokenizer

HOSTILE = [
    '<end>"\nADAPTER /etc/evil\nPARAMETER stop "<x>',
    '"\nFROM /etc/passwd\n"',
    'a"b', '""', " leading", "trailing ", "# a comment", "a\r\nSYSTEM b", "{{ .System }}", "tab\there", "ü ｜ 👍",
]  # fmt: skip


def parse_modelfile(text: str) -> list[tuple[str, str]]:
    """Commands of a Modelfile as Ollama's parser reads them (parser/parser.go): characters one by one, a value ends at a
    line's end where its quote is closed."""
    commands, name, value = [], "", None
    for character in text + "\n":
        if value is None:
            if character in " \t" and name and name != "PARAMETER":
                value = ""
            elif character in " \t\r\n" and not name:
                continue
            else:
                name += " " if character in " \t" and name == "PARAMETER" else character
                if re.fullmatch(r"PARAMETER \w+ ", name + " ") and character in " \t":
                    continue
            continue
        if character in "\r\n":
            closed = unquoted(value.strip())
            if closed is not None:
                commands.append((name, closed))
                name, value = "", None
                continue
        if character.isprintable() or character in "\t\r\n":
            value += character
    return commands


def unquoted(text: str) -> str | None:
    for quote in ('"""', '"'):
        if text.startswith(quote):
            closed = len(text) >= 2 * len(quote) and text.endswith(quote)
            return text[len(quote) : -len(quote)] if closed else None
    return text


def test_the_parser_sees_what_an_unescaped_value_does():
    injected = parse_modelfile(f'FROM ./m\nSYSTEM "{HOSTILE[0]}"\n')
    assert ("ADAPTER", "/etc/evil") in injected


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize("block", [False, True])
def test_a_modelfile_value_is_read_back_by_ollamas_rules(value, block):
    text = f"FROM ./m\nSYSTEM {for_modelfile(value, block=block)}\nLICENSE x\n"
    assert parse_modelfile(text) == [("FROM", "./m"), ("SYSTEM", value), ("LICENSE", "x")]


@pytest.mark.parametrize("value", ['a"""b', 'x"""\nADAPTER /etc/evil', "\x1b[2J", "zero\u200bwidth", "nul\0"])
def test_what_a_modelfile_cannot_hold_is_refused(value):
    with pytest.raises(Unwritable):
        for_modelfile(value)


@pytest.mark.parametrize("text", ["{", "a{", "{{", "{{{", "{{ .X }}", "}}{"])
def test_text_of_a_go_template_begins_no_action(text):
    pieces = re.split(r"\{\{ (\"\{+\") \}\}", for_go_template(text) + "{{ .Content }}")
    found = "".join(piece.strip('"') if i % 2 else piece for i, piece in enumerate(pieces))
    assert found == text + "{{ .Content }}"
    outside = "".join(pieces[::2])
    assert outside.count("{{") == 1


@pytest.mark.parametrize(
    "value",
    [
        *HOSTILE,
        "yes",
        "null",
        "1.5",
        "key: value",
        "- item",
        "&anchor",
        "*alias",
        "!!python/name:x",
        "\x1b[31m",
        "---",
        "me/model",
    ],
)
def test_a_yaml_scalar_is_read_back(value):
    assert yaml.safe_load(f"tags:\n- {for_yaml(value)}\nlast: 1\n") == {"tags": [value], "last": 1}


def test_markdown_shows_a_value_and_runs_none():
    text = for_markdown("a | b\n# c <img src=x onerror=y> `d` [e](javascript:f) \x1b[2J **g** end_of_turn")
    assert "\n" not in text
    assert "\x1b" not in text
    assert re.search(r"(?<!\\)[|`*\[]", text) is None
    assert "<" not in text
    assert html.unescape(re.sub(r"\\(.)", r"\1", text)).startswith("a | b # c <img src=x onerror=y> `d` [e]")
    assert text.endswith("end_of_turn")


def test_a_fence_is_longer_than_any_in_the_text():
    assert fenced("a\n````\nb", "python") == "`````python\na\n````\nb\n`````"


def test_a_hostile_end_token_stays_a_token_of_the_modelfile():
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [HOSTILE[0], 'x"""y']})
    stops = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", HOSTILE[0], 'x"""y')]
    notes: list[str] = []
    commands = parse_modelfile(modelfile("m.gguf", tokenizer, stops, None, adds_bos=False, notes=notes))
    assert [name for name, _ in commands] == ["FROM", "TEMPLATE", "PARAMETER stop", "PARAMETER stop"]
    assert [value for name, value in commands if name == "PARAMETER stop"] == ["<|im_end|>", HOSTILE[0]]
    assert len(notes) == 1
    assert 'does not name the end token \'x"""y\'' in notes[0]


@pytest.mark.parametrize("change", ['"""\nADAPTER /etc/evil\n', "\x1b[2J", "\u200b"])
def test_a_template_that_a_modelfile_cannot_hold_gives_none(change):
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("<|im_start|>'", "<|im_start|>' + " + repr(change))
    with pytest.raises(NoModelfile, match="cannot be written there"):
        modelfile("m.gguf", tokenizer, [], None, adds_bos=False)


@pytest.mark.parametrize(
    "write",
    ["{{ strftime_now('%d %b %Y') }}", "{%- set date = strftime_now('%Y-%m-%d') -%}Today's Date: {{ date }}.",
     "{% if strftime_now is defined %}{{ strftime_now('%B') }}{% endif %}"],
)  # fmt: skip
def test_a_template_with_todays_date_gives_no_modelfile(write):
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = "<|im_start|>system\n" + write + "<|im_end|>\n" + TEMPLATE
    with pytest.raises(NoModelfile, match="today's date"):
        modelfile("m.gguf", tokenizer, [], None, adds_bos=False)


def test_a_model_card_holds_hostile_values_as_text():
    hostile = "x|<script>alert(1)</script>\n---\n# y `z`"
    checks = [Check(hostile, Outcome.CLOSE, hostile)]
    report = ExportReport("d", "gguf", hostile, {hostile: 5}, hostile, checks, [hostile], (hostile, "a: b"))
    card = model_card(report, hostile, "evil/name\ntags: [x]", "usage")
    front = card.split("\n---\n")[0].removeprefix("---\n")
    assert yaml.safe_load(front) == {"library_name": "gguf", "tags": ["oribi", hostile, "a: b"]}
    body = card.split("\n---\n", 1)[1]
    assert "<script>" not in body
    assert [line for line in body.splitlines() if line.startswith("# ")] == [
        "# x\\|&lt;script&gt;alert(1)&lt;/script&gt; --- \\# y \\`z\\`"
    ]


@pytest.mark.parametrize("name", ["../x", "a/b", "", "a\nb", ".hidden", "-x", "a\0"])
def test_a_name_for_files_has_no_folder_and_no_control_character(name):
    with pytest.raises(ConfigError, match="expected a name for files"):
        file_name(name)
