"""`oribi selftest` passes here, and what it is there to find makes it fail."""

import json
import math

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from typer.testing import CliRunner

from oribi.cli import build_command
from oribi.environment import detect
from oribi.errors import ModelError
from oribi.kernels.expert_linear import StackWeight
from oribi.selftest import suite
from oribi.selftest.comparison import Comparison, failed
from oribi.selftest.experts import WITH_EXPERTS
from oribi.selftest.kernels import compare_kernels
from oribi.selftest.steps import (
    compare_documents,
    compare_ways,
    expected_steps,
    gradients_of,
    reference_step,
    step_error,
    trained_step,
)
from oribi.selftest.subject import Subject, reference_of, write_small_model
from oribi.train.trainer import SFTTrainer


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> Subject:
    return Subject(str(write_small_model(tmp_path_factory.mktemp("small"))), "cpu")


@pytest.mark.long
def test_the_whole_table_holds(oribi, tmp_path):
    table = tmp_path / "table.json"
    done = oribi("selftest", "--json", table)
    assert done.code == 0, done.out[-3000:] + done.err[-3000:]
    checks = json.loads(table.read_text())
    assert done.records == checks
    # eleven ops are checked in the machine's training dtype, too, where that is not float32
    assert len(checks) >= (50 if detect().dtype is torch.float32 else 61)
    assert all(check["passed"] for check in checks)
    assert {
        "kernels", "a step's gradients", "recompute policies", "documents of a pack", "sharded codes", "files",
        "experts of qwen3_moe", "experts of gpt_oss",
    } == {check["group"] for check in checks}  # fmt: skip


def test_a_mean_of_means_is_found(subject, tmp_path, monkeypatch):
    model, tokenizer = subject.load()
    rows = subject.rows(8, 320)
    expected = reference_step(reference_of(model), rows)
    sizes = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}
    error, _ = step_error(trained_step(model, tokenizer, rows, tmp_path, **sizes), expected)
    assert error < 1e-5
    real = SFTTrainer.compute_loss

    def each_batch_by_its_own_targets(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return real(self, model, inputs, return_outputs) / 3

    monkeypatch.setattr(SFTTrainer, "compute_loss", each_batch_by_its_own_targets)
    error, _ = step_error(trained_step(model, tokenizer, rows, tmp_path, **sizes), expected)
    assert error > 1e-2


@pytest.mark.parametrize("model_type", WITH_EXPERTS)
def test_a_wrong_product_of_experts_is_found(model_type, tmp_path, monkeypatch):
    path = write_small_model(tmp_path / "model", model_type=model_type)
    stored = load_file(path / "model.safetensors").keys()
    of_one = (
        "model.layers.1.mlp.experts.gate_up_proj_scales" if model_type == "gpt_oss" else "7.up_proj.weight"
    )
    assert any(name.endswith(of_one) for name in stored)
    model, tokenizer = Subject(str(path), "cpu").load()
    assert any("experts.lora_B" in name for name, p in model.named_parameters() if p.requires_grad)
    rows = Subject(str(path)).rows(8, 320)
    (expected,), own = expected_steps(model, [rows])
    assert own.passed
    ways = {"one batch": (rows, expected, 8, 1, {})}
    assert [check.passed for check in compare_ways(model, tokenizer, tmp_path, ways, own.limit)] == [True]
    real = StackWeight.factor_gradients

    def without_weights(self, x_buffer, dy_buffer, offs, like, weights=None):
        return real(self, x_buffer, dy_buffer, offs, like)

    monkeypatch.setattr(StackWeight, "factor_gradients", without_weights)
    (check,) = compare_ways(model, tokenizer, tmp_path, ways, own.limit)
    assert not check.passed


def test_documents_that_see_each_other_are_found(subject, monkeypatch):
    model, _ = subject.load()
    rows = subject.rows(8, 320)
    assert compare_documents(model, rows).passed
    from oribi.data.collate import PackCollator

    real = PackCollator.__call__

    def one_document(self, examples):
        batch = real(self, examples)
        length = batch["input_ids"].shape[1]
        bounds = torch.tensor([0, length], dtype=torch.int32)
        return {**batch, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": length}

    monkeypatch.setattr(PackCollator, "__call__", one_document)
    assert not compare_documents(model, rows).passed


def test_the_reference_is_not_the_model_itself(subject):
    model, _ = subject.load()
    reference = reference_of(model)
    assert type(reference.get_base_model()).__module__.startswith("transformers.models")
    rows = subject.rows(2, 320)
    reference_step(reference, rows)
    assert all(gradient.abs().max() > 0 for gradient in gradients_of(reference).values())


def test_a_wrong_kernel_is_found(monkeypatch):
    monkeypatch.setattr("oribi.selftest.kernels.rms_norm", lambda x, w, eps: x * w)
    found = {check.name: check.passed for check in compare_kernels(torch.device("cpu"))}
    assert not found["rms_norm, float32"]
    assert found["rope, float32"]


def test_a_failed_check_ends_the_command_with_1(monkeypatch):
    good, bad = Comparison("g", "good", 1e-7, 1e-6), failed("g", "bad", ValueError("why"))
    assert good.passed
    assert not bad.passed
    assert math.isnan(bad.error)
    for checks, code in (([good], 0), ([good, bad], 1)):
        monkeypatch.setattr(suite, "_all", lambda *_, checks=checks, **__: iter(checks))
        result = CliRunner().invoke(build_command(), ["selftest", "--device", "cpu"])
        assert result.exit_code == code, result.output
    assert "FAILED" in result.output
    assert "ValueError: why" in result.output


def test_a_model_outside_the_families_is_refused(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    write_small_model(tmp_path)
    config = GPT2Config(vocab_size=320, n_embd=64, n_layer=1, n_head=2, n_positions=256)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="runs as transformers'"):
        Subject(str(tmp_path), "cpu").load()


def test_rows_are_the_same_in_every_process(subject):
    rows = subject.rows(5, 320)
    assert isinstance(rows, Dataset)
    assert rows[:] == subject.rows(5, 320)[:]
    assert rows[1]["labels"][0] == -100
