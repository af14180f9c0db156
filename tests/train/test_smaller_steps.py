"""Out of memory: the step is run again in parts, and learns exactly what it would have learnt."""

import gc
import logging
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from oribi.data.collate import PackCollator, PaddedCollator
from oribi.errors import EndedElsewhere, TrainingError
from oribi.lora.attach import attach_lora
from oribi.models.load import load_model
from oribi.train.arguments import SFTConfig
from oribi.train.smaller_steps import SmallerSteps, StepsOfSharedRows, cut
from oribi.train.smaller_steps_together import SmallerStepsTogether
from oribi.train.trainer import SFTTrainer
from tests.models.tiny import tiny_config, tiny_pair
from tests.train.conftest import chatml_tokenizer

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def examples(*lengths: int) -> list[dict[str, list[int]]]:
    return [{"input_ids": list(range(3, 3 + n)), "labels": list(range(3, 3 + n))} for n in lengths]


def trained(load, conversations, folder, limit: int | None = None, **settings) -> tuple[dict, list[float]]:
    """Weights and losses of a short training in which no micro-batch above `limit` tokens fits.

    The shortage comes after backward has written gradients, as it does where a lower layer's backward fails.
    """
    model, tokenizer = load()
    arguments = {
        "max_steps": 3, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
        "disable_tqdm": True, "save_strategy": "no", "warmup_steps": 0, **settings,
    }  # fmt: skip
    trainer = SFTTrainer(
        model,
        SFTConfig(output_dir=str(folder), **arguments),
        train_dataset=conversations,
        processing_class=tokenizer,
    )

    def runner(model, inputs, targets):
        loss = model(**inputs, num_items_in_batch=targets).loss
        loss.backward()
        if limit is not None and inputs["input_ids"].numel() > limit:
            raise OUT_OF_MEMORY
        return loss.detach()

    trainer.step_runner = runner
    trainer.train()
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return weights, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{}, {"packing": True}, {"padding_free": False}], ids=["rows", "packs", "padded"]
)
def test_a_cut_step_learns_what_the_whole_one_would(load, conversations, tmp_path, settings, caplog):
    whole = trained(load, conversations, tmp_path / "whole", **settings)
    with caplog.at_level(logging.WARNING, logger="oribi.train.smaller_steps"):
        parts = trained(load, conversations, tmp_path / "parts", limit=130, **settings)
    assert [r.message for r in caplog.records if "out of memory" in r.message]
    assert parts[1] == pytest.approx(whole[1], rel=1e-5)
    for name, weight in whole[0].items():
        torch.testing.assert_close(parts[0][name], weight, rtol=1e-4, atol=2e-5)


def test_one_line_says_what_happened(load, conversations, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="oribi.train.smaller_steps"):
        trained(load, conversations, tmp_path, limit=250, max_steps=1)
    (line,) = [r.message for r in caplog.records if r.name.startswith("oribi")]
    assert line.startswith("step 0: out of memory with micro-batches of ")
    assert "in up to 2 parts of at most" in line


def test_a_document_that_does_not_fit_alone_is_an_error(load, conversations, tmp_path):
    with pytest.raises(TrainingError, match="a document of .* tokens does not fit into GPU memory alone"):
        trained(load, conversations, tmp_path, limit=3)


def test_the_shortage_of_forward_is_met_too(load, conversations, tmp_path):
    model, tokenizer = load()
    trainer = SFTTrainer(
        model,
        SFTConfig(output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=8, disable_tqdm=True),
        train_dataset=conversations,
        processing_class=tokenizer,
    )
    sizes = []

    def watch(module, inputs, kwargs):
        sizes.append(kwargs["input_ids"].numel())
        if sizes[-1] > 130:
            raise OUT_OF_MEMORY

    model.get_base_model().model.register_forward_pre_hook(watch, with_kwargs=True)
    trainer.train()
    assert max(sizes) > 130
    assert sizes[-1] <= 130


def test_documents_stay_whole_and_keep_their_order():
    batch = PackCollator(pad_to_multiple_of=64)(examples(5, 9, 30, 4, 12, 7))
    for parts in (2, 3, 4, 8, 100):
        pieces = cut(batch, parts)
        assert len(pieces) <= parts
        lengths = [n for piece in pieces for n in piece["cu_seq_lens_q"].diff().tolist()]
        assert lengths[:6] == [5, 9, 30, 4, 12, 7]
        for piece in pieces:
            assert piece["cu_seq_lens_q"][0] == 0
            assert piece["cu_seq_lens_q"][-1] == piece["input_ids"].shape[1]
            assert piece["max_length_q"] == int(piece["cu_seq_lens_q"].diff().max())
            starts = piece["cu_seq_lens_q"][:-1].long()
            assert torch.all(piece["position_ids"][0, starts] == 0)
            assert torch.all(piece["labels"][0, starts] == -100)
        labels = torch.cat([piece["labels"][piece["labels"] != -100] for piece in pieces])
        assert torch.equal(labels, batch["labels"][batch["labels"] != -100])


def test_padded_rows_are_cut_between_rows():
    batch = PaddedCollator(0)(examples(5, 9, 30))
    pieces = cut(batch, 2)
    assert [tuple(piece["input_ids"].shape) for piece in pieces] == [(2, 30), (1, 30)]
    assert torch.equal(torch.cat([piece["attention_mask"] for piece in pieces]), batch["attention_mask"])


def test_what_trains_nothing_is_left_out_but_never_all():
    rows = examples(8, 8)
    rows[1]["labels"] = [-100] * 8
    batch = PackCollator()(rows)
    assert len(cut(batch, 2)) == 1
    rows[0]["labels"] = [-100] * 8
    assert cut(PackCollator()(rows), 2)[0]["input_ids"].shape == (1, 16)


class Gathers:
    """Counts forwards and backwards whose layers are gathered, and those of them that are not computed."""

    def __init__(self) -> None:
        self.begun, self.finished = 0, []

    def begin_pass(self) -> None:
        self.begun += 1

    def finish_pass(self, first_trained: int) -> None:
        self.finished.append(self.begun)


def together(run, is_last, said) -> SmallerStepsTogether:
    """One process of several; `said` are the worst states that the others report, in turn."""
    base = SimpleNamespace(
        model=SimpleNamespace(shards=Gathers(), norm_name="norm", layers=[0, 1]),
        device=torch.device("cpu"),
        named_parameters=list,
    )
    return SmallerStepsTogether(
        run, lambda: None, False, base, is_last, lambda own: min(own, -said.pop(0)), lambda own: [None, own], True
    )  # fmt: skip


def test_a_process_that_is_short_gathers_on_and_repeats_the_step_with_all_of_them():
    failing = {2}  # the second micro-batch's only part

    def run(inputs, targets):
        ran.append(inputs["input_ids"].numel())
        if len(ran) in failing:
            raise OUT_OF_MEMORY
        return torch.tensor(float(ran[-1]))

    ran, said = [], [0, 0]
    batches = [PackCollator()(examples(*lengths)) for lengths in ((4, 4), (3, 5), (6,), (2, 2))]
    steps = together(run, lambda: len(steps._taken) == 4, said)
    losses = [float(steps(0, batch, 20)) for batch in batches]
    # two were not known when they were asked for; the last answer adds them
    assert losses == [8.0, 0.0, 0.0, 8.0 + 6.0 + 4.0]
    assert ran == [8, 8, *(4, 4), *(3, 5), 6, *(2, 2)]
    gathers = steps._shards
    assert gathers.begun == 4 + 8  # four micro-batches whole, then in two parts each
    assert gathers.finished == [
        2,
        3,
        4,
        4 + 6,
    ]  # what was short or thrown away, and the part that a single row does not have


def test_a_process_repeats_its_step_where_another_one_was_short_and_ends_where_nothing_helps():
    steps = together(lambda inputs, targets: torch.tensor(1.0), lambda: True, [1, 0])
    assert float(steps(0, PackCollator()(examples(4, 4)), 6)) == 2.0
    assert steps.parts == 2

    def fails(inputs, targets):
        raise OUT_OF_MEMORY

    steps = together(fails, lambda: True, [0])
    with pytest.raises(TrainingError, match="a document of 4 tokens does not fit"):
        steps(0, PackCollator()(examples(4)), 6)
    steps = together(lambda inputs, targets: torch.tensor(1.0), lambda: True, [2])
    steps._agree = lambda own: [None, "too long"]
    with pytest.raises(EndedElsewhere, match="process 1 failed, which ends the training: too long"):
        steps(0, PackCollator()(examples(4)), 6)


def test_parts_of_shared_rows_are_not_cut_and_end_with_advice():
    def run(inputs, targets):
        raise OUT_OF_MEMORY

    steps = StepsOfSharedRows(run, lambda: None, plans=True)
    with pytest.raises(
        TrainingError, match="not cut further: raise context_parallel and gpus, lower max_seq_length"
    ):
        steps(0, PackCollator()(examples(4, 4)), 6)


def test_a_leaner_plan_is_tried_where_nothing_can_be_cut():
    tries = []

    def run(inputs, targets):
        tries.append(steps.reliance)
        if len(tries) < 3:
            raise OUT_OF_MEMORY
        return torch.zeros(())

    steps = SmallerSteps(run, lambda: None, plans=True)
    steps(0, PackCollator()(examples(9)), 8)
    assert tries == sorted(tries, reverse=True)
    assert len(set(tries)) == 3


def test_the_next_step_starts_in_parts(load, conversations, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="oribi.train.smaller_steps"):
        trained(load, conversations, tmp_path, limit=130, max_steps=4)
    assert (
        len({r.message.split(":")[0] for r in caplog.records}) <= 2
    )  # short once, or once more for a longer batch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_that_runs_out_trains_on_in_parts(tmp_path, caplog):
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "vocab_size": 8000}
    config = tiny_config("llama", **sizes, num_attention_heads=8, num_key_value_heads=4, head_dim=128)
    tiny_pair(config)[1].to(torch.bfloat16).save_pretrained(tmp_path / "model")
    chatml_tokenizer().save_pretrained(tmp_path / "model")
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 200, (2048,), generator=draw).tolist() for _ in range(24)]
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})

    def losses(gib: float | None) -> list[float]:
        torch.manual_seed(0)
        model, tokenizer = load_model(str(tmp_path / "model"), load_in_4bit=False, max_seq_length=2048)
        model = attach_lora(model, use_gradient_checkpointing="speed")
        total = torch.cuda.get_device_properties(0).total_memory
        share = 1.0 if gib is None else (torch.cuda.memory_allocated() + gib * 2**30) / total
        gc.collect()  # a trainer in a cycle of references holds the memory of its graphs
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(share)
        try:
            args = SFTConfig(
                output_dir=str(tmp_path / "run"), max_steps=3, per_device_train_batch_size=8, warmup_steps=0,
                save_strategy="no", disable_tqdm=True, dataset_kwargs={"skip_prepare_dataset": True},
            )  # fmt: skip
            trainer = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer)
            trainer.train()
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole = losses(None)
    assert not any("out of memory" in record.message for record in caplog.records)
    with caplog.at_level(logging.WARNING, logger="oribi.train.smaller_steps"):
        parts = losses(1.5)
    assert any("out of memory" in record.message for record in caplog.records)
    assert parts == pytest.approx(whole, rel=2e-3)
