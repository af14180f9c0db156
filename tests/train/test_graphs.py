"""Recorded micro-steps give what usual ones give; shapes, documents and reasons are as documented."""

import logging
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model

from oribi.kernels.adamw import FlatAdamW
from oribi.kernels.cross_entropy import labelled_rows, next_tokens
from oribi.models.decoder import build
from oribi.models.fused_layer import POLICIES
from oribi.train import graphs
from oribi.train.graphs import HOST_BOUND_FLOP, StepGraphs, reason_against
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


class Replayed:
    """Stands for a CUDA graph on the CPU: a replay computes the recorded step again, on what its buffers hold then."""

    def __init__(self, step) -> None:
        self.step, self.loss = step, torch.zeros(())

    def replay(self) -> None:
        self.loss.copy_(self.step())


@pytest.fixture
def steps_of(monkeypatch):
    """StepGraphs as a GPU would run them."""

    def record(step, pool, device):
        graph = Replayed(step)
        return graph, graph.loss

    if not CUDA:
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
        monkeypatch.setattr(graphs, "record", record)
    return StepGraphs


def trained_rows(batch: dict) -> torch.Tensor:
    return labelled_rows(next_tokens(batch["labels"]).view(-1), 128)


def usual_step(model, optimizer, batch, targets) -> tuple[torch.Tensor, torch.Tensor]:
    optimizer.zero_grad()
    loss = model(**batch, num_items_in_batch=torch.tensor(float(targets), device=model.device)).loss
    loss.backward()
    return loss.detach(), gradients(optimizer)


def gradients(optimizer) -> torch.Tensor:
    return torch.cat([place.grad.flatten().clone() for place in optimizer._places])


def masked(lengths: list[int], seed: int) -> dict:
    """A pack of which 20 tokens are trained."""
    batch = pack(lengths)
    starts = batch["cu_seq_lens_q"][:-1].tolist()
    order = torch.randperm(sum(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [place for place in order if place not in starts][:20]
    hidden = torch.ones_like(batch["labels"], dtype=torch.bool)
    hidden[0, chosen] = False
    batch["labels"][hidden] = -100
    return batch


FEW = ["llama", pytest.param("gemma2", marks=pytest.mark.long), pytest.param("lfm2", marks=pytest.mark.long)]


@pytest.mark.parametrize("model_type", FEW)
def test_uneven_packs_replay_a_few_graphs_and_learn_the_same(model_type, steps_of):
    model, decoder = adapted(torch.float32, model_type=model_type)
    optimizer = FlatAdamW([p for p in model.parameters() if p.requires_grad])
    counts = Counter()
    steps = steps_of(model, decoder, optimizer, counts=counts)
    lengths = [[40, 20], [33, 26], [50], [61], [31, 30], [5, 50], [64], [40, 22], [29, 28], [60], [30, 34]]
    for seed, one in enumerate(lengths):
        batch = masked(one, seed)
        loss, usual = usual_step(model, optimizer, batch, 20)
        optimizer.zero_grad()
        rows = trained_rows(batch)
        assert relative(steps(model, batch, 20, rows), loss) < 2e-6
        assert relative(gradients(optimizer), usual) < 2e-6
    assert counts == {"eager": 2, "recorded": 2, "replayed": 7}
    assert len(steps._recorded) == 2


def test_rows_that_are_trained_are_those_of_the_batch(steps_of):
    model, decoder = adapted(torch.float32)
    optimizer = FlatAdamW([p for p in model.parameters() if p.requires_grad])
    steps = steps_of(model, decoder, optimizer)
    for seed in range(4):
        batch = masked([40, 20], seed)
        rows = trained_rows(batch)
        right, wrong = steps(model, batch, 20, rows), steps(model, batch, 20, (rows + 1) % 60)
        assert relative(wrong, right) > 1e-3


def test_what_will_not_come_again_is_not_recorded(steps_of):
    model, decoder = adapted(torch.float32)
    optimizer = FlatAdamW([p for p in model.parameters() if p.requires_grad])
    left, counts = [100], Counter()
    steps = steps_of(model, decoder, optimizer, left=lambda: left[0], counts=counts)
    for _ in range(3):
        steps(model, pack([40, 20]), 60)
    assert counts == {"eager": 1, "recorded": 1, "replayed": 1}
    left[0] = 5
    for _ in range(3):
        steps(model, pack([100, 90]), 190)
    assert counts == {"eager": 4, "recorded": 1, "replayed": 1}


def test_a_larger_graph_runs_what_has_none_of_its_own(steps_of):
    model, decoder = adapted(torch.float32)
    optimizer = FlatAdamW([p for p in model.parameters() if p.requires_grad])
    counts = Counter()
    steps = steps_of(model, decoder, optimizer, left=lambda: 10, counts=counts)
    for lengths in ([100, 90], [101, 90], [60, 68]):
        batch = pack(lengths)
        loss, usual = usual_step(model, optimizer, batch, 200)
        optimizer.zero_grad()
        assert relative(steps(model, batch, 200), loss) < 2e-6
        assert relative(gradients(optimizer), usual) < 2e-6
    assert counts == {"eager": 1, "recorded": 1, "replayed": 1}


@pytest.mark.long
def test_lengths_that_rotate_otherwise_are_not_mixed(steps_of):
    scaling = {
        "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "rope_theta": 1e4,
        "original_max_position_embeddings": 60,
    }  # fmt: skip
    model, decoder = adapted(torch.float32, rope_parameters=scaling, head_dim=8, max_position_embeddings=240)
    optimizer = FlatAdamW([p for p in model.parameters() if p.requires_grad])
    steps = steps_of(model, decoder, optimizer)
    for lengths in ([50, 60], [70, 40], [58], [63], [55, 60], [70, 41], [59], [62], [40, 90], [61, 52]):
        batch = pack(lengths)
        loss, _ = usual_step(model, optimizer, batch, 200)
        assert relative(steps(model, batch, 200), loss) < 2e-6
    assert steps._recorded


def test_each_reason_against_recording_is_said():
    model, decoder = adapted(torch.float32)
    optimizer = FlatAdamW([p for p in model.parameters() if p.requires_grad])
    usual = {"tokens": 64, "lockstep": False, "loss_scaled": False}
    if not CUDA:
        assert reason_against(model, decoder, optimizer, **usual) == "there is no GPU"
        return
    assert reason_against(model, decoder, optimizer, **usual) is None
    assert "gather each layer together" in reason_against(
        model, decoder, optimizer, **{**usual, "lockstep": True}
    )
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
        assert len(steps._recorded) == 1

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
            assert relative(steps(model, batch, 61), loss) < 1e-3
            replayed = torch.cat([place.grad.flatten() for place in optimizer._places])
            assert relative(replayed, usual) < 2e-2  # atomic additions of attention's backward
        assert len(steps._recorded) == 1

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
