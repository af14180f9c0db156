"""prepare_dataset from rows to tokens: counts, policies, cache, streams, and what stops it."""

import json
import multiprocessing
import time

import datasets
import pytest

from oribi.data.encoding import UNTRAINED
from oribi.data.prepare import prepare_dataset
from oribi.data.report import DataReport
from oribi.errors import ConfigError, DataError
from tests.data.tokenizers_small import ONE_TURN, TWO_TURNS, WITH_THINKING, assistant, user


@pytest.fixture
def prepare(tmp_path):
    def run(source, tokenizer, **options):
        options = {
            "max_seq_length": 256,
            "cache_dir": tmp_path / "cache",
            "progress": False,
            "announce": None,
            **options,
        }
        return prepare_dataset(source, tokenizer, **options)

    return run


def trained(tokenizer, prepared):
    return [tokenizer.decode([x for x in row["labels"] if x != UNTRAINED]) for row in prepared.dataset]


def test_the_report_counts_rows_and_tokens(prepare, chatml_tokenizer):
    prepared = prepare([{"messages": ONE_TURN}, {"messages": TWO_TURNS}], chatml_tokenizer)
    report, rows = prepared.report, list(prepared.dataset)
    assert prepared.dataset.column_names == ["input_ids", "labels", "origin"]
    assert trained(chatml_tokenizer, prepared) == [
        "It is this.<|im_end|>",
        "It is this.<|im_end|>That, too.<|im_end|>",
    ]
    assert (report.rows_in, report.rows_kept, report.rows_cut, report.rows_dropped, report.examples) == (
        2,
        2,
        0,
        0,
        2,
    )
    assert report.tokens == sum(len(row["input_ids"]) for row in rows)
    assert report.trained_tokens == sum(label != UNTRAINED for row in rows for label in row["labels"])
    assert report.end_tokens == {"<|im_end|>": 3}
    assert report.end_token_ids == [chatml_tokenizer.eos_token_id]
    lengths = sorted(len(row["input_ids"]) for row in rows)
    assert report.length_percentiles == {
        "min": lengths[0],
        "p50": lengths[0],
        "p90": lengths[1],
        "p99": lengths[1],
        "max": lengths[1],
    }
    assert report.mask_sources == {"layout": 2}
    assert "2 in, 2 kept, 0 cut, 0 dropped -> 2 examples" in str(report)
    assert DataReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_the_format_and_row_0_are_announced(prepare, chatml_tokenizer):
    said = []
    prepare([{"messages": ONE_TURN}], chatml_tokenizer, announce=said.append)
    (line,) = said
    assert line.startswith(
        'list: rows are messages (column \'messages\'); first row: {"messages": [{"role": "user"'
    )


def test_the_progress_bar_and_the_default_announcement(prepare, chatml_tokenizer, capsys):
    prepare([{"messages": ONE_TURN}], chatml_tokenizer, progress=True, announce=print)
    printed = capsys.readouterr()
    assert "rows are messages" in printed.out
    assert "Preparing list" in printed.err


LONG = "word " * 60


@pytest.mark.parametrize(
    ("overlong", "kept", "cut", "dropped", "examples"),
    [("truncate", 2, 1, 0, 2), ("drop", 1, 0, 1, 1), ("split", 2, 1, 0, 6)],
)
def test_overlong_rows_are_never_silent(prepare, chatml_tokenizer, overlong, kept, cut, dropped, examples):
    prepared = prepare(
        [{"text": "short"}, {"text": LONG}], chatml_tokenizer, max_seq_length=60, overlong=overlong
    )
    report = prepared.report
    counts = (report.rows_overlong, report.rows_kept, report.rows_cut, report.rows_dropped, report.examples)
    assert counts == (1, kept, cut, dropped, examples)
    length = report.length_percentiles["max"]
    assert report.overlong_rows == [f"row 2 ({length} tokens)"]
    assert f"above max_seq_length ({overlong}): 1 rows: row 2 ({length} tokens)" in str(report)
    assert max(len(row["input_ids"]) for row in prepared.dataset) <= 60
    assert report.tokens_cut == (length - 60 if overlong == "truncate" else 0)


def test_splitting_loses_no_token(prepare, chatml_tokenizer):
    prepared = prepare([{"text": LONG}], chatml_tokenizer, max_seq_length=64, overlong="split")
    ids = [i for row in prepared.dataset for i in row["input_ids"]]
    assert ids == [
        *chatml_tokenizer(LONG, add_special_tokens=False)["input_ids"],
        chatml_tokenizer.eos_token_id,
    ]


def test_overlong_error_names_the_rows(prepare, chatml_tokenizer, tmp_path):
    with pytest.raises(
        DataError,
        match="1 of 2 rows are longer than max_seq_length = 64: row 2 .* tokens.. Raise max_seq_length",
    ):
        prepare([{"text": "short"}, {"text": LONG}], chatml_tokenizer, max_seq_length=64, overlong="error")
    assert list((tmp_path / "cache").rglob("*.arrow")) == []


def test_text_files_are_split_by_default_and_rows_truncated(prepare, chatml_tokenizer, tmp_path):
    (tmp_path / "book.txt").write_text(LONG)
    assert prepare(tmp_path / "book.txt", chatml_tokenizer, max_seq_length=64).report.overlong == "split"
    assert prepare([{"text": LONG}], chatml_tokenizer, max_seq_length=64).report.overlong == "truncate"


def test_blocks_of_a_text_file_get_one_bos_and_one_eos(prepare, plain_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("oribi.data.readers.TEXT_BLOCK_CHARACTERS", 50)
    (tmp_path / "book.txt").write_text("A sentence is here.\n" * 20)
    prepared = prepare(tmp_path / "book.txt", plain_tokenizer)
    assert len(prepared.dataset) > 3
    ids = [i for row in prepared.dataset for i in row["input_ids"]]
    for token, place in ((plain_tokenizer.bos_token_id, 0), (plain_tokenizer.eos_token_id, -1)):
        assert ids.count(token) == 1
        assert ids[place] == token


def test_rows_that_train_nothing_are_named_and_left_out(prepare, chatml_tokenizer):
    rows = [
        {"messages": ONE_TURN},
        {"messages": [user("Only a question")]},
        {"messages": [user(LONG), assistant("Late.")]},
    ]
    report = prepare(rows, chatml_tokenizer, max_seq_length=64).report
    assert report.rows_untrained == report.rows_dropped == 2
    assert report.untrained_rows == [
        "row 2 (no response to train on)",
        "row 3 (its responses lie beyond max_seq_length)",
    ]
    assert "row 2 (no response to train on)" in str(report)


def test_no_rows_at_all_stop(prepare, chatml_tokenizer):
    stream = datasets.IterableDataset.from_generator(lambda: iter(()))
    with pytest.raises(DataError, match="stream: no rows"):
        prepare(stream, chatml_tokenizer, streaming=False)


def test_nothing_to_train_on_stops(prepare, chatml_tokenizer):
    rows = [{"messages": [user("Only a question")]}] * 3
    with pytest.raises(
        DataError, match="no token of 3 rows would be trained: row 1 .no response to train on., row 2"
    ):
        prepare(rows, chatml_tokenizer)


def test_a_turn_end_that_is_never_trained_is_said(prepare, chatml_tokenizer):
    rows = [{"messages": [user("x"), assistant(LONG)]}]
    report = prepare(rows, chatml_tokenizer, max_seq_length=64).report
    assert any("no end of a turn ('<|im_end|>') is trained" in note for note in report.notes)


def test_an_eos_that_ends_no_turn_is_said(prepare, chatml_tokenizer):
    chatml_tokenizer.eos_token = "<|endoftext|>"
    report = prepare([{"messages": ONE_TURN}], chatml_tokenizer).report
    end = chatml_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert report.end_token_ids == [end]
    assert any(f"put [{end}] into model.generation_config.eos_token_id" in note for note in report.notes)


def test_an_end_that_is_no_token_is_said(prepare, plain_tokenizer):
    plain_tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + ' END\n' }}{% endfor %}"
    )
    report = prepare([{"messages": ONE_TURN}], plain_tokenizer).report
    assert any(
        "turns end with ' END', which holds no token of its own" in note and "cannot stop at it" in note
        for note in report.notes
    )


def test_a_template_without_an_end_gets_eos_behind_the_last_turn(prepare, plain_tokenizer):
    plain_tokenizer.chat_template = "{% for m in messages %}\n#{{ m.role + ': ' + m.content }}{% endfor %}"
    prepared = prepare([{"messages": TWO_TURNS}], plain_tokenizer)
    row = prepared.dataset[0]
    assert row["input_ids"][-1] == row["labels"][-1] == plain_tokenizer.eos_token_id
    assert row["input_ids"].count(plain_tokenizer.eos_token_id) == 1
    assert prepared.report.end_tokens == {"</s>": 1}
    assert any("EOS is added after the last one" in note for note in prepared.report.notes)


def test_eos_is_not_put_behind_a_question(prepare, plain_tokenizer):
    plain_tokenizer.chat_template = "{% for m in messages %}\n#{{ m.role + ': ' + m.content }}{% endfor %}"
    (row,) = prepare([{"messages": TWO_TURNS[:3]}], plain_tokenizer).dataset
    assert plain_tokenizer.eos_token_id not in row["input_ids"]


def test_everything_ends_with_eos_where_the_template_writes_no_end(
    prepare, plain_tokenizer, chatml_tokenizer
):
    plain_tokenizer.chat_template = "{% for m in messages %}\n#{{ m.role + ': ' + m.content }}{% endfor %}"
    (row,) = prepare([{"messages": ONE_TURN}], plain_tokenizer, train_on="everything").dataset
    assert row["input_ids"].count(plain_tokenizer.eos_token_id) == 1
    (row,) = prepare([{"messages": ONE_TURN}], chatml_tokenizer, train_on="everything").dataset
    assert row["input_ids"] == chatml_tokenizer.apply_chat_template(ONE_TURN, tokenize=True)["input_ids"]


def test_pairs_do_not_lend_their_template_to_messages(prepare, plain_tokenizer):
    pairs = datasets.Dataset.from_list([{"question": "What?", "answer": "This."}])
    messages = datasets.Dataset.from_list([{"messages": ONE_TURN}])
    with pytest.raises(DataError, match="row 1: the tokenizer has no chat template"):
        prepare([pairs, messages], plain_tokenizer)


def test_a_template_that_forgets_bos_gets_it_and_says_so(prepare, plain_tokenizer):
    plain_tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}"
    )
    prepared = prepare([{"messages": ONE_TURN}], plain_tokenizer)
    assert prepared.dataset[0]["input_ids"][0] == plain_tokenizer.bos_token_id
    assert any("writes no BOS but the tokenizer adds one" in note for note in prepared.report.notes)


def test_thinking_that_is_left_out_is_said(prepare, family_tokenizer):
    from oribi.chat.named_templates import get_chat_template

    get_chat_template(family_tokenizer, "qwen-3")
    report = prepare([{"messages": WITH_THINKING}] * 2, family_tokenizer).report
    assert "the chat template leaves out the thinking: 2 times, first in row 1" in report.notes


def test_split_turns_become_rows_of_their_own(prepare, family_tokenizer):
    from oribi.chat.named_templates import get_chat_template

    get_chat_template(family_tokenizer, "qwen-3")
    rows = [{"messages": WITH_THINKING}, {"messages": ONE_TURN}]
    whole, split = (prepare(rows, family_tokenizer, turns=turns) for turns in ("whole", "split"))
    assert [len(each.dataset) for each in (whole, split)] == [2, 3]
    assert "First thought" not in trained(family_tokenizer, whole)[0]
    assert ["First thought" in text for text in trained(family_tokenizer, split)] == [True, False, False]
    assert "a row of several turns became one row per turn: 1 times, first in row 1" in split.report.notes


def test_a_row_that_loses_every_thought_is_dropped_with_the_reason(prepare, family_tokenizer):
    family_tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}{% endif %}"
    )
    report = prepare([{"messages": WITH_THINKING}, {"messages": ONE_TURN}], family_tokenizer).report
    assert (report.rows_kept, report.rows_untrained) == (1, 1)
    assert "leaves out the thought of every answer" in report.untrained_rows[0]


def test_markup_within_a_message_is_said(prepare, chatml_tokenizer):
    rows = [{"messages": [user("What does <|im_end|> mean?"), assistant("It ends a turn.")]}]
    report = prepare(rows, chatml_tokenizer).report
    assert any(
        "a message itself holds the text '<|im_end|>'" in note and "row 1" in note for note in report.notes
    )


def test_pairs_without_a_template_take_the_alpaca_form_and_say_so(prepare, plain_tokenizer):
    prepared = prepare([{"question": "What is it?", "answer": "It is this."}], plain_tokenizer)
    text = plain_tokenizer.decode(prepared.dataset[0]["input_ids"])
    assert "### Instruction:" in text
    assert trained(plain_tokenizer, prepared)[0].strip() == "It is this.</s>"
    assert any('get_chat_template(tokenizer, "alpaca")' in note for note in prepared.report.notes)
    assert plain_tokenizer.chat_template is None
    with pytest.raises(DataError, match="row 1: the tokenizer has no chat template"):
        prepare([{"messages": ONE_TURN}], plain_tokenizer)


def test_malformed_rows_stop_with_their_places(prepare, chatml_tokenizer, tmp_path):
    lines = [{"messages": ONE_TURN}, {"messages": [{"role": "user"}]}, {"text": "x"}, {"messages": ONE_TURN}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError) as error:
        prepare(tmp_path / "train.jsonl", chatml_tokenizer)
    assert str(error.value) == (
        "train.jsonl:2: message 1 (user) has no content: dict {'role': 'user'}. Give it text, or remove the message. Further bad "
        "rows: train.jsonl:3."
    )
    report = prepare(tmp_path / "train.jsonl", chatml_tokenizer, malformed="drop").report
    assert (report.rows_kept, report.rows_malformed) == (2, 2)
    assert report.malformed_rows[1] == "train.jsonl:3: row has no 'messages'; its keys are ['text']."


def test_a_first_row_of_no_format_names_its_place(prepare, chatml_tokenizer, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"lang": "en", "page": 1}\n')
    with pytest.raises(
        DataError, match="train.jsonl:1: row has keys \\['lang', 'page'\\]; expected 'messages'"
    ):
        prepare(tmp_path / "train.jsonl", chatml_tokenizer)


def test_settings_out_of_range_are_all_named(prepare, chatml_tokenizer):
    with pytest.raises(
        ConfigError, match="train_on = 'answers' .*; overlong = 'cut' .*; max_seq_length = 0 must be"
    ):
        prepare([{"text": "x"}], chatml_tokenizer, train_on="answers", overlong="cut", max_seq_length=0)


def test_each_part_of_a_mixture_has_its_own_format(prepare, chatml_tokenizer):
    a, b = (
        datasets.Dataset.from_list([{"messages": ONE_TURN}] * 30),
        datasets.Dataset.from_list([{"text": "plain"}] * 5),
    )
    prepared = prepare([{"path": a, "weight": 0.75}, {"path": b, "weight": 0.25}], chatml_tokenizer)
    assert prepared.report.format == "messages (column 'messages'), text (column 'text')"
    texts = trained(chatml_tokenizer, prepared)
    assert texts[:8].count("It is this.<|im_end|>") == 6
    assert sum("<|im_end|>" in t and "this" not in t for t in texts) == 5


def test_tokens_and_text_keep_the_order_of_rows(prepare, chatml_tokenizer):
    a = datasets.Dataset.from_list([{"input_ids": [5, 6, 7]}] * 3)
    b = datasets.Dataset.from_list([{"text": "plain text"}] * 3)
    lengths = [
        len(r["input_ids"])
        for r in prepare([{"path": a, "weight": 1}, {"path": b, "weight": 1}], chatml_tokenizer).dataset
    ]
    assert lengths[::2] == [3, 3, 3]
    assert 3 not in lengths[1::2]


def test_max_rows_stops_early(prepare, chatml_tokenizer):
    assert (
        prepare([{"text": f"text {i}"} for i in range(10)], chatml_tokenizer, max_rows=3).report.rows_in == 3
    )


def test_formatting_func_is_applied(prepare, chatml_tokenizer):
    prepared = prepare(
        [{"q": "a", "r": "b"}] * 2, chatml_tokenizer, formatting_func=lambda row: f"{row['q']} {row['r']}"
    )
    assert [chatml_tokenizer.decode(row["input_ids"]) for row in prepared.dataset] == ["a b<|im_end|>"] * 2


def test_the_second_time_comes_from_the_cache(prepare, chatml_tokenizer):
    rows = [{"messages": ONE_TURN}] * 50
    first, second = prepare(rows, chatml_tokenizer), prepare(rows, chatml_tokenizer)
    assert (first.report.from_cache, second.report.from_cache) == (False, True)
    assert list(first.dataset) == list(second.dataset)
    assert second.report.rows_in == 50


@pytest.mark.parametrize(
    "change", ["rows", "template", "eos", "length", "train_on", "kwargs", "vocabulary", "function"]
)
def test_whatever_changes_the_tokens_misses_the_cache(prepare, chatml_tokenizer, change):
    rows, options = [{"messages": ONE_TURN}], {}
    prepare(rows, chatml_tokenizer)
    if change == "rows":
        rows = [{"messages": TWO_TURNS}]
    elif change == "template":
        chatml_tokenizer.chat_template += " "
    elif change == "eos":
        chatml_tokenizer.eos_token = "<|endoftext|>"
    elif change == "vocabulary":
        chatml_tokenizer.add_tokens(["something"])
    else:
        options = {
            "length": {"max_seq_length": 100},
            "train_on": {"train_on": "everything"},
            "kwargs": {"chat_template_kwargs": {"a": 1}},
            "function": {"formatting_func": lambda row: row["messages"]},
        }[change]
    assert not prepare(rows, chatml_tokenizer, **options).report.from_cache


def test_without_the_cache_nothing_is_kept(prepare, chatml_tokenizer, tmp_path):
    for _ in range(2):
        assert not prepare([{"messages": ONE_TURN}], chatml_tokenizer, use_cache=False).report.from_cache
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("kind", "damaged"),
    [
        ("arrow", lambda content: content[: len(content) // 2]),
        ("arrow", lambda content: b""),
        ("json", lambda content: content[: len(content) // 2]),
        ("json", lambda content: b"[]"),
    ],
)
def test_a_damaged_cache_is_made_anew_with_a_line(prepare, chatml_tokenizer, tmp_path, kind, damaged):
    rows, said = [{"messages": ONE_TURN}] * 50, []
    first = prepare(rows, chatml_tokenizer)
    (file,) = (tmp_path / "cache" / "oribi").glob(f"*.{kind}")
    content = file.read_bytes()
    file.unlink()  # a file that is mapped must not shrink
    file.write_bytes(damaged(content))
    again = prepare(rows, chatml_tokenizer, announce=said.append)
    assert not again.report.from_cache
    assert "prepared data is damaged" in said[0]
    assert list(again.dataset) == list(first.dataset)
    assert prepare(rows, chatml_tokenizer).report.from_cache


def test_a_cache_that_cannot_be_written_is_said_once_and_done_without(prepare, chatml_tokenizer, tmp_path):
    (tmp_path / "file").write_text("no folder")
    said, options = [], {"cache_dir": tmp_path / "file"}
    for _ in range(2):
        found = prepare([{"messages": ONE_TURN}], chatml_tokenizer, announce=said.append, **options)
        assert len(found.dataset) == 1
    assert sum("the folder cannot be written" in line for line in said) == 1


def _prepare_in_a_fork(tokenizer, cache_dir, queue, rows):
    try:
        found = prepare_dataset(
            rows, tokenizer, max_seq_length=256, cache_dir=cache_dir, progress=False, announce=None
        )
        queue.put((found.report.from_cache, len(found.dataset)))
    except DataError as error:
        queue.put(str(error))


@pytest.mark.parametrize("good", [True, False])
def test_processes_that_prepare_the_same_data_write_it_once(chatml_tokenizer, tmp_path, good):
    rows = [{"messages": ONE_TURN}] * 300 + ([] if good else [{"messages": "none"}])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [
        context.Process(target=_prepare_in_a_fork, args=(chatml_tokenizer, tmp_path, queue, rows))
        for _ in range(4)
    ]
    for process in processes:
        process.start()
    found = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    if good:
        assert sorted(found) == [(False, 300), (True, 300), (True, 300), (True, 300)]
        assert sorted(f.suffix for f in (tmp_path / "oribi").iterdir()) == [".arrow", ".json"]
    else:
        assert len(set(found)) == 1
        assert "row 301" in found[0]


def test_streams_are_prepared_as_they_are_read(prepare, chatml_tokenizer):
    read = []

    def rows():
        for i in range(5000):
            read.append(i)
            yield {"messages": ONE_TURN}

    prepared = prepare(datasets.IterableDataset.from_generator(rows), chatml_tokenizer)
    assert isinstance(prepared.dataset, datasets.IterableDataset)
    assert read == []
    first = next(iter(prepared.dataset))
    assert 0 < len(read) < 1000
    assert chatml_tokenizer.decode([x for x in first["labels"] if x != UNTRAINED]) == "It is this.<|im_end|>"
    assert prepared.dataset.column_names == ["input_ids", "labels", "origin"]


def test_a_stream_read_twice_is_counted_once(prepare, chatml_tokenizer):
    stream = datasets.Dataset.from_list([{"messages": ONE_TURN}] * 7).to_iterable_dataset()
    prepared = prepare(stream, chatml_tokenizer)
    for _ in range(2):
        assert len(list(prepared.dataset)) == 7
        assert prepared.report.rows_in == 7


def test_a_stream_can_be_written_whole(prepare, chatml_tokenizer):
    stream = datasets.Dataset.from_list([{"messages": ONE_TURN}] * 7).to_iterable_dataset()
    assert len(prepare(stream, chatml_tokenizer, streaming=False).dataset) == 7


def test_preparing_takes_at_most_1_2_ms_of_processor_time_per_conversation(
    prepare, chatml_tokenizer, tmp_path
):
    line = json.dumps({"messages": TWO_TURNS}) + "\n"
    (tmp_path / "many.jsonl").write_text(line * 5000)
    started = time.process_time()
    report = prepare(tmp_path / "many.jsonl", chatml_tokenizer).report
    assert report.examples == 5000
    # of all threads together, not of the clock: the machine may be shared
    assert time.process_time() - started < 5000 * 1.2e-3


def test_rows_of_a_classifier_are_told_what_to_do_with_them(prepare, plain_tokenizer):
    rows = [{"text": "the film was good", "label": 1}, {"text": "the film was bad", "label": 0}]
    prepared = prepare(rows, plain_tokenizer)
    (note,) = [note for note in prepared.report.notes if "classifier" in note]
    assert "'label'" in note
    assert "num_labels=N" in note
    prepared = prepare([{"text": "the film was good", "id": 1}], plain_tokenizer)
    assert not any("classifier" in note for note in prepared.report.notes)
