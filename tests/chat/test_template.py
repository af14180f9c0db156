"""Rendering equals transformers' own, and no template makes it take long or much."""

import ast
import copy
import multiprocessing
import resource
import threading
import time
from importlib import resources

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from oribi.chat import limits
from oribi.chat.ends import turn_end_id
from oribi.chat.masking import Masker
from oribi.chat.rendering import ChatTemplate
from oribi.chat.template import render, render_chat, render_with_generation_spans
from oribi.errors import ChatTemplateError, OribiError, TemplateLimitError
from tests.data.tokenizers_small import (
    ONE_TURN,
    TWO_TURNS,
    WEATHER,
    WITH_SYSTEM,
    WITH_THINKING,
    WITH_TOOLS,
    byte_level,
)

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
FILES = sorted(
    f.name for f in resources.files("trl").joinpath("chat_templates").iterdir() if f.name.endswith(".jinja")
)


@pytest.mark.parametrize("file", FILES)
def test_texts_are_those_of_transformers(file):
    source = resources.files("trl").joinpath("chat_templates", file).read_text(encoding="utf-8")
    for messages in (ONE_TURN, TWO_TURNS, WITH_SYSTEM, WITH_TOOLS, WITH_THINKING):
        tools = [WEATHER] if messages is WITH_TOOLS else None
        for kwargs in ({}, {"enable_thinking": False}, {"add_generation_prompt": True}):
            given = {"tools": tools, **SPECIAL, **kwargs}
            theirs = outcome(render_jinja_template, [messages], chat_template=source, **given)
            ours = outcome(render, source, messages, name="it", **given)
            assert ours == (theirs[0][0] if isinstance(theirs, tuple) else theirs)


def outcome(function, *args, **kwargs):
    """What a rendering gives, or the kind of its exception."""
    try:
        return function(*args, **kwargs)
    except ChatTemplateError as error:
        return type(error.__cause__)
    except Exception as error:
        return type(error)


def test_generation_blocks_are_those_of_transformers():
    source = resources.files("trl").joinpath("chat_templates", "qwen3_training.jinja")
    if not source.is_file():
        pytest.skip("this version of trl has no qwen3_training.jinja")
    text = source.read_text(encoding="utf-8")
    theirs = render_jinja_template([TWO_TURNS], chat_template=text, return_assistant_tokens_mask=True)
    assert render_with_generation_spans(text, TWO_TURNS, name="it") == (theirs[0][0], theirs[1][0])


DOUBLING = (
    "{% set ns = namespace(s='ab', l=[1]) %}{% for i in range(60) %}{% set ns.s = @ %}{% endfor %}{{ ns.s }}"
)
ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a long range": "{% for i in range(10**9) %}{% endfor %}",
    "a product": "{{ 'a' * 10**10 }}",
    "a list": "{{ ([0] * 10**9) | length }}",
    "a width": "{{ '%10000000000d' % 1 }}",
    "a width among the values": "{{ '%*d' % (10**10, 1) }}",
    "a value at many places": "{{ (('%(a)s' * 1000000) % {'a': 'x' * 1000000}) | length }}",
    "a width of format": "{{ '{:10000000000}'.format(1) }}",
    "a width of the filter": "{{ '%10000000000d' | format(1) }}",
    "padding": "{{ 'a'.center(10**10) }}",
    "padding by a filter": "{{ ['a'] | map('center', 10**10) | list }}",
    "indents": "{{ ('a\n' * 1000) | indent(10**9) }}",
    "indents of JSON": "{{ messages | tojson(indent=10**9) }}",
    "bytes": "{{ (5).to_bytes(10**10, 'big') | length }}",
    "a batch": "{{ [1] | batch(10**10, 'x') | list }}",
    "sums": DOUBLING.replace("@", "ns.s + ns.s"),
    "joins": DOUBLING.replace("@", "ns.s ~ ns.s"),
    "joins by a filter": DOUBLING.replace("@", "[ns.s, ns.s] | join"),
    "replacements": DOUBLING.replace("@", "ns.s.replace('a', 'aa')"),
    "formats": DOUBLING.replace("@", "'{0}{0}'.format(ns.s)"),
    "blocks": "{% macro w(s) %}{{ s }}{{ s }}{% endmacro %}" + DOUBLING.replace("@", "w(ns.s)"),
    "numbers": DOUBLING.replace("'ab'", "3").replace("@", "ns.s * ns.s"),
    "lists in lists": DOUBLING.replace("'ab'", "[1]").replace("@", "[ns.s, ns.s]"),
    "lists in lists as JSON": DOUBLING.replace("'ab'", "[1]")
    .replace("@", "[ns.s, ns.s]")
    .replace("ns.s }}", "ns.s | tojson }}"),
    "outputs": "{% set x = 'a' * 1000000 %}{% for i in range(99999) %}{{ x }}{% endfor %}",
    "slices": "{% set x = 'a' * 30000000 %}{% for i in range(99999) %}{% set y = x[1:] %}{% endfor %}",
    "searches": "{% set x = 'a' * 30000000 %}{% for i in range(99999) %}{% if 'b' in x %}{% endif %}{% endfor %}",
    "a macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a recursive loop": "{% for x in [[1]] recursive %}{{ loop([x]) }}{% endfor %}",
    "brackets": "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
    "its source": "x" * 3_000_000,
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_template_beyond_the_limits_ends_in_one_error(kind):
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    with pytest.raises(
        TemplateLimitError, match="the template of x goes beyond the limits of rendering"
    ) as error:
        render(ENDLESS[kind], ONE_TURN, name="the template of x")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    assert time.thread_time() - started < 8
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


def test_calls_without_end_are_stopped_by_the_clock(monkeypatch):
    monkeypatch.setattr("oribi.chat.limits.MAX_SECONDS", 0.3)
    tree = "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"
    with pytest.raises(TemplateLimitError, match="seconds"):
        render(tree, ONE_TURN, name="it")


@pytest.mark.parametrize(
    "source",
    [
        "{% for %}",
        "{% for i in [1] %}" * 40 + "{% endfor %}" * 40,
        "{{ 1 / 0 }}",
        "{{ messages[5].content.x }}",
    ],
)
def test_a_template_that_fails_is_one_error(source):
    with pytest.raises(ChatTemplateError) as error:
        render(source, ONE_TURN, name="it")
    assert not isinstance(error.value, TemplateLimitError)


@pytest.fixture
def fewer_steps(monkeypatch):
    """A limit that is reached in a moment."""
    monkeypatch.setattr(limits, "MAX_STEPS", 300_000)


def test_work_is_counted_per_rendering(fewer_steps):
    """A template of a third of the limit renders as often as one likes."""
    source = "{% for i in range(99999) %}{% endfor %}x"
    assert [render(source, ONE_TURN, name="it") for _ in range(4)] == ["x"] * 4


def test_limits_hold_in_other_threads(fewer_steps):
    found = []

    def run():
        with pytest.raises(TemplateLimitError):
            render(ENDLESS["loops"], ONE_TURN, name="it")
        found.append(render("{{ messages | length }}", ONE_TURN, name="it"))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["2"] * 3


def _in_a_fork(queue):
    try:
        render(ENDLESS["loops"], ONE_TURN, name="it")
    except OribiError as error:
        queue.put(type(error).__name__)


def test_limits_hold_in_forked_processes(fewer_steps):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_in_a_fork, args=(queue,))
    process.start()
    assert queue.get(timeout=60) == "TemplateLimitError"
    process.join()


def test_every_place_that_renders_is_limited():
    """Loading, data, and answers: each ends with the template's error."""
    chatml_tokenizer = copy.deepcopy(byte_level(("<|im_start|>",)))
    chatml_tokenizer.chat_template = ENDLESS["a product"]
    for place in (
        lambda: turn_end_id(chatml_tokenizer),
        lambda: ChatTemplate(chatml_tokenizer).render(ONE_TURN),
        lambda: Masker(ChatTemplate(chatml_tokenizer)).template.turn_ends,
        lambda: render_chat(chatml_tokenizer, ONE_TURN, add_generation_prompt=True),
    ):
        with pytest.raises(TemplateLimitError):
            place()


def test_nothing_else_renders_templates():
    """`apply_chat_template` of transformers has no limits; the demo's own templates may use it."""
    found = set()
    for path in resources.files("oribi").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr == "apply_chat_template":
                found.add(path.parent.name)
    assert found <= {"demo"}
