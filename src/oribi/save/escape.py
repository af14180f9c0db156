"""Values of models, files and users as they stand in text of a format: one function per format.

HTML has `html.escape`.
"""

import html
import json
import re

_PLAIN_YAML = re.compile(r"[A-Za-z][A-Za-z0-9]*(?:[._/-][A-Za-z0-9]+)*")
_YAML_WORDS = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}


class Unwritable(ValueError):
    """A value that the format cannot hold as it is."""


def for_modelfile(text: str, *, block: bool = False) -> str:
    '''A value of an Ollama Modelfile, quoted; in """ where `block` says so or it must be.

    Ollama ends a value at the first line whose text so far ends with the quote that it began with, and drops every
    character that is not printable, spaces and line ends excepted. There is no escape sign.

    Raises:
        Unwritable: the value holds """, or a character that Ollama would drop.

    Source: https://github.com/ollama/ollama/blob/main/parser/parser.go
    '''
    dropped = next((c for c in text if not c.isprintable() and c not in " \t\n\r"), None)
    if dropped is not None:
        raise Unwritable(f"it holds {dropped!r}, which Ollama drops")
    if '"""' in text:
        raise Unwritable('it holds """, which ends a value of a Modelfile')
    plain = not any(sign in text for sign in '"\n\r')
    return f'"{text}"' if plain and not block else f'"""{text}"""'


def for_go_template(text: str) -> str:
    """Text of a Go template: what would begin an action is written by one."""
    return re.sub(r"\{\Z", '{{ "{" }}', text.replace("{{", '{{ "{{" }}'))


def for_yaml(text: str) -> str:
    """A YAML scalar that is read back as this text: plain where that is safe, else in double quotes."""
    if _PLAIN_YAML.fullmatch(text) and text.lower() not in _YAML_WORDS:
        return text
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in quoted)


def for_markdown(text: str) -> str:
    """Text of a line of Markdown, a table's cell included, that shows as it is."""
    line = html.escape(" ".join(_printable(text).split()), quote=False)
    line = re.sub(r"([\\`*\[\]|~#!])", r"\\\1", line)
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", line)


def fenced(text: str, language: str = "") -> str:
    """A code block of Markdown, its fence longer than any in the text."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}{language}\n{_printable(text)}\n{fence}"


def _printable(text: str) -> str:
    """The text with every other character than printable ones, tabs and line ends as its escape."""
    return "".join(c if c.isprintable() or c in "\t\n" else c.encode("unicode_escape").decode() for c in text)
