"""Where rows come from, and what is said when they cannot be read."""

import gzip
import json
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from oribi.chat.named_templates import template_source
from oribi.data import readers, text_files
from oribi.data.prepare import prepare_dataset
from oribi.data.sources import interleave, open_source
from oribi.errors import DataError
from tests.data.tokenizers_small import byte_level

ROWS = [{"text": "one"}, {"text": 'two, "quoted"\nand broken'}, {"text": "drei ü"}]


def read(source, **options):
    items = [item for part in open_source(source, **options) for item in part.rows()]
    for origin, row in items:
        if isinstance(row, DataError):  # as preparation tells it
            raise DataError(f"{origin}: {row}")
    return items


def rows_of(source, **options):
    return [row for _, row in read(source, **options)]


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def test_json_lines_tell_their_line(tmp_path):
    file = write(
        tmp_path / "a.jsonl", "\n".join(map(json.dumps, ROWS[:1])) + "\n\n" + json.dumps(ROWS[1]) + "\n"
    )
    assert read(file) == [("a.jsonl:1", ROWS[0]), ("a.jsonl:3", ROWS[1])]
    assert read(str(file)) == read(file)


@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_a_json_array_is_read_piece_by_piece(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(readers, "JSON_CHUNK_CHARACTERS", chunk)
    file = write(tmp_path / "a.json", json.dumps(ROWS, indent=2))
    assert read(file) == [("a.json:2", ROWS[0]), ("a.json:5", ROWS[1]), ("a.json:8", ROWS[2])]


def test_a_json_object_that_holds_the_rows(tmp_path):
    assert rows_of(write(tmp_path / "a.json", json.dumps({"version": 1, "data": ROWS}))) == ROWS


def test_json_lines_under_the_name_of_json(tmp_path):
    assert rows_of(write(tmp_path / "a.json", "\n".join(map(json.dumps, ROWS)))) == ROWS


def test_one_json_conversation(tmp_path):
    row = {"messages": [{"role": "user", "content": "x"}]}
    assert rows_of(write(tmp_path / "a.json", json.dumps(row))) == [row]


def test_csv_tells_the_line_where_a_row_begins(tmp_path):
    file = write(tmp_path / "a.csv", 'text,n\none,1\n"two\nlines",2\nthree,3\n')
    assert read(file) == [
        ("a.csv:2", {"text": "one", "n": "1"}),
        ("a.csv:3", {"text": "two\nlines", "n": "2"}),
        ("a.csv:5", {"text": "three", "n": "3"}),
    ]


def test_tsv_and_long_fields(tmp_path):
    long = "x" * 200_000  # above the csv module's own limit
    assert rows_of(write(tmp_path / "a.tsv", f"text\tn\n{long}\t1\n")) == [{"text": long, "n": "1"}]


def test_parquet_rows_come_as_they_are(tmp_path):
    messages = [
        [{"role": "user", "content": "x", "tool_calls": None}],
        [{"role": "user", "content": "y", "tool_calls": ["z"]}],
    ]
    pyarrow.parquet.write_table(pa.table({"messages": messages}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [
        ("a.parquet row 1", {"messages": messages[0]}),
        ("a.parquet row 2", {"messages": messages[1]}),
    ]


def test_a_broken_line_stands_in_the_place_of_its_row(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"text": "one"}\n{"text": \n{"text": "three"}\n')
    (_, first), (origin, broken), (_, third) = [i for part in open_source(file) for i in part.rows()]
    assert (first, third) == ({"text": "one"}, {"text": "three"})
    assert origin == "a.jsonl:2"
    assert isinstance(broken, DataError)


def test_a_text_file_is_one_document(tmp_path):
    file = write(tmp_path / "a.txt", "First.\n\nSecond.\n")
    assert read(file) == [("a.txt:1", {"text": "First.\n\nSecond.\n", "begins": True, "ends": True})]


def test_a_long_text_file_comes_in_blocks_that_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "TEXT_BLOCK_CHARACTERS", 40)
    text = "\n".join(f"This is line number {i}." for i in range(30))
    blocks = read(write(tmp_path / "a.md", text))
    assert "".join(row["text"] for _, row in blocks) == text
    assert len(blocks) > 10
    assert [row["begins"] for _, row in blocks] == [True] + [False] * (len(blocks) - 1)
    assert [row["ends"] for _, row in blocks] == [False] * (len(blocks) - 1) + [True]
    for origin, row in blocks:
        assert text.splitlines()[int(origin.split(":")[1]) - 1].endswith(row["text"].split("\n")[0])


def test_gzip_is_unpacked(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode()))
    assert rows_of(tmp_path / "a.jsonl.gz") == ROWS


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert rows_of(write(tmp_path / "a.jsonl", json.dumps(ROWS[0]), "utf-8-sig")) == ROWS[:1]


def test_a_folder_is_all_its_files_or_those_of_the_split(tmp_path):
    write(tmp_path / "b.jsonl", json.dumps(ROWS[1]))
    write(tmp_path / "a.jsonl", json.dumps(ROWS[0]))
    write(tmp_path / "notes.pdf", "no data")
    assert rows_of(tmp_path) == ROWS[:2]
    write(tmp_path / "train-00.jsonl", json.dumps(ROWS[2]))
    assert rows_of(tmp_path) == ROWS[2:]
    assert rows_of(tmp_path, split="b") == ROWS[1:2]


def test_datasets_their_dicts_streams_and_saved_folders(tmp_path):
    dataset = datasets.Dataset.from_list(ROWS)
    assert read(dataset) == [("row 1", ROWS[0]), ("row 2", ROWS[1]), ("row 3", ROWS[2])]
    assert rows_of(datasets.DatasetDict(train=dataset)) == ROWS
    assert rows_of(dataset.to_iterable_dataset()) == ROWS
    dataset.save_to_disk(tmp_path / "saved")
    assert rows_of(tmp_path / "saved") == ROWS
    with pytest.raises(DataError, match="has splits \\['train'\\], not 'test'"):
        open_source(datasets.DatasetDict(train=dataset), split="test")


def test_lists_of_rows_of_texts_of_files_and_columns(tmp_path):
    file = write(tmp_path / "a.jsonl", json.dumps(ROWS[0]))
    assert rows_of(ROWS) == ROWS
    assert rows_of(["one", "two"]) == [{"text": "one"}, {"text": "two"}]
    assert rows_of([str(file), str(file)]) == ROWS[:1] * 2
    assert rows_of({"text": ["one", "two"]}) == [{"text": "one"}, {"text": "two"}]


def test_equal_content_has_equal_fingerprints(tmp_path):
    a, b = write(tmp_path / "a.jsonl", json.dumps(ROWS[0])), write(tmp_path / "b.jsonl", json.dumps(ROWS[0]))
    c = write(tmp_path / "c.jsonl", json.dumps(ROWS[1]))
    prints = [open_source(source)[0].fingerprint for source in (a, b, c, ROWS, list(ROWS), ROWS[:2])]
    assert prints[0] == prints[1] != prints[2]
    assert prints[3] == prints[4] != prints[5]
    assert open_source(datasets.Dataset.from_list(ROWS).to_iterable_dataset())[0].fingerprint is None


def test_a_mixture_keeps_its_shares_at_every_point():
    mixed = list(interleave([(3.0, "a" * 300), (1.0, "b" * 50)]))
    for n in range(1, len(mixed) + 1):
        assert abs(mixed[:n].count("a") - 0.75 * n) <= 1
    assert mixed.count("b") == 50
    assert mixed.count("a") in range(148, 153)


def test_sources_without_weights_come_one_after_the_other():
    assert list(interleave([(None, "ab"), (None, "c")])) == ["a", "b", "c"]


def test_a_mixture_of_described_sources(tmp_path):
    file = write(tmp_path / "a.jsonl", json.dumps(ROWS[0]))
    parts = open_source(
        [{"path": str(file), "weight": 2}, {"path": datasets.Dataset.from_list(ROWS), "weight": 1}]
    )
    assert [part.weight for part in parts] == [2, 1]
    with pytest.raises(DataError, match="weights are given for 1 of 2 sources"):
        open_source([{"path": str(file), "weight": 2}, str(file)])
    with pytest.raises(DataError, match="weight = 0; it must be a number above 0"):
        open_source([{"path": str(file), "weight": 0}])


MALFORMED = {
    "bad.jsonl": (
        '{"text": "fine"}\n{"text": "cut of\n',
        "bad.jsonl:2: no valid JSON (the line ends inside a string: the file was cut off, or the line holds an unescaped line break); "
        'the line begins \'{"text": "cut of\'. Each line of a '
        ".jsonl file must be one complete object: correct or remove this line.",
    ),
    "list.jsonl": ("[1, 2]\n", "list.jsonl:1: list '[1, 2]'; each row must be a JSON object, {...}."),
    "blank.jsonl": ("\n \n", "{path}: the file has only blank lines."),
    "bad.json": (
        '[\n{"text": "fine"},\n{"text": "no quote}\n]\n',
        "bad.json:3: no valid JSON (invalid control character at, column 20) in the object that begins in line 3. Correct it; a JSON "
        "checker shows the place.",
    ),
    "open.json": (
        '[\n{"text": "fine"},\n',
        "open.json:3: the array is not closed; the file seems cut off. Download it again.",
    ),
    "cut.json": (
        '{"data": [{"x": 1},\n{"x": 2]}',
        "cut.json:2: no valid JSON (expecting ',' delimiter, column 8). Correct the file.",
    ),
    "word.json": (
        "hello",
        "{path}: the file begins 'hello'; a .json file must hold an array of objects, [{...}, ...].",
    ),
    "two.json": (
        '{"a": [{"x": 1}], "b": [{"x": 1}]}',
        "{path}: the object holds several arrays of rows, ['a', 'b']; keep one, as [{...}, ...].",
    ),
    "short.csv": (
        "text,n\none\n",
        "short.csv:2: 1 fields, but the header has 2: ['text', 'n']. Quote text that holds a separator or a line break.",
    ),
    "long.csv": (
        "text,n\none, and,1\n",
        "long.csv:2: 3 fields, but the header has 2: ['text', 'n']. Quote text that holds a separator or a line break.",
    ),
    "quote.csv": (
        'text,n\n"one" two,1\n',
        "quote.csv:2: no valid CSV (',' expected after '\"'). Quote text that holds quotes.",
    ),
    "twice.csv": ("text,text\na,b\n", "twice.csv:1: column names ['text', 'text'] are not unique."),
    "header.csv": ("text,n\n", "{path}: the file has a header (['text', 'n']) but no rows."),
    "blank.txt": (" \n", "{path}: the file has only blank lines."),
    "empty.jsonl": ("", "{path}: the file is empty. Check that it was written or downloaded fully."),
    "x.docx": (
        "zip",
        "{path}: cannot read .docx; known are .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .txt, .md.",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_gives_one_error_with_file_line_and_remedy(tmp_path, name):
    content, message = MALFORMED[name]
    file = write(tmp_path / name, content)
    with pytest.raises(DataError) as error:
        read(file)
    assert str(error.value) == message.replace("{path}", str(file))


def test_a_row_beyond_the_limit_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_ROW_CHARACTERS", 100)
    monkeypatch.setattr(readers, "JSON_CHUNK_CHARACTERS", 60)
    rows = [{"text": "x"}, {"text": "x" * 300}]
    expected = "the row has [0-9]+ characters or more, over the limit of 100. Split it into several rows"
    with pytest.raises(DataError, match=f"a.jsonl:2: {expected}"):
        read(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))))
    with pytest.raises(DataError, match=f"a.json:1: {expected}"):
        read(write(tmp_path / "a.json", json.dumps(rows)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_another_encoding_is_named_with_its_line(tmp_path, name):
    text = {
        "a.jsonl": '{"text": "x"}\n{"text": "Grüße"}\n',
        "a.json": '[{"text": "x"},\n{"text": "Grüße"}]',
        "a.csv": "text\nGrüße\n",
    }
    file = write(tmp_path / name, text.get(name, "one\nGrüße\n"), "latin-1")
    with pytest.raises(
        DataError, match=f"{name}:2: not UTF-8 \\(byte 0xfc\\). .*iconv.* the text there is .*Grüße"
    ):
        read(file)


def test_utf_16_is_named(tmp_path):
    with pytest.raises(DataError, match="the file is UTF-16. Convert it: iconv -f UTF-16"):
        read(write(tmp_path / "a.jsonl", '{"text": "x"}', "utf-16"))


def test_broken_gzip_and_parquet_are_named(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000)[:30])
    with pytest.raises(DataError, match="a.jsonl.gz: no valid gzip file"):
        read(tmp_path / "a.jsonl.gz")
    write(tmp_path / "a.parquet", "no parquet")
    with pytest.raises(DataError, match="a.parquet: no valid Parquet file"):
        read(tmp_path / "a.parquet")


def test_things_that_are_no_source_are_named(tmp_path):
    pyarrow.parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    with pytest.raises(DataError, match="none.parquet: the file has no rows"):
        read(tmp_path / "none.parquet")
    (tmp_path / "none.parquet").unlink()
    with pytest.raises(DataError, match="it needs 'path' and may have"):
        open_source([{"split": "train"}])
    with pytest.raises(DataError, match="no name of a data set .owner/name."):
        open_source("no such/data set")
    with pytest.raises(DataError, match="missing.jsonl: no such file"):
        open_source(str(tmp_path / "missing.jsonl"))
    with pytest.raises(DataError, match="no file that ends with .jsonl"):
        open_source(tmp_path)
    with pytest.raises(DataError, match="cannot read rows from a int"):
        open_source(3)
    with pytest.raises(DataError, match="the list of rows is empty"):
        open_source([])
    with pytest.raises(DataError, match="item 2 of the list is a int"):
        open_source([{"path": "a", "split": "train"}, 3])
    with pytest.raises(DataError, match="its columns have lengths {'a': 1, 'b': 2}"):
        open_source({"a": [1], "b": [1, 2]})
    with pytest.raises(DataError, match="the data set has no rows"):
        read(datasets.Dataset.from_dict({"text": []}))


def test_a_hub_name_that_cannot_be_loaded_says_why(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        DataError,
        match="nobody/nothing: no such file or folder here, and loading split 'train' .* failed: offline",
    ):
        open_source("nobody/nothing")


def test_a_hub_name_is_loaded_by_datasets(monkeypatch):
    asked = []
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *names, **more: asked.append((names, more)) or datasets.Dataset.from_list(ROWS),
    )
    (part,) = open_source([{"path": "owner/data", "name": "main", "split": "test"}])
    assert [row for _, row in part.rows()] == ROWS
    assert asked == [(("owner/data", "main"), {"split": "test", "streaming": False, "revision": None})]


TABLES = {
    "semicolons.csv": '\ufeffquestion;answer\r\nWhat, then?;"this; that"\r\n',
    "tabs.csv": "question\tanswer\nWhat, then?\tthis; that\n",
    "bars.csv": "question|answer\nWhat, then?|this; that\n",
    "commas.tsv": 'question,answer\n"What, then?",this; that\n',
    "told.csv": 'sep=;\nquestion;answer\nWhat, then?;"this; that"\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_the_delimiter_is_the_one_that_parts_header_and_rows(tmp_path, name):
    rows = rows_of(write(tmp_path / name, TABLES[name]))
    assert rows == [{"question": "What, then?", "answer": "this; that"}]


def test_one_column_of_text_may_hold_any_delimiter(tmp_path):
    assert rows_of(write(tmp_path / "a.csv", "text\none; two|three\n")) == [{"text": "one; two|three"}]


def test_one_column_named_by_several_is_refused(tmp_path):
    with pytest.raises(DataError, match="a.csv:1: the only column is 'instruction;output', whose name holds"):
        read(write(tmp_path / "a.csv", '"instruction;output"\nq\n'))


def test_lines_of_a_long_table_are_counted_across_its_sample(tmp_path):
    file = write(tmp_path / "a.csv", "q;a\r\n" + "x;y\r\n" * 20_000 + 'e;"f\r\ng"\r\nlast;one\r\n')
    assert read(file)[-2:] == [
        ("a.csv:20002", {"q": "e", "a": "f\r\ng"}),
        ("a.csv:20004", {"q": "last", "a": "one"}),
    ]


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("name", "text"), [("a.jsonl", DEEP), ("a.json", f'[{{"a": {DEEP}}}]'), ("b.json", f'{{"a": {DEEP}}}')]
)
def test_deep_json_is_an_error_of_its_line(tmp_path, name, text):
    with pytest.raises(DataError, match=f"{name}:1: no valid JSON .nested too deeply"):
        read(write(tmp_path / name, text))


def test_a_damaged_stream_of_gzip_is_named(tmp_path):
    packed = bytearray(gzip.compress(bytes(range(32, 127)) * 500))
    packed[20:40] = b"\xff" * 20
    (tmp_path / "a.jsonl.gz").write_bytes(packed)
    with pytest.raises(DataError, match="a.jsonl.gz: no valid gzip file"):
        read(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz", "a.json.gz"])
def test_a_packed_line_without_end_is_not_held(tmp_path, monkeypatch, name):
    for limit in ("MAX_ROW_CHARACTERS", "MAX_UNPACKED_CHARACTERS", "MAX_SKIPPED_CHARACTERS"):
        monkeypatch.setattr(text_files, limit, 1 << 20)
    start = b'{"data": ["' if ".json." in name else b""
    (tmp_path / name).write_bytes(gzip.compress(start + b"x" * (1 << 25), 9))
    tracemalloc.start()
    with pytest.raises(DataError, match=name):
        read(tmp_path / name)
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()


def test_a_line_that_is_too_long_costs_no_other_row(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_ROW_CHARACTERS", 1000)
    lines = [json.dumps({"text": text}) for text in ("a", "b" * 5000, "c")]
    (part,) = open_source(write(tmp_path / "a.jsonl", "\n".join(lines)))
    assert [row.get("text") if isinstance(row, dict) else "an error" for _, row in part.rows()] == [
        "a",
        "an error",
        "c",
    ]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_zero_bytes_are_no_text(tmp_path, name):
    with pytest.raises(DataError, match="the file has zero bytes: it is UTF-16 without a mark"):
        read(write(tmp_path / name, "text\nwords", "utf-16-le"))


@pytest.mark.parametrize("name", ["json", "csv", "parquet", "imagefolder", "text"])
def test_names_of_formats_are_no_data_sets(monkeypatch, name):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("something was read"))
    with pytest.raises(DataError, match=f"{name}: the name of a file format"):
        open_source([{"path": name}])


def test_whatever_datasets_raises_is_an_error_of_the_data_set(monkeypatch):
    def fail(*_, **__):
        raise datasets.exceptions.DatasetGenerationError("mixed schemas")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match="owner/data: .* failed: mixed schemas"):
        open_source("owner/data")


@pytest.mark.parametrize("source", ["x\0y.jsonl", "a" * 5000, "~nobody-here/x.jsonl", "x\0"])
def test_paths_that_cannot_be_are_named(source):
    with pytest.raises(DataError):
        open_source(source)


def test_a_saved_data_set_that_is_damaged_is_named(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "dataset_info.json").write_text("{")
    with pytest.raises(DataError, match="a folder of save_to_disk that cannot be loaded"):
        open_source(tmp_path / "saved")


def test_sources_of_a_mixture_have_roles_columns_and_a_number_of_rows_of_their_own(tmp_path):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    said = [{"role": "user", "content": "q"}, {"role": "coach", "content": "a"}]
    first.write_text("\n".join(json.dumps({"talk": said}) for _ in range(5)))
    second.write_text(json.dumps({"task": "q", "solution": "b"}))
    parts = [
        {
            "path": str(first),
            "columns": {"messages": "talk"},
            "role_aliases": {"coach": "assistant"},
            "max_rows": 2,
        },
        {"path": str(second), "columns": {"question": "task", "answer": "solution"}},
    ]
    tokenizer = byte_level(("<|im_start|>", "<|im_end|>"))
    tokenizer.chat_template = template_source(tokenizer, "chatml")
    prepared = prepare_dataset(parts, tokenizer, max_seq_length=64, announce=None, use_cache=False)
    assert prepared.dataset["origin"] == ["first.jsonl:1", "first.jsonl:2", "second.jsonl:1"]
    with pytest.raises(DataError, match="max_rows = 0; it must be a whole number above 0"):
        open_source([{"path": str(first), "max_rows": 0}])
