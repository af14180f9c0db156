"""Which files of a folder are read: the hub's rule for splits, and nothing that is no data."""

import json

import pytest

from oribi.data.prepare import prepare_dataset
from oribi.data.sources import open_source
from oribi.errors import DataError


def make(folder, *names):
    """Files of one row each, whose text is the file's path."""
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"text": name}) if ".json" in name else name)
    return folder


def read(folder, split="train"):
    return [row["text"] for part in open_source(folder, split=split) for _, row in part.rows()]


LAYOUTS = {  # files -> split -> what is read
    ("train/0.jsonl", "test/0.jsonl"): {"train": ["train/0.jsonl"], "test": ["test/0.jsonl"]},
    ("data/train/0.jsonl", "data/dev/0.jsonl"): {
        "train": ["data/train/0.jsonl"],
        "validation": ["data/dev/0.jsonl"],
        "val": ["data/dev/0.jsonl"],
    },
    ("my_train.jsonl", "my-eval.jsonl", "valid.jsonl"): {
        "train": ["my_train.jsonl"],
        "test": ["my-eval.jsonl"],
        "validation": ["valid.jsonl"],
    },
    (
        "data/train-00000-of-00002.jsonl",
        "data/train-00001-of-00002.jsonl",
        "data/test-00000-of-00001.jsonl",
    ): {
        "train": ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
        "test": ["data/test-00000-of-00001.jsonl"],
    },
    ("training1.jsonl", "evaluation1.jsonl"): {"train": ["training1.jsonl"], "test": ["evaluation1.jsonl"]},
    ("a.train.jsonl", "a.test.jsonl"): {"train": ["a.train.jsonl"], "test": ["a.test.jsonl"]},
    ("latest.jsonl", "trains.jsonl"): {"train": ["latest.jsonl", "trains.jsonl"]},  # no words of a split
    ("train/test_questions.jsonl", "train/0.jsonl"): {"train": ["train/0.jsonl"]},
    ("train_sft.jsonl", "train_dpo.jsonl"): {"train_sft": ["train_sft.jsonl"]},
    ("a.jsonl", "sub/b.jsonl"): {"train": ["a.jsonl", "sub/b.jsonl"]},
}


@pytest.mark.parametrize("files", LAYOUTS, ids=lambda files: files[0])
def test_a_split_is_the_files_that_bear_its_name(files, tmp_path):
    make(tmp_path, *files)
    for split, expected in LAYOUTS[files].items():
        assert read(tmp_path, split) == expected


@pytest.mark.parametrize(
    "files", [("test/0.jsonl",), ("data.jsonl", "test.jsonl"), ("valid.csv.jsonl", "eval.jsonl")]
)
def test_another_split_is_never_taken_for_the_one_that_is_missing(files, tmp_path):
    make(tmp_path, *files)
    with pytest.raises(DataError, match="no file is named 'train'; by their names there are"):
        open_source(tmp_path)


def test_cards_metadata_and_hidden_files_are_no_rows(tmp_path):
    aside = ["README.md", "LICENSE.txt", "dataset_info.json", ".cache.jsonl", ".git/x.jsonl"]
    aside += [".ipynb_checkpoints/a-checkpoint.jsonl", "__MACOSX/a.jsonl", "docs/readme.md"]
    make(tmp_path, "data.jsonl", *aside)
    assert read(tmp_path) == ["data.jsonl"]
    (part,) = open_source(tmp_path)
    assert "reads 1 of 5 files: data.jsonl; not read: LICENSE.txt, README.md, dataset_info.json" in part.about


def test_a_folder_of_texts_keeps_its_other_texts(tmp_path):
    make(tmp_path, "README.md", "page.md", "notes.txt")
    assert read(tmp_path) == ["notes.txt", "page.md"]
    (part,) = open_source(tmp_path)
    assert part.is_text


def test_a_card_with_rules_of_its_own_is_said(tmp_path):
    make(tmp_path, "a.jsonl")
    (tmp_path / "README.md").write_text("---\nconfigs:\n- data_files: b/*.jsonl\n---\n# A card\n")
    (part,) = open_source(tmp_path)
    assert part.about.endswith("the data_files of its README.md are not followed")


def test_origins_tell_equal_names_apart(tmp_path):
    make(tmp_path, "a/x.jsonl", "b/x.jsonl", "c/x.jsonl", "c/y/x.jsonl")
    assert [origin for part in open_source(tmp_path) for origin, _ in part.rows()] == [
        "a/x.jsonl:1",
        "b/x.jsonl:1",
        "c/x.jsonl:1",
        "c/y/x.jsonl:1",
    ]
    parts = open_source([str(tmp_path / "a/x.jsonl"), {"path": tmp_path / "b/x.jsonl"}, str(tmp_path / "c")])
    assert [origin for part in parts for origin, _ in part.rows()] == [
        "a/x.jsonl:1",
        "b/x.jsonl:1",
        "c/x.jsonl:1",
        "c/y/x.jsonl:1",
    ]


def test_renamed_files_are_prepared_anew(tmp_path):
    make(tmp_path, "a.jsonl")
    before = open_source(tmp_path)[0].fingerprint
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    assert open_source(tmp_path)[0].fingerprint != before


def test_the_files_that_are_read_are_announced(tmp_path, chatml_tokenizer):
    make(tmp_path, "train/0.jsonl", "test/0.jsonl")
    lines = []
    report = prepare_dataset(
        tmp_path, chatml_tokenizer, max_seq_length=64, use_cache=False, progress=False, announce=lines.append
    ).report
    assert "reads 1 of 2 files: train/0.jsonl; not read: test/0.jsonl" in lines[0]
    assert lines[0] == report.first_row


LONG = "one two three four five " * 60


def test_folders_and_lists_of_texts_are_split_and_not_cut(tmp_path, chatml_tokenizer):
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "a.md").write_text(LONG)
    (tmp_path / "b.txt").write_text(LONG)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": LONG}))

    def prepared(source):
        return prepare_dataset(
            source, chatml_tokenizer, max_seq_length=64, use_cache=False, progress=False, announce=None
        ).report

    whole = prepared(tmp_path / "b.txt").tokens
    assert prepared(tmp_path / "book").tokens_cut == 0
    both = prepared([str(tmp_path / "b.txt"), str(tmp_path / "book")])
    assert (both.tokens_cut, both.tokens) == (0, 2 * whole)
    mixed = prepared([str(tmp_path / "rows.jsonl"), str(tmp_path / "b.txt")])
    assert mixed.overlong == "truncate, text files split"
    assert mixed.tokens == whole + 64
    assert mixed.tokens_cut == whole - 64
