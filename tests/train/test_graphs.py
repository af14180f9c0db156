"""Recorded micro-steps give what usual ones give; shapes, documents and reasons are as documented."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model

from oribi.kernels.adamw import FlatAdamW
from oribi.models.decoder import build
from oribi.models.fused_layer import POLICIES
from oribi.train.graphs import HOST_BOUND_FLOP, StepGraphs, fixed_shape, reason_against
from tests.models.test_fused_layer import perturb
from tests.models.test_parity import packed, relative
from tests.models.tiny import tiny_config

CUDA = torch.cuda.is_available()
gpu = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]


def adapted(dtype: torch.dtype, dropout: float = 0.0, model_type: str = "llama", **changes: object):
    torch.manual_seed(0)
    model = build(tiny_config(model_type, **changes), dtype=dtype, device="cuda" if CUDA else "cpu")
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout, task_type="CAUSAL_LM")
    model = get_peft_model(model, config).train()
    perturb(model, "lora_")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model, model.get_base_model()


def pack(lengths: list[int]) -> dict:
    batch = {name: x.cuda() if CUDA and torch.is_tensor(x) else x for name, x in packed(lengths).items()}
    return {**batch, "labels": batch["input_ids"].clone()}


def test_documents_are_padded_to_a_fixed_number_of_them():
    first, shape = fixed_shape(pack([5, 9, 1, 7, 2]))
    assert first["cu_seq_lens_q"].tolist() == [0, 5, 14, 15, 22, 24, 24, 24, 24]
    assert dict(shape)["longest"] == 16
    second, other = fixed_shape(pack([16, 3, 1, 1, 1, 2]))
    assert other == shape
    assert second["cu_seq_lens_q"][-1] == 24


def test_a_pack_grows_to_one_of_a_few_lengths_by_a_document_without_labels():
    lengths = [50, 90, 41]
    batch, shape = fixed_shape(pack(lengths), pads=True)
    assert batch["input_ids"].shape == (1, 192)
    assert batch["labels"][0, 181:].tolist() == [-100] * 11
    assert batch["position_ids"][0, 181:].tolist() == list(range(11))
    assert batch["cu_seq_lens_q"].tolist() == [0, 50, 140, 181, 192]
    assert fixed_shape(pack([92, 98]), pads=True)[0]["input_ids"].shape == (1, 192)
    assert {fixed_shape(pack([n, 3]), pads=True)[0]["input_ids"].shape[1] for n in range(1020, 2040)} == {
        1024 + 128 * i for i in range(9)
    }
    assert dict(shape)["longest"] == 128


def test_equal_documents_keep_their_exact_shape():
    batch, shape = fixed_shape(pack([6, 6, 6]))
    assert batch["cu_seq_lens_q"].tolist() == [0, 6, 12, 18]
    assert dict(shape)["longest"] == 6


def test_each_reason_against_recording_is_said():
    model, decoder = adapted(torch.float32)
    optimizer = FlatAdamW([p for p in model.parameters() if p.requires_grad])
    usual = {"tokens": 64, "sharded": False, "loss_scaled": False}
    if not CUDA:
        assert reason_against(model, decoder, optimizer, **usual) == "there is no GPU"
        return
    assert reason_against(model, decoder, optimizer, **usual) is None
    assert "gather each layer" in reason_against(model, decoder, optimizer, **{**usual, "sharded": True})
    assert "float16" in reason_against(model, decoder, optimizer, **{**usual, "loss_scaled": True})
    assert "the limit" in reason_against(
        model, decoder, optimizer, **{**usual, "tokens": int(HOST_BOUND_FLOP)}
    )
    assert "adamw_8bit" in reason_against(model, decoder, torch.optim.AdamW(model.parameters()), **usual)
    assert "dropout" in reason_against(*adapted(torch.float32, dropout=0.1), optimizer, **usual)


class TestOnTheGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("policy", POLICIES)
    def test_replayed_gradients_equal_usual_ones_bit_for_bit(self, policy):
        model, decoder = adapted(torch.float32)
        decoder.set_recompute_policy(policy)
        optimizer = FlatAdamW([p for p in model.parameters() if p.requires_grad])
        steps = StepGraphs(model, decoder, optimizer)
        for seed in range(5):
            torch.manual_seed(seed)
            batch = pack([32, 32])
            optimizer.zero_grad()
            loss = model(**batch, num_items_in_batch=torch.tensor(64.0, device="cuda")).loss
            loss.backward()
            usual = [place.grad.clone() for place in optimizer._places]
            loss = loss.detach()
            optimizer.zero_grad()
            assert torch.equal(steps(model, batch, 64), loss)
            assert all(torch.equal(place.grad, g) for place, g in zip(optimizer._places, usual))
            assert any(g.abs().max() > 0 for g in usual)
        assert sum(recorded is not None for recorded in steps._recorded.values()) == 1

    @pytest.mark.parametrize("model_type", ["llama", "qwen3_5_text"])
    def test_packs_of_other_documents_replay_the_same_graph(self, model_type):
        model, decoder = adapted(torch.bfloat16, model_type=model_type, hidden_size=128, head_dim=32)
        optimizer = FlatAdamW([p for p in model.parameters() if p.requires_grad])
        steps = StepGraphs(model, decoder, optimizer)
        for lengths in ([40, 20, 1], [33, 3, 25], [31, 29, 3], [20, 40, 2]):
            batch = pack(lengths)
            optimizer.zero_grad()
            loss = model(**batch, num_items_in_batch=torch.tensor(61.0, device="cuda")).loss
            loss.backward()
            usual = torch.cat([place.grad.flatten().clone() for place in optimizer._places])
            loss = loss.detach()
            optimizer.zero_grad()
            padded, _ = fixed_shape(batch, pads=True)
            assert padded["input_ids"].shape == (1, 64)
            assert relative(steps(model, batch, 61), loss) < 1e-3
            replayed = torch.cat([place.grad.flatten() for place in optimizer._places])
            assert relative(replayed, usual) < 2e-2  # atomic additions of attention's backward
        assert sum(recorded is not None for recorded in steps._recorded.values()) == 1

    def test_a_failed_recording_is_said_and_training_goes_on(self, caplog):
        model, decoder = adapted(torch.float32)
        optimizer = FlatAdamW([p for p in model.parameters() if p.requires_grad])
        steps = StepGraphs(model, decoder, optimizer)
        batch = pack([32, 32])
        kept_alive = model(**batch).loss  # its graph holds on to the default stream
        stream = torch.cuda.current_stream()
        with caplog.at_level(logging.WARNING):
            losses = [steps(model, batch, 64) for _ in range(3)]
        assert torch.equal(losses[0], losses[2])
        assert kept_alive.grad_fn is not None
        assert torch.cuda.current_stream() == stream
