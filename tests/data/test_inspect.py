"""What inspect shows is what training sees."""

import io
import re

import pytest
from rich.console import Console

from oribi.data import inspect_data
from oribi.data.encoding import Encoded
from oribi.data.inspect import view_row
from oribi.data.preparation import Settings
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
