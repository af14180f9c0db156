"""Batches of any lengths come to few shapes, each of which holds them, and what is added to them is told apart."""

import math
import random

import pytest
import torch

from oribi.train.step_shapes import empty_batch, fill_buffers, padded_sizes, sizes_of
from tests.models.test_parity import packed


def pack(lengths: list[int]) -> dict:
    batch = packed(lengths)
    return {**batch, "labels": batch["input_ids"].clone()}


def brought_to_shape(batch: dict, rows: torch.Tensor | None = None) -> dict:
    sizes = padded_sizes(sizes_of(batch, rows), pads=True)
    buffers = empty_batch(batch, sizes)
    fill_buffers(buffers, batch, rows)
    return buffers


def test_a_pack_gets_a_last_document_without_labels_and_empty_ones_behind_it():
    rows = torch.tensor([3, 60, 170])
    batch = brought_to_shape(pack([50, 90, 41]), rows)
    assert batch["input_ids"].shape == (1, 192)
    assert batch["labels"][0, 181:].tolist() == [-100] * 11
    assert batch["position_ids"][0, 181:].tolist() == list(range(11))
    assert batch["cu_seq_lens_q"].tolist() == [0, 50, 140, 181, 192, 192]
    assert batch["max_length_q"] == 192
    assert batch["trained_rows"].tolist() == [3, 60, 170] + [191] * 45


def test_a_single_document_is_lengthened_and_stays_one():
    batch = brought_to_shape(pack([50]))
    assert batch["cu_seq_lens_q"].tolist() == [0, 64]
    assert batch["position_ids"][0].tolist() == list(range(64))
    assert batch["labels"][0, 50:].tolist() == [-100] * 14
    assert batch["max_length_q"] == 64
    assert "trained_rows" not in batch


def test_equal_documents_of_a_whole_length_keep_their_exact_shape():
    batch = brought_to_shape(pack([64, 64, 64]))
    assert batch["cu_seq_lens_q"].tolist() == [0, 64, 128, 192]
    assert batch["max_length_q"] == 64


def test_few_lengths_for_all_packs():
    found = {padded_sizes(sizes_of(pack([n, 3]), None), pads=True).length for n in range(1020, 2040)}
    assert found == {1024 + 128 * i for i in range(9)}
    uneven = [[random.Random(n).randint(5, 2000), n] for n in range(5, 2000, 7)]
    assert len({padded_sizes(sizes_of(pack(one), None), pads=True) for one in uneven}) <= 32


def test_a_pack_that_is_not_lengthened_has_no_shape_unless_it_is_whole():
    assert padded_sizes(sizes_of(pack([700, 600]), None), pads=False) is None
    assert padded_sizes(sizes_of(pack([700, 580]), None), pads=False).length == 1280
    assert padded_sizes(sizes_of(pack([640, 640]), None), pads=False).is_dense


@pytest.mark.parametrize("seed", range(5))
def test_every_document_fits_its_shape_and_no_shape_is_taken_for_another(seed):
    draw = random.Random(seed)
    shapes = set()
    for _ in range(60):
        lengths = [int(math.exp(draw.gauss(4, 1))) + 1 for _ in range(draw.randint(1, 40))]
        batch = pack(lengths)
        rows = torch.arange(draw.randint(0, sum(lengths) - 1)) if draw.random() < 0.7 else None
        sizes = sizes_of(batch, rows)
        own = padded_sizes(sizes, pads=True)
        shapes.add(own)
        for shape in {own, *(other for other in shapes if other.holds(sizes))}:
            buffers = empty_batch(batch, shape)
            fill_buffers(buffers, batch, rows)
            bounds = buffers["cu_seq_lens_q"]
            assert bounds[-1] == buffers["input_ids"].shape[1] == shape.length
            assert bounds.diff().min() >= 0
            assert bounds.diff().max() <= shape.longest
            equal = (bounds.diff() == shape.longest).all()
            assert shape.is_dense == bool(equal)  # attention takes packs of equal documents for rows
            starts = (buffers["position_ids"][0] == 0).nonzero().view(-1)
            assert set(starts.tolist()) == set(bounds[:-1].tolist()) - {shape.length}
            assert buffers["input_ids"][:, : sum(lengths)].equal(batch["input_ids"])
            assert (buffers["labels"][:, sum(lengths) :] == -100).all()
            if rows is None:
                assert shape.trains_all
            elif not shape.trains_all:
                assert buffers["trained_rows"][: len(rows)].equal(rows)
                assert (buffers["trained_rows"][len(rows) :] == shape.length - 1).all()
