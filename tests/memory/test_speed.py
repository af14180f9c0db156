"""MFU: the formula against a count of the products that autograd really runs, and where it is shown."""

import io
import json
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

import oribi.memory.speed as speed
from oribi.environment import detect
from oribi.lora.attach import attach_lora
from oribi.memory.account import needed_flop_per_token
from oribi.memory.architecture import architecture_of
from oribi.memory.speed import Utilisation, shape_of, utilisation_of
from oribi.train.arguments import SFTConfig
from oribi.train.progress import Progress
from oribi.train.trainer import SFTTrainer
from tests.models.tiny import tiny_config, tiny_pair
from tests.models.tiny_checkpoint import checkpoint

H100 = ("NVIDIA H100 80GB HBM3", 80 * 10**9)


@pytest.fixture
def on_an_h100(monkeypatch):
    """The machine seems to have an H100; what runs still runs on the CPU."""

    def pretend(name=H100[0], memory=H100[1]):
        here = replace(detect(), device=torch.device("cuda"), device_name=name, memory_bytes=memory)
        monkeypatch.setattr(speed, "detect", lambda: here)

    pretend()
    return pretend


def counted(model, ids: torch.Tensor) -> int:
    """FLOP of the matrix products of one forward and backward, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("trains_all", [False, True])
def test_the_formula_counts_what_transformers_and_peft_compute(trains_all):
    """With eager attention, which masks but does not skip: half of its products are needed."""
    import peft

    config = tiny_config("llama", num_hidden_layers=3, vocab_size=512)
    config._attn_implementation = "eager"
    ours, theirs = tiny_pair(config)
    if not trains_all:
        settings = peft.LoraConfig(r=8, target_modules="all-linear")
        theirs, ours = peft.get_peft_model(theirs, settings), peft.get_peft_model(ours, settings)
    length = 64
    decoder = ours if trains_all else ours.get_base_model()
    expected = length * needed_flop_per_token(decoder, 1.0, length)
    width = decoder.model.layers[0].self_attn.sizes[0]
    attention = 12 * width * length / 2 * length * len(decoder.model.layers)
    found = counted(theirs, torch.randint(3, 512, (1, length)))
    # the lowest layer of a frozen model passes no gradient on, and the last token has no target
    assert found - attention == pytest.approx(expected, rel=0.05)
    assert expected > 1.2 * attention


def test_labels_and_lengths_are_read_from_rows_and_packs():
    rows = Dataset.from_dict({"input_ids": [[1] * 4, [1] * 8], "labels": [[-100] * 4, [-100] * 2 + [1] * 6]})
    assert shape_of(rows) == (6 / 12, (16 + 64) / 12)
    packs = Dataset.from_dict(
        {"input_ids": [[1] * 12], "labels": [[-100] * 6 + [1] * 6], "seq_lengths": [[4, 8]]}
    )
    assert shape_of(packs) == shape_of(rows)


def test_a_window_bounds_what_a_token_sees(load):
    model, _ = load()
    decoder = model.get_base_model()
    long, longer = (needed_flop_per_token(decoder, 1.0, length) for length in (100, 200))
    width, layers = decoder.model.layers[0].self_attn.sizes[0], len(decoder.model.layers)
    assert longer - long == 12 * width * 50 * layers
    for layer in decoder.model.layers:
        layer.self_attn.window = 50
    assert needed_flop_per_token(decoder, 1.0, 200) == needed_flop_per_token(decoder, 1.0, 100) == long


def test_only_known_gpus_and_16_bit_have_a_peak(load, on_an_h100):
    rows = Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[-100, 2]]})
    model, _ = load(dtype="bfloat16")
    found = utilisation_of(model.get_base_model(), rows)
    assert found.peak_flops == 989e12
    assert found.of(989e12 / found.flop_per_token) == pytest.approx(1.0)
    assert utilisation_of(load(dtype="float32")[0].get_base_model(), rows) is None
    assert utilisation_of(model.get_base_model(), rows.to_iterable_dataset()) is None
    on_an_h100("NVIDIA GeForce 9600", 2**30)
    assert utilisation_of(model.get_base_model(), rows) is None


def test_a_cpu_shows_none(load):
    rows = Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[-100, 2]]})
    assert utilisation_of(load(dtype="bfloat16")[0].get_base_model(), rows) is None


def test_it_is_logged_and_shown_beside_the_speed(load, conversations, on_an_h100, tmp_path):
    model, tokenizer = load(dtype="bfloat16", lora=False)
    model = attach_lora(model, r=4)
    trainer = SFTTrainer(
        model, SFTConfig(output_dir=str(tmp_path), max_steps=2), train_dataset=conversations, processing_class=tokenizer
    )  # fmt: skip
    trainer.train()
    entry = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    per_token = needed_flop_per_token(model.get_base_model(), *shape_of(trainer.train_dataset))
    assert entry["mfu"] == pytest.approx(entry["tokens_per_second"] * per_token / 989e12)
    printed = io.StringIO()
    progress = Progress(console=Console(file=printed, width=200))
    state = type("State", (), {"global_step": 1, "max_steps": 2, "is_world_process_zero": True})()
    progress.on_log(None, state, None, logs={"loss": 1.0, "tokens_per_second": 9e3, "mfu": 0.4321})
    assert "9,000 tokens/s  MFU 43.2%  left" in printed.getvalue()


def test_utilisation_is_arithmetic_over_the_peak():
    assert Utilisation(flop_per_token=2e9, peak_flops=1e15).of(100_000) == pytest.approx(0.2)


def test_fp8_makes_linear_layers_faster_and_leaves_experts_as_they_are(tmp_path):
    changes = {
        "mlp_only_layers": [],
        "num_experts_per_tok": 2,
        "hidden_size": 64,
        "moe_intermediate_size": 64,
    }
    checkpoint(tmp_path / "experts", "qwen3_moe", **changes)
    found = architecture_of(str(tmp_path / "experts"))
    experts, linear = 2 * 3 * 64 * 64, 64 * 32 * (4 + 4 + 2 + 2)  # of two experts; of attention
    share = speed.share_of_time_in_fp8(found)
    assert share == pytest.approx((experts + linear / speed.FP8_SPEED) / (experts + linear))
    checkpoint(tmp_path / "dense")
    assert speed.share_of_time_in_fp8(architecture_of(str(tmp_path / "dense"))) == pytest.approx(
        1 / speed.FP8_SPEED
    )
