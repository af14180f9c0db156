"""Packs hold every document once, whole, and as few packs as best fit promises."""

import random

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oribi.data.packing import best_fit, pack, token_lengths
from oribi.data.prepare import prepare_dataset
from oribi.errors import DataError

lengths_and_room = st.integers(4, 64).flatmap(
    lambda room: st.tuples(st.lists(st.integers(1, room), max_size=80), st.just(room))
)


@settings(deadline=None)
@given(lengths_and_room)
def test_every_document_is_in_one_pack_and_no_pack_is_too_full(case):
    lengths, room = case
    packs = best_fit(lengths, room)
    assert sorted(d for p in packs for d in p) == list(range(len(lengths)))
    totals = [sum(lengths[d] for d in p) for p in packs]
    assert all(0 < total <= room for total in totals)
    # no two packs fit into one, or best fit would have joined them
    assert len(packs) < 2 or sum(sorted(totals)[:2]) > room
    # so all packs but one are more than half full
    assert len(packs) <= 2 * -(-sum(lengths) // room)


def test_a_known_case_is_packed_into_the_fewest_packs():
    lengths = [6, 5, 5, 4, 3, 1]
    assert sorted(sorted(lengths[d] for d in p) for p in best_fit(lengths, 8)) == [[1, 6], [3, 5], [4], [5]]


def test_best_fit_takes_the_fullest_pack_that_has_room():
    # 7 and 6 open packs with room 3 and 4; 3 fits both and takes the fuller one, so 4 still fits
    assert sorted(map(sorted, best_fit([7, 6, 4, 3], 10))) == [[0, 3], [1, 2]]


def test_a_document_beyond_a_pack_is_named():
    with pytest.raises(
        DataError, match="example 1 has 9 tokens, a pack 8: prepare the data with max_seq_length <= 8"
    ):
        best_fit([3, 9], 8)


def test_no_documents_make_no_packs():
    assert best_fit([], 8) == []


@pytest.fixture
def documents():
    rng = random.Random(0)
    rows = []
    for number in range(200):
        ids = [1000 * number + i for i in range(rng.randint(1, 40))]
        rows.append({"input_ids": ids, "labels": [-100 if rng.random() < 0.5 else i for i in ids]})
    return rows


def test_packs_hold_the_documents_unchanged(documents, tmp_path, monkeypatch):
    monkeypatch.setattr("oribi.data.packing.WRITTEN_TOKENS", 200)  # several writes
    dataset = datasets.Dataset.from_list(documents)
    packs = pack(dataset, 64, cache_dir=tmp_path)
    assert packs.column_names == ["input_ids", "labels", "seq_lengths"]
    seen = []
    for row in packs:
        assert len(row["input_ids"]) == len(row["labels"]) == sum(row["seq_lengths"]) <= 64
        at = 0
        for length in row["seq_lengths"]:
            seen.append(
                {"input_ids": row["input_ids"][at : at + length], "labels": row["labels"][at : at + length]}
            )
            at += length
    assert sorted(seen, key=lambda d: d["input_ids"]) == sorted(documents, key=lambda d: d["input_ids"])
    assert len(packs) == len(best_fit([len(d["input_ids"]) for d in documents], 64))


def test_the_seed_orders_the_packs_and_equal_input_is_not_packed_again(documents, tmp_path):
    dataset = datasets.Dataset.from_list(documents)
    a, again, b = (
        pack(dataset, 64, cache_dir=tmp_path),
        pack(dataset, 64, cache_dir=tmp_path),
        pack(dataset, 64, seed=1),
    )
    assert list(a) == list(again)
    assert list(a) != list(b)
    assert sorted(map(str, a)) == sorted(map(str, b))
    assert len(list(tmp_path.glob("packs-*.arrow"))) == 1


def test_selected_rows_are_packed_as_selected(documents):
    dataset = datasets.Dataset.from_list(documents).select([5, 3, 9])
    assert token_lengths(dataset).tolist() == [len(documents[i]["input_ids"]) for i in (5, 3, 9)]
    ids = sorted(i for row in pack(dataset, 128) for i in row["input_ids"])
    assert ids == sorted(i for n in (5, 3, 9) for i in documents[n]["input_ids"])


def test_prepared_data_is_packed_from_disk(chatml_tokenizer, tmp_path):
    rows = [{"text": "word " * n} for n in range(1, 40)]
    prepared = prepare_dataset(
        rows, chatml_tokenizer, max_seq_length=128, cache_dir=tmp_path, progress=False, announce=None
    )
    packs = pack(prepared.dataset, 256)
    assert sum(len(row["input_ids"]) for row in packs) == prepared.report.tokens
    fullness = prepared.report.tokens / (256 * len(packs))
    assert fullness > 0.85


def test_many_short_documents_fill_their_packs():
    lengths = np.random.default_rng(0).integers(20, 400, 20_000)
    packs = best_fit(lengths, 2048)
    assert lengths.sum() / (2048 * len(packs)) > 0.999


def test_packs_know_where_each_document_came_from(documents, tmp_path, monkeypatch):
    monkeypatch.setattr("oribi.data.packing.WRITTEN_TOKENS", 200)
    named = [{**row, "origin": f"file:{row['input_ids'][0]}"} for row in documents]
    packs = pack(datasets.Dataset.from_list(named), 64, cache_dir=tmp_path)
    for row in packs:
        starts = [sum(row["seq_lengths"][:n]) for n in range(len(row["seq_lengths"]))]
        assert row["origins"] == [f"file:{row['input_ids'][start]}" for start in starts]
