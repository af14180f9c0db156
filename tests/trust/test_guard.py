"""Values that are not finite stop a run, are named, and reach no file."""

import json
import logging
import math

import pytest
import torch
from datasets import Dataset

from oribi.errors import ExportError, TrainingError
from oribi.save.trained import require_finite
from oribi.selftest.subject import Subject, write_small_model
from oribi.train.arguments import SFTConfig
from oribi.train.guard import LossGuard, documents_of, offending_module, origin_at, place_of
from oribi.train.trainer import SFTTrainer
from tests.trust.runs import trainer_in, weights_of

BAD = 7  # an id whose embedding the tests spoil


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> Subject:
    return Subject(str(write_small_model(tmp_path_factory.mktemp("small"))), "cpu")


def spoiled(subject, folder, value=math.nan, **settings):
    """A trainer in whose data row 9 alone holds BAD, and whose model gives no finite value for it."""
    settings = {
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "neftune_noise_alpha": None,
        **settings,
    }
    trainer = trainer_in(subject, folder, max_steps=8, **settings)
    rows = [dict(row) for row in trainer.train_dataset]
    for index, row in enumerate(rows):
        row["input_ids"] = [8 if id == BAD else id for id in row["input_ids"]]
        row["labels"] = [-100, *row["input_ids"][1:]]
        if index == 9:
            row["input_ids"][3] = BAD
    trainer.train_dataset = trainer.guard.rows = Dataset.from_list(rows)
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight[BAD] = value
    return trainer


@pytest.mark.parametrize("packing", [False, True])
def test_the_file_and_line_of_a_bad_row_are_named(subject, tmp_path, packing):
    model, tokenizer = subject.load()
    texts = [f"row {number} of twelve" + "!" * number for number in range(12)]
    texts[7] = "here is a ~ that no other row has"
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n")
    args = SFTConfig(
        output_dir=str(tmp_path / "run"), max_steps=4, max_length=96, packing=packing, save_strategy="no",
        disable_tqdm=True, per_device_train_batch_size=2, gradient_accumulation_steps=4,
    )  # fmt: skip
    trainer = SFTTrainer(model, args, train_dataset=str(data), tokenizer=tokenizer)
    assert len(trainer.train_dataset) == 12 or (packing and len(trainer.train_dataset) < 12)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("~", add_special_tokens=False)["input_ids"][0]] = (
            math.nan
        )
    with pytest.raises(TrainingError, match=r"Row \d+ of the prepared data, rows\.jsonl:8 \(.*embed_tokens"):
        trainer.train()


@pytest.mark.parametrize("optim", ["adamw_8bit", "adamw_torch"])
@pytest.mark.parametrize("logging_steps", [1, 4])
def test_a_bad_row_stops_the_run_and_is_named(subject, tmp_path, optim, logging_steps):
    trainer = spoiled(subject, tmp_path, optim=optim, logging_steps=logging_steps)
    with pytest.raises(TrainingError) as caught:
        trainer.train()
    message = str(caught.value)
    assert "is nan at step" in message
    assert "Row 9 of the prepared data" in message
    assert "of step 3 gives" in message  # rows 8 to 11
    assert "embed_tokens" in message
    assert all(weight.isfinite().all() for weight in weights_of(trainer).values())


def test_a_bad_row_in_a_rectangle_is_named(subject, tmp_path):
    trainer = spoiled(subject, tmp_path, padding_free=False)
    with pytest.raises(TrainingError, match="Row 9 of the prepared data"):
        trainer.train()


def test_the_module_that_overflows_is_named(subject, tmp_path):
    trainer = trainer_in(subject, tmp_path, max_steps=3, save_strategy="no")
    with torch.no_grad():
        layer = trainer.model.get_base_model().model.layers[1].mlp.up_proj
        layer.lora_B.default.weight.fill_(3e38)
    with pytest.raises(TrainingError, match=r"first in the output of .*layers\.1\.mlp\.up_proj"):
        trainer.train()


def test_a_gradient_that_is_not_finite_is_found_behind_a_finite_loss(subject, tmp_path):
    trainer = trainer_in(subject, tmp_path, max_steps=3, save_strategy="no")
    norm = trainer.model.get_base_model().model.layers[0].mlp.down_proj

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return grad * math.inf

    norm.register_forward_hook(lambda module, args, output: Spoil.apply(output))
    before = weights_of(trainer)
    with pytest.raises(
        TrainingError, match=r"gradient.* at step 1.*in the gradient of .*layers\.0\.mlp\.down_proj"
    ):
        trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(trainer).items())


def test_weights_that_are_not_finite_are_named_and_reach_no_file(subject, tmp_path):
    trainer = trainer_in(subject, tmp_path / "run", max_steps=2)
    with torch.no_grad():
        name, weight = next((n, p) for n, p in trainer.model.named_parameters() if p.requires_grad)
        weight[0, 0] = math.inf
    with pytest.raises(ExportError, match="lora_A"):
        trainer.save_model(str(tmp_path / "saved"))
    with pytest.raises(ExportError, match="nothing is written"):
        require_finite(trainer.model)
    with pytest.raises(TrainingError, match="The weights of .*lora_A.* are no longer finite"):
        trainer.train()
    assert not (tmp_path / "saved").exists()
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    from oribi.save import save_merged

    for method in ("lora", "merged_16bit"):
        with pytest.raises(ExportError, match="not finite"):
            save_merged(trainer.model, tmp_path / method, trainer.processing_class, method)
        assert not (tmp_path / method).exists()


def test_spikes_are_warned_of_and_ordinary_noise_is_not(caplog):
    guard = LossGuard()
    state = type("State", (), {"global_step": 0})()

    def log(loss: float, norm: float) -> list[str]:
        caplog.clear()
        state.global_step += 1
        with caplog.at_level(logging.WARNING):
            guard.on_log(None, state, None, logs={"loss": loss, "grad_norm": norm})
        return [record.getMessage() for record in caplog.records]

    for step in range(40):
        assert log(2.0 + 0.1 * math.sin(step), 1.0 + 0.3 * math.cos(step)) == []
    assert "the loss jumped to 4.0000" in log(4.0, 1.0)[0]
    assert "the gradient norm jumped to 50" in log(2.0, 50.0)[0]
    assert log(1.7, 0.8) == []


def test_overflows_under_a_gradient_scaler_are_ordinary(subject, tmp_path):
    trainer = trainer_in(subject, tmp_path, save_strategy="no")
    trainer.guard.scaled = True
    trainer.guard.require_norm(math.inf, 1, trainer.model, trainer.args)
    trainer.guard.scaled = False
    with pytest.raises(TrainingError, match="the gradient norm is inf at step 1"):
        trainer.guard.require_norm(math.inf, 1, trainer.model, trainer.args)


def test_documents_are_taken_apart_as_they_were_put_together():
    from oribi.data.collate import PackCollator, PaddedCollator

    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9], "labels": [-100, 9]}]
    for collate in (
        PackCollator(pad_to_multiple_of=8),
        PaddedCollator(0),
        PaddedCollator(0, padding_side="left"),
    ):
        assert [d["input_ids"][0].tolist() for d in documents_of(collate(rows))] == [[5, 6, 7], [8, 9]]
    assert place_of([1, 2, 3, 4], [3, 4]) == 2
    assert place_of([1, 2, 3, 4], [2, 4]) is None
    assert place_of([1], [1, 2]) is None
    pack = {"seq_lengths": [2, 3], "origins": ["a:1", "b:7"]}
    assert [origin_at(pack, start) for start in range(5)] == ["a:1", "a:1", "b:7", "b:7", "b:7"]
    assert origin_at({"origin": "a:3"}, 0) == "a:3"
    assert origin_at({}, 0) is None


def test_looking_for_the_module_leaves_the_model_as_it_was(subject):
    model, _ = subject.load()
    ids = torch.tensor([[5, 6, 7]])
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.grad = torch.ones_like(parameter)
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    assert offending_module(model.eval(), {"input_ids": ids, "labels": ids}) is None
    assert parameter.grad.eq(1).all()
    assert not model.training
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
