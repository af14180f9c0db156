"""What inspect shows is what training sees."""

import io
import json
import re

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from oribi.data.encoding import Encoded
from oribi.data.preparation import Settings
from oribi.data.view import _folded, inspect_data, view_row
from oribi.errors import DataError
from tests.data.tokenizers_small import TWO_TURNS, user


def show(source, tokenizer, terminal=False, **options):
    out = io.StringIO()
    console = Console(
        file=out, width=100, force_terminal=terminal, color_system="truecolor" if terminal else None
    )
    report = inspect_data(source, tokenizer, console=console, **{"max_seq_length": 256, **options})
    return report, out.getvalue()


def test_trained_text_is_bracketed_where_there_are_no_colours(chatml_tokenizer):
    report, text = show([{"messages": TWO_TURNS}], chatml_tokenizer)
    assert "⟦It is this.<|im_end|>⟧" in text
    assert "⟦That, too.<|im_end|>⟧" in text
    trained, context = map(int, re.search(r"row 1: \d+ tokens: (\d+) trained, (\d+) context", text).groups())
    assert trained == report.trained_tokens
    assert trained + context == report.tokens
    assert "1 in, 1 kept" in text
    assert "rows are messages" in text


def test_a_terminal_gets_colours(chatml_tokenizer):
    _, text = show([{"messages": TWO_TURNS}], chatml_tokenizer, terminal=True)
    assert re.search(r"\x1b\[30;4[0-9;]+mIt", text) or re.search(r"\x1b\[30;4[0-9;]*m", text)
    assert "legend: " in re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_what_is_cut_is_shown_as_cut(chatml_tokenizer):
    ids = chatml_tokenizer("Hello there, what is it?", add_special_tokens=False)["input_ids"]
    view = view_row(chatml_tokenizer, "row 1", Encoded(ids, list(ids)), Settings(4))
    assert [t.kind for t in view.tokens] == ["context", *["trained"] * 3, *["cut"] * (len(ids) - 4)]
    dropped = view_row(chatml_tokenizer, "row 1", Encoded(ids, list(ids)), Settings(4, overlong="drop"))
    assert {t.kind for t in dropped.tokens} == {"cut"}
    split = view_row(chatml_tokenizer, "row 1", Encoded(ids, list(ids)), Settings(4, overlong="split"))
    assert "cut" not in {t.kind for t in split.tokens}
    _, text = show([{"text": "Hello there, what is it?"}], chatml_tokenizer, max_seq_length=4)
    assert "⟧✂" in text


@pytest.mark.parametrize("text", ["Hello there\n\ttab", "日本 é 🦔", "a [bold]b[/bold] c"])
def test_tokens_spell_the_text(text, chatml_tokenizer, plain_tokenizer):
    for tokenizer in (chatml_tokenizer, plain_tokenizer):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        view = view_row(tokenizer, "row 1", Encoded(ids, list(ids)), Settings(256))
        assert "".join(t.text for t in view.tokens).removeprefix(" ") == text
        assert [i for t in view.tokens for i in t.ids] == ids


def test_markup_in_the_data_is_data(chatml_tokenizer):
    assert "[bold]x[/bold]" in show([{"text": "say [bold]x[/bold] now"}], chatml_tokenizer)[1]


def test_only_so_many_rows_are_shown_but_all_are_counted(chatml_tokenizer):
    report, text = show([{"text": f"text {i}"} for i in range(9)], chatml_tokenizer, rows=2)
    assert report.rows_in == 9
    assert "row 2:" in text
    assert "row 3:" not in text


def test_html_stands_alone_and_escapes(chatml_tokenizer, tmp_path):
    show(
        [{"messages": [user("<script>"), *TWO_TURNS[1:]]}],
        chatml_tokenizer,
        html_file=tmp_path / "sub" / "data.html",
    )
    page = (tmp_path / "sub" / "data.html").read_text(encoding="utf-8")
    assert "<script>" not in page.replace("&lt;script&gt;", "")
    assert 'class="trained special"' in page
    assert "http" not in page
    assert "1 in, 1 kept" in page


def test_rows_are_shown_before_the_complaint(chatml_tokenizer):
    out = io.StringIO()
    with pytest.raises(DataError, match="no token of 1 rows would be trained"):
        inspect_data(
            [{"messages": [user("Only a question")]}],
            chatml_tokenizer,
            max_seq_length=99,
            console=Console(file=out),
        )
    assert "Only a question" in out.getvalue()
    assert "legend" not in out.getvalue()
    assert "rows      " not in out.getvalue()


def test_an_error_is_all_that_is_said_and_no_page_is_written(chatml_tokenizer, tmp_path):
    out = io.StringIO()
    with pytest.raises(DataError, match="no such file"):
        inspect_data(
            str(tmp_path / "none.jsonl"),
            chatml_tokenizer,
            max_seq_length=99,
            console=Console(file=out),
            html_file=tmp_path / "rows.html",
        )
    assert out.getvalue() == ""
    assert not (tmp_path / "rows.html").exists()


@pytest.mark.parametrize("width", [10, 36, 76, 200])
def test_folding_loses_no_character(width):
    text = Text("Open Settings,  choose   Export. 日本語\n\n" * 5 + " " * 300 + "end")
    folded = _folded(text, width).plain
    assert folded.replace("\n", "") == text.plain.replace("\n", "")
    assert max(map(cell_len, folded.split("\n"))) <= width


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("terminal", [False, True])
def test_lines_are_folded_at_the_edge_of_the_terminal(width, terminal, chatml_tokenizer):
    answer = "Open Settings, choose Invoice and press Export. 日本語 " * 9
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=terminal)
    rows = [{"messages": [user("How do I extend my invoice?"), {"role": "assistant", "content": answer}]}]
    inspect_data(rows, chatml_tokenizer, max_seq_length=4096, console=console)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
    inside = [line[2:-2] for line in plain.splitlines() if line.startswith("│")]
    assert {cell_len(line) for line in inside} == {width - 4}
    assert "".join(answer.split()) + "<|im_end|>" in "".join("".join(inside).split())


HOSTILE = "a\x1b[2Jb\x1b]0;title\x07c\x9b31md\u202ee\u2066f\x00g\x7fh"


def test_control_characters_of_rows_do_not_reach_the_terminal(chatml_tokenizer, tmp_path):
    file = tmp_path / "x\x1b[31m.jsonl"
    file.write_text(json.dumps({"messages": [user(HOSTILE), {"role": "assistant", "content": HOSTILE}]}))
    for terminal in (False, True):
        text = show(str(file), chatml_tokenizer, terminal=terminal)[1]
        left = re.sub(r"\x1b\[[0-9;]*m", "", text) if terminal else text
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", left)
        assert "\\x1b[2J" in left
        assert "\\u202e" in left
    assert "x\\x1b[31m.jsonl:1" in left


def test_texts_of_prompt_and_completion_are_said_to_be_plain(chatml_tokenizer, plain_tokenizer):
    rows = [{"prompt": "Q: a? A: ", "completion": "b"}] * 3
    report, text = show(rows, chatml_tokenizer)
    assert sum("joined without the chat template" in note for note in report.notes) == 1
    assert "joined without the chat template" in text
    assert not show(rows, plain_tokenizer)[0].notes
    assert not any(
        "joined" in note for note in show([{"question": "a", "answer": "b"}], chatml_tokenizer)[0].notes
    )


PAIR = {"prompt": "What is it?", "chosen": "It is this.", "rejected": "that " * 40, "score": 1}


def test_answers_to_compare_are_shown_apart(chatml_tokenizer, tmp_path):
    report, text = show(
        [PAIR], chatml_tokenizer, stage="dpo", max_seq_length=40, html_file=tmp_path / "rows.html"
    )
    heading = re.search(r"row 1: (\d+) tokens: (\d+) prompt, (\d+) chosen, (\d+) rejected, (\d+) cut", text)
    total, prompt, chosen, rejected, cut = map(int, heading.groups())
    assert total == prompt + chosen + rejected + cut
    assert (prompt + rejected, cut, report.rows_cut) == (40, report.tokens_cut, 1)
    boxes = [line.split()[1] for line in text.splitlines() if line.startswith("╭")]
    assert boxes == ["prompt", "chosen", "rejected"]
    assert "It is this.<|im_end|>" in text
    assert text.count("✂") == 2  # where the row is cut, and in the legend
    assert "columns not used: score" in text
    page = (tmp_path / "rows.html").read_text()
    assert 'class="good special"' in page
    assert 'class="bad"' in page


def test_good_and_bad_answers_have_their_colours(chatml_tokenizer):
    _, text = show([PAIR], chatml_tokenizer, terminal=True, stage="dpo")
    assert re.search(r"\x1b\[2mW", text), "the prompt is dim"
    assert re.search(r"\x1b\[30;42m[^\n]*this", text), "chosen is green"
    assert re.search(r"\x1b\[30;41m[^\n]*that", text), "rejected is red"
    judged = [
        {"prompt": "x", "completion": "this", "label": False},
        {"prompt": "x", "completion": "it", "label": 1},
    ]
    _, text = show(judged, chatml_tokenizer, stage="kto")
    assert "completion, label False" in text
    assert "labels    1 good, 1 bad" in text


def test_prompts_are_shown_with_the_columns_that_are_kept(chatml_tokenizer):
    _, text = show([{"prompt": "What?", "answer": 7, "long": "x" * 900}], chatml_tokenizer, stage="grpo")
    assert "\nanswer: 7\n" in text
    assert "long: 'xxx" in text
    assert "x" * 600 not in text
    assert "columns   for reward functions: answer, long" in text
