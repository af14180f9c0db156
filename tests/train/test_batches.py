"""Several processes read each row once an epoch, in the order of one process."""

import pytest
import torch
from datasets import Dataset
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from oribi.data.collate import PackCollator
from oribi.train.batches import FilledRows, GroupedByLength, RankBatches, RankRows, UntrainedFiller

ROWS = Dataset.from_list([{"input_ids": [i + 1] * 3, "labels": [i + 1] * 3} for i in range(11)])


def trained_rows(batches) -> list[list[int]]:
    """The rows of each batch that are trained, by their labels."""
    return [sorted(set(batch["labels"].flatten().tolist()) - {-100}) for batch in batches]


def loaders(processes: int, batch_size: int, stream: bool, drop_last: bool = False) -> list[DataLoader]:
    found = []
    for process in range(processes):
        collate = UntrainedFiller(PackCollator())
        if stream:
            rows = RankRows(ROWS.to_iterable_dataset(), batch_size, drop_last, processes, process)
            found.append(DataLoader(rows, batch_size=batch_size, drop_last=drop_last, collate_fn=collate))
        else:
            batches = BatchSampler(SequentialSampler(ROWS), batch_size, drop_last)
            dealt = RankBatches(batches, processes, process, filler=len(ROWS))
            found.append(DataLoader(FilledRows(ROWS), batch_sampler=dealt, collate_fn=collate))
    return found


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("processes", "batch_size"), [(2, 2), (3, 2), (4, 3), (5, 1), (2, 11)])
def test_each_row_is_trained_once_in_the_order_of_one_process(stream, drop_last, processes, batch_size):
    one = trained_rows(loaders(1, batch_size, stream, drop_last)[0])
    dealt = [trained_rows(loader) for loader in loaders(processes, batch_size, stream, drop_last)]
    assert len({len(batches) for batches in dealt}) == 1  # else the others would wait for ever
    in_turn = [batch for round_ in zip(*dealt) for batch in round_]
    assert in_turn[: len(one)] == one
    assert not any(in_turn[len(one) :])


@pytest.mark.parametrize(
    ("processes", "batch_size", "left"), [(2, 2, 0), (2, 4, 1), (4, 2, 2), (2, 1, 1), (3, 4, 0)]
)
def test_the_end_of_a_stream_that_not_every_process_gets_fills_no_step(processes, batch_size, left):
    """One process would not take a step with it either."""
    read = []
    for process in range(processes):
        rows = RankRows(ROWS.to_iterable_dataset(), batch_size, False, processes, process, fills=False)
        read.append([row["input_ids"][0] for row in rows])
        assert int(rows.left) == left
    whole = 11 if not left else 11 // (processes * batch_size) * processes * batch_size
    assert sorted(row for rows in read for row in rows) == list(range(1, whole + 1))


@pytest.mark.parametrize(("processes", "rounds", "size"), [(2, 2, 1), (2, 2, 2), (3, 1, 2), (4, 4, 1)])
def test_the_rows_of_a_step_are_those_of_one_process_and_are_shared_by_length(processes, rounds, size):
    lengths = [90, 3, 80, 5, 9, 70, 1, 60, 4, 9, 30]
    order = [7, 0, 1, 2, 8, 9, 10, 3, 4, 5, 6]
    dealt = [
        list(RankBatches(BatchSampler(order, size, False), processes, process, 99, lengths, rounds))
        for process in range(processes)
    ]
    assert {len(batches) for batches in dealt} == {-(-len(order) // (processes * size))}
    per_step = processes * rounds * size
    for step, first in enumerate(range(0, len(order), per_step)):
        own = [batches[step * rounds : (step + 1) * rounds] for batches in dealt]
        rows = [row for batches in own for batch in batches for row in batch if row != 99]
        assert sorted(rows) == sorted(order[first : first + per_step])
        assert all(0 < len(batch) <= size for batches in own for batch in batches)
    if (processes, rounds, size) == (2, 2, 1):
        # rows 7, 0, 1, 2 of 60, 90, 3 and 80 tokens: 90 + 3 and 80 + 60
        assert [[batches[0], batches[1]] for batches in dealt] == [[[0], [1]], [[2], [7]]]


def test_rows_grouped_by_length_come_in_one_order_for_all_and_another_one_each_epoch():
    lengths = [3, 9, 4, 1, 7, 7, 2, 8] * 4
    orders = []
    for seed in (0, 1):
        torch.manual_seed(seed)  # what a process drew before changes nothing
        sampler = GroupedByLength(LengthGroupedSampler(2, lengths=lengths), step_rows=4, seed=3)
        orders.append(list(sampler))
    assert orders[0] == orders[1]
    sampler.set_epoch(1)
    assert list(sampler) != orders[0]
    assert sorted(sampler) == list(range(32))
