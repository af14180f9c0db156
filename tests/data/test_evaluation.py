"""Evaluation never reads the rows that are trained on: another split is taken, or it is refused."""

import json

import pytest
from datasets import Dataset, DatasetDict

from oribi.data.sources import evaluation_split, open_source, require_held_out
from oribi.errors import ConfigError, DataError


def write(path, count=3, text="row"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": f"{text} {n}"}) + "\n" for n in range(count)))
    return str(path)


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["train.jsonl", "dev.jsonl", "test.jsonl"], "train", "validation"),
        (["train.jsonl", "test.jsonl"], "train", "test"),
        (["train.jsonl", "my_val.jsonl", "test.jsonl"], "validation", "test"),
        (["train.jsonl"], "train", "train"),
        (["rows.jsonl"], "train", "train"),
    ],
)
def test_a_folder_that_is_trained_on_is_evaluated_on_its_held_out_split(names, split, expected, tmp_path):
    for name in names:
        write(tmp_path / "data" / name)
    same_folder = str(tmp_path / "data" / ".." / "data")
    assert evaluation_split(same_folder, [str(tmp_path / "data")], split, None) == expected


def test_a_saved_data_set_is_evaluated_on_the_split_of_its_own_name(tmp_path):
    rows = Dataset.from_dict({"text": ["a", "b"]})
    DatasetDict({"train": rows, "dev": rows.select([1])}).save_to_disk(tmp_path / "saved")
    assert evaluation_split(str(tmp_path / "saved"), [str(tmp_path / "saved")], "train", None) == "dev"


def test_a_hub_data_set_is_evaluated_on_its_held_out_split(monkeypatch):
    monkeypatch.setattr("datasets.get_dataset_split_names", lambda name: ["train", "test", "valid"])
    assert evaluation_split("owner/rows", ["owner/rows"], "train", None) == "valid"
    assert evaluation_split("owner/others", ["owner/rows"], "train", None) == "train"


def test_splits_that_cannot_be_listed_ask_for_eval_split(monkeypatch):
    def fail(name):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.get_dataset_split_names", fail)
    with pytest.raises(
        DataError, match="cannot be listed .no network.; name the one to evaluate on with eval_split"
    ):
        evaluation_split("owner/rows", ["owner/rows"], "train", None)


def test_eval_split_decides(tmp_path):
    write(tmp_path / "train.jsonl")
    assert evaluation_split(str(tmp_path), [str(tmp_path)], "train", "test") == "test"


@pytest.mark.parametrize("evaluated", ["data/train.jsonl", "data", "copy.jsonl"])
def test_rows_that_are_trained_on_are_refused_whatever_names_them(evaluated, tmp_path):
    write(tmp_path / "data" / "train.jsonl")
    write(tmp_path / "copy.jsonl")
    trained = open_source([{"path": str(tmp_path / "data")}]) + open_source(
        str(tmp_path / "data" / "train.jsonl")
    )
    source = str(tmp_path / evaluated)
    with pytest.raises(ConfigError, match="its rows are trained on, too.*eval_fraction.*eval_split"):
        require_held_out(source, open_source(source), trained)


def test_other_rows_are_taken(tmp_path):
    write(tmp_path / "train.jsonl")
    other = write(tmp_path / "other.jsonl", text="other")
    require_held_out(other, open_source(other), open_source(str(tmp_path / "train.jsonl")))
