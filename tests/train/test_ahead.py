"""Batches are read before a step's loss is waited for, and say which rows are trained; neither changes what is learned."""

import pytest
import torch
from datasets import Dataset

from oribi import SFTTrainer
from oribi.errors import DataError
from oribi.train import batches, step


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def asked(monkeypatch):
    """Trained rows as the model got them; None where it had to read the labels."""
    found = []
    real = SFTTrainer.trained_rows_of
    monkeypatch.setattr(
        SFTTrainer, "trained_rows_of", lambda self, inputs: found.append(real(self, inputs)) or found[-1]
    )
    return found


def test_the_loss_is_computed_on_the_rows_that_batches_tell(make, conversations, asked, monkeypatch):
    told = make(conversations, max_steps=2)
    told.train()
    assert asked
    assert all(rows is not None and len(rows) for rows in asked)
    monkeypatch.setattr(batches.TellsTrainedRows, "__call__", lambda self, rows: self._collate(rows))
    unaware = make(conversations, max_steps=2)
    unaware.train()
    assert asked[-1] is None
    assert losses_of(told) == losses_of(unaware)


class OwnLabels(SFTTrainer):
    """Trains on every token, however the rows were labelled."""

    in_place = False

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.in_place:
            inputs["labels"].copy_(inputs["input_ids"])
        else:
            inputs["labels"] = inputs["input_ids"].clone()
        return super().training_step(model, inputs, num_items_in_batch)


@pytest.mark.parametrize("in_place", [pytest.param(False, marks=pytest.mark.long), True])
def test_labels_that_a_trainer_changes_are_the_ones_that_count(make, conversations, asked, in_place):
    OwnLabels.in_place = in_place
    changed, usual = make(conversations, cls=OwnLabels, max_steps=1), make(conversations, max_steps=1)
    changed.train()
    assert asked[-1] is None
    usual.train()
    assert losses_of(changed)[0] > 1.5 * losses_of(usual)[0]  # the sum of more tokens over the same count


def test_a_label_outside_the_vocabulary_is_found_before_the_step(make):
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7, 8]] * 4, "labels": [[-100, 6, 10**6, 8]] * 4})
    trainer = make(rows, dataset_kwargs={"skip_prepare_dataset": True}, max_steps=1)
    with pytest.raises(DataError, match="label 1000000 at position 1 is outside the vocabulary"):
        trainer.train()


def order_of_events(make, rows, **settings) -> list[str]:
    events = []

    class Watched(SFTTrainer):
        def log(self, logs, *given):
            events.append(f"log {self.state.global_step}" if "loss" in logs else "end")
            super().log(logs, *given)

        def _save_checkpoint(self, *given):
            events.append(f"save {self.state.global_step}")
            super()._save_checkpoint(*given)

    trainer = make(rows, cls=Watched, **settings)
    collate = trainer.data_collator
    trainer.data_collator = lambda examples: events.append("read") or collate(examples)
    trainer.train()
    return [event for event in events if event != "end"]


def test_the_next_batches_are_read_before_a_loss_is_logged_unless_a_checkpoint_follows(make, conversations):
    # accelerate itself holds one batch more
    events = order_of_events(
        make, conversations, max_steps=4, gradient_accumulation_steps=2, save_strategy="steps", save_steps=2
    )
    assert events == [
        *["read"] * 3, *["read"] * 2, "log 1", "log 2", "save 2", *["read"] * 2, *["read"] * 2, "log 3", "log 4", "save 4",
    ]  # fmt: skip


@pytest.mark.long
def test_every_row_of_a_pass_is_read_once(make, conversations):
    seen = []
    trainer = make(
        conversations.select(range(11)), max_steps=-1, num_train_epochs=2, per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )  # fmt: skip
    real = trainer.training_step
    trainer.training_step = lambda model, inputs, *given: (
        seen.extend(documents(inputs)) or real(model, inputs, *given)
    )
    trainer.train()
    assert len(seen) == 22
    assert sorted(seen[:11]) == sorted(seen[11:]) == sorted(set(seen[:11]))


def documents(inputs: dict) -> list[tuple[int, ...]]:
    bounds = inputs["cu_seq_lens_q"].tolist()
    ids = inputs["input_ids"][0].tolist()
    return [tuple(ids[a:b]) for a, b in zip(bounds, bounds[1:])]


def test_micro_steps_are_counted_in_the_last_line_of_the_log(make, conversations, monkeypatch):
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(step, "reason_against", lambda *given: None)
    monkeypatch.setattr(step.StepGraphs, "_record", lambda self, *given: None)
    trainer = make(conversations, max_steps=2, gradient_accumulation_steps=3)
    trainer.train()
    assert trainer.state.log_history[-1]["micro_steps_eager"] == 6
