"""Batches: documents end to end, or padded by position."""

import pytest
import torch

from oribi.data.collate import PackCollator, PaddedCollator
from oribi.errors import DataError

A = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}
B = {"input_ids": [8, 9], "labels": [-100, 9]}
PACK = {"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, -100, 9], "seq_lengths": [3, 2]}


@pytest.mark.parametrize("examples", [[A, B], [PACK]], ids=["documents", "a pack"])
def test_documents_lie_end_to_end(examples):
    batch = PackCollator()(examples)
    assert {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9]],
        "labels": [[-100, 6, 7, -100, 9]],
        "position_ids": [[0, 1, 2, 0, 1]],
        "cu_seq_lens_q": [0, 3, 5],
        "cu_seq_lens_k": [0, 3, 5],
        "max_length_q": 3,
        "max_length_k": 3,
    }
    assert batch["input_ids"].dtype == batch["labels"].dtype == batch["position_ids"].dtype == torch.int64
    assert batch["cu_seq_lens_q"].dtype == torch.int32


def test_constant_length_adds_a_document_that_trains_nothing():
    batch = PackCollator(tokens=8, pad_token_id=2)([A, B])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 2, 2, 2]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 8]
    assert PackCollator(tokens=5)([A, B])["cu_seq_lens_q"].tolist() == [0, 3, 5]
    assert PackCollator(pad_to_multiple_of=4)([A, B])["input_ids"].shape == (1, 8)


def test_more_tokens_than_the_constant_are_an_error():
    with pytest.raises(DataError, match="a batch has 5 tokens, more than the constant 4"):
        PackCollator(tokens=4)([A, B])


def test_examples_are_not_changed():
    example = {"input_ids": [5, 6], "labels": [5, 6]}
    PackCollator(tokens=4)([example])
    assert example == {"input_ids": [5, 6], "labels": [5, 6]}


@pytest.mark.parametrize(("side", "row"), [("right", [8, 9, 9]), ("left", [9, 8, 9])])
def test_padding_is_told_by_position_so_an_eos_that_is_also_the_pad_token_stays_trained(side, row):
    batch = PaddedCollator(pad_token_id=9, padding_side=side)([A, B])
    assert batch["input_ids"].tolist() == [[5, 6, 7], row]
    place = slice(0, 2) if side == "right" else slice(1, 3)
    assert batch["labels"][1, place].tolist() == [-100, 9]
    assert batch["attention_mask"][1, place].tolist() == [1, 1]
    assert batch["attention_mask"].sum() == 5
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_padding_to_a_multiple():
    assert PaddedCollator(0, pad_to_multiple_of=8)([A, B])["input_ids"].shape == (2, 8)


def test_packs_cannot_be_padded():
    with pytest.raises(DataError, match="Use PackCollator"):
        PaddedCollator(0)([PACK])
