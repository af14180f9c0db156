"""From rows to tokens: what was not used is named once, and whatever a row breaks is that row's problem."""

import json

import datasets
import numpy as np
import pytest

from oribi.data.encoding import UNTRAINED
from oribi.data.prepare import prepare_dataset
from oribi.errors import DataError
from tests.data.tokenizers_small import ONE_TURN, WEATHER, assistant, call, user


def prepare(source, tokenizer, **options):
    settings = {"max_seq_length": 512, "use_cache": False, "progress": False, "announce": None}
    return prepare_dataset(source, tokenizer, **{**settings, **options})


def texts(tokenizer, prepared):
    return [tokenizer.decode(row["input_ids"]) for row in prepared.dataset]


def trained(tokenizer, prepared):
    """The runs of trained tokens of each row."""
    runs = []
    for row in prepared.dataset:
        pieces = tokenizer.decode(
            [
                i if label != UNTRAINED else tokenizer.pad_token_id
                for i, label in zip(row["input_ids"], row["labels"])
            ]
        )
        runs.append([run for run in pieces.split(tokenizer.pad_token) if run])
    return runs


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_columns_of_all_rows_that_are_not_used_are_named_once(chatml_tokenizer):
    rows = [{"question": "q", "answer": "a", "id": 1}] * 3 + [
        {"question": "q", "answer": "a", "id": 2, "topic": "x"}
    ]
    report = prepare(rows, chatml_tokenizer).report
    assert report.unused_columns == ["id", "topic"]
    assert str(report).count("columns not used: id, topic") == 1


def test_keys_of_messages_are_named_unless_the_template_reads_them(chatml_tokenizer):
    rows = [{"messages": [{**user("q"), "info": 1, "mood": "happy"}, assistant("a")]}]
    assert prepare(rows, chatml_tokenizer).report.unused_message_keys == ["info", "mood"]
    chatml_tokenizer.chat_template = chatml_tokenizer.chat_template.replace(
        "message['content']", "message['content'] + (message.mood or '')"
    )
    prepared = prepare(rows, chatml_tokenizer)
    assert prepared.report.unused_message_keys == ["info"]
    assert "qhappy" in texts(chatml_tokenizer, prepared)[0]


ANSWER = [
    {"type": "text", "text": " Let me think.", "train": False},
    {"type": "text", "text": " It is 4. ", "train": True},
]


@pytest.mark.parametrize("looks_into_texts", [False, True])
def test_marks_of_parts_are_trained_exactly_with_the_end_of_the_turn(chatml_tokenizer, looks_into_texts):
    if looks_into_texts:  # no layout holds; prefixes are rendered
        chatml_tokenizer.chat_template = chatml_tokenizer.chat_template.replace(
            "message['content']", "message['content'] | replace('q', 'Q')"
        )
    rows = [
        {"messages": [user("q"), assistant(ANSWER), user("q"), assistant("Fine.")]},
        {"messages": [user("q"), assistant("I'm very well", train_detail=[{"begin_offset": 4, "end_offset": 8, "train": False}])]},
    ]  # fmt: skip
    prepared = prepare(rows, chatml_tokenizer)
    assert trained(chatml_tokenizer, prepared) == [
        [" It is 4. <|im_end|>", "Fine.<|im_end|>"],
        ["I'm ", "well<|im_end|>"],
    ]


def test_parts_that_the_template_rewrites_are_refused(chatml_tokenizer):
    chatml_tokenizer.chat_template = chatml_tokenizer.chat_template.replace(
        "message['content']", "message['content'] | replace('think', 'THINK')"
    )
    with pytest.raises(
        DataError, match="row 1: message 2 has parts that are not trained, but the chat template does not"
    ):
        prepare([{"messages": [user("q"), assistant(ANSWER)]}], chatml_tokenizer)


def test_marks_are_said_to_be_unused_where_everything_is_trained(chatml_tokenizer):
    rows = [{"messages": [user("q"), assistant("a", loss=False)]}]
    report = prepare(rows, chatml_tokenizer, train_on="everything").report
    assert any(note.startswith("training marks of messages are not used") for note in report.notes)


HALF = "hi \ud83d"
SURROGATES = {
    "a message": {"messages": [user(HALF), assistant("ok")]},
    "an answer": {"question": "q", "answer": HALF},
    "text": {"text": HALF},
    "a completion": {"prompt": "p ", "completion": HALF},
    "a tool": {"messages": ONE_TURN, "tools": [{**WEATHER, "description": HALF}]},
    "an argument": {"messages": [user("q"), assistant("", tool_calls=[call("f", x=HALF)])]},
    "an argument in JSON text": {
        "messages": [user("q"), assistant("", tool_calls=[{"name": "f", "arguments": '{"x": "hi \\ud83d"}'}])]
    },
}
WITH_CALLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("name", SURROGATES)
def test_half_a_character_is_replaced_and_counted(chatml_tokenizer, name):
    chatml_tokenizer.chat_template = WITH_CALLS
    said = []
    prepared = prepare([SURROGATES[name]], chatml_tokenizer, announce=said.append)
    assert "hi \ufffd" in texts(chatml_tokenizer, prepared)[0]
    assert (
        "half of a character (a lone surrogate) is replaced by U+FFFD: 1 times, first in row 1"
        in prepared.report.notes
    )
    "".join(said).encode("utf-8")


def test_half_a_character_from_a_file_of_json_lines(chatml_tokenizer, tmp_path):
    file = write(tmp_path / "a.jsonl", SURROGATES["a message"], SURROGATES["a message"])
    prepared = prepare(file, chatml_tokenizer)
    assert any("U+FFFD: 2 times, first in a.jsonl:1" in note for note in prepared.report.notes)
    prepared.report.save(tmp_path / "report.json")


def test_broken_lines_are_told_together_with_other_bad_rows_and_dropped(chatml_tokenizer, tmp_path):
    good, null = {"messages": ONE_TURN}, {"id": 1, "messages": None}
    file = write(tmp_path / "a.jsonl", null, good, '{"messages": ', good, null, "[1]", good)
    with pytest.raises(DataError) as error:
        prepare(file, chatml_tokenizer)
    assert str(error.value).startswith("a.jsonl:1: row has an empty (null) 'messages'")
    assert str(error.value).endswith("Further bad rows: a.jsonl:3, a.jsonl:5, a.jsonl:6.")
    report = prepare(file, chatml_tokenizer, malformed="drop").report
    assert (report.rows_in, report.rows_kept, report.rows_malformed) == (7, 3, 4)
    assert "malformed: 4 rows, left out:\n    a.jsonl:1: row has an empty" in str(report)
    assert "a.jsonl:3: no valid JSON" in str(report)


def test_a_csv_row_of_another_length_is_dropped_too(chatml_tokenizer, tmp_path):
    file = write(tmp_path / "a.csv", "question,answer", "q,a", "q,a,b", "q,a")
    assert prepare(file, chatml_tokenizer, malformed="drop").report.rows_kept == 2
    with pytest.raises(DataError, match="a.csv:3: 3 fields, but the header has 2"):
        prepare(file, chatml_tokenizer)


def test_a_source_without_one_good_row_names_the_first(chatml_tokenizer, tmp_path):
    file = write(tmp_path / "a.jsonl", {"lang": "en", "page": 1}, '{"x": ')
    for malformed in ("error", "drop"):
        with pytest.raises(DataError, match="a.jsonl:1: row has keys"):
            prepare(file, chatml_tokenizer, malformed=malformed)


FAILING = (
    "{% for m in messages %}{{ 1 // (m.content | length - 5) }}{{ m.content + '<|im_end|>' }}{% endfor %}"
)


def test_whatever_a_template_raises_is_an_error_of_its_row(chatml_tokenizer):
    chatml_tokenizer.chat_template = FAILING
    rows = [{"messages": [user("abc"), assistant("abcd")]}, {"messages": [user("abc"), assistant("12345")]}]
    with pytest.raises(DataError, match=r"row 2: .*ZeroDivisionError.*Correct"):
        prepare(rows, chatml_tokenizer, train_on="everything")
    assert prepare(rows, chatml_tokenizer, train_on="everything", malformed="drop").report.rows_kept == 1


def test_whatever_a_tokenizer_raises_is_an_error_of_its_row(chatml_tokenizer):
    class Fragile(type(chatml_tokenizer)):
        def __call__(self, text, *args, **kwargs):
            if any("poison" in one for one in text):
                raise OverflowError("too much")
            return super().__call__(text, *args, **kwargs)

    chatml_tokenizer.__class__ = Fragile
    rows = [{"text": "fine"}, {"text": "poison"}, {"text": "fine, too"}]
    with pytest.raises(DataError, match=r"row 2: tokenising the row failed \(OverflowError: too much\)"):
        prepare(rows, chatml_tokenizer)
    prepared = prepare(rows, chatml_tokenizer, malformed="drop")
    assert [row["origin"] for row in prepared.dataset] == ["row 1", "row 3"]


@pytest.mark.parametrize("answer", [{1, 2}, object(), 1j, b"\xff"])
def test_values_without_a_form_as_text_are_errors_of_their_row(chatml_tokenizer, answer):
    rows = [{"question": "q", "answer": "a"}, {"question": "q", "answer": answer}]
    with pytest.raises(DataError, match="row 2: 'answer' is .*; it must be text"):
        prepare(rows, chatml_tokenizer)


def test_long_arrays_that_differ_in_their_middle_are_other_data(chatml_tokenizer, tmp_path):
    arrays = [np.ones(3000, dtype=int), np.ones(3000, dtype=int)]
    arrays[1][1500] = 2
    kept = [
        prepare(
            [{"input_ids": array}], chatml_tokenizer, use_cache=True, cache_dir=tmp_path, max_seq_length=4000
        )
        for array in arrays
    ]
    assert kept[1].dataset[0]["input_ids"] == arrays[1].tolist()


def test_names_that_are_no_text_stop_nothing(chatml_tokenizer, tmp_path):
    rows = [{("a", 1): 2, 3: 4, "text": "x", "half \ud83d": 1}]
    report = prepare(rows, chatml_tokenizer).report
    assert report.unused_columns == ["('a', 1)", "3", "half \ufffd"]
    report.save(tmp_path / "report.json")


def test_a_stream_that_fails_names_its_last_row(chatml_tokenizer):
    def rows():
        yield {"text": "one"}
        raise RuntimeError("connection lost")

    stream = datasets.IterableDataset.from_generator(rows)
    with pytest.raises(
        DataError, match=r"reading stopped at the row after row 1 \(RuntimeError: connection lost\)"
    ):
        prepare(stream, chatml_tokenizer, streaming=False)


def test_a_formatting_func_that_fails_on_one_row_loses_one_row(chatml_tokenizer):
    rows = [{"q": "one"}, {"q": None}, {"q": "three"}]

    def function(row):
        return "Q: " + row["q"]

    with pytest.raises(DataError, match="row 2: formatting_func failed \\(TypeError"):
        prepare(rows, chatml_tokenizer, formatting_func=function)
    prepared = prepare(rows, chatml_tokenizer, formatting_func=function, malformed="drop")
    assert texts(chatml_tokenizer, prepared) == ["Q: one<|im_end|>", "Q: three<|im_end|>"]


def test_nulls_that_were_left_out_are_noted(chatml_tokenizer, tmp_path):
    chatml_tokenizer.chat_template = WITH_CALLS
    row = {
        "messages": [user("q"), assistant("", tool_calls=[call("weather", city="Bern", unit=None)])],
        "tools": [WEATHER],
    }
    rows = [
        row,
        {
            "messages": [user("q"), assistant("", tool_calls=[call("weather", city="Rome", unit="C")])],
            "tools": [WEATHER],
        },
    ]
    sets = datasets.Dataset.from_list(rows)
    sets.to_json(tmp_path / "a.jsonl")
    sets.to_parquet(tmp_path / "a.parquet")
    for source in (rows, sets, tmp_path / "a.jsonl", tmp_path / "a.parquet"):
        prepared = prepare(source, chatml_tokenizer)
        assert 'weather {"city": "Bern"}' in texts(chatml_tokenizer, prepared)[0]
        assert any(note.startswith("a null that the tool's schema") for note in prepared.report.notes)
