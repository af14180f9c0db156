"""Processes that share rows: attention, gradients, losses and evaluations are those of one process, and what cannot be is refused."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from oribi.data.collate import PackCollator, PaddedCollator
from oribi.errors import ConfigError
from oribi.kernels import context_attention
from oribi.launch import require_groups
from oribi.models.decoder import build
from oribi.selftest.processes import run_together
from oribi.selftest.subject import Subject, write_small_model
from oribi.train.arguments import SFTConfig
from oribi.train.context import RowPart, join_context, require_context, require_shareable
from tests.models.tiny_checkpoint import checkpoint
from tests.train.shared_rows import TRAININGS, trained

FAMILIES = ("mistral", "gemma2", "gemma3_text")

posix = pytest.mark.skipif(sys.platform == "win32", reason="torch.distributed with gloo is tested on POSIX")


@dataclass
class Ran:
    """What processes found in a folder, and one process on the same rows."""

    folder: Path
    found: list[dict]
    one: dict[str, dict]


def run_all(folder: Path, models: list[Path], processes: int) -> Ran:
    """Every training of these models in one start of the processes, and in this process."""
    run_together(["-m", "tests.train.shared_rows", str(folder), *map(str, models)], processes, threads=1)
    one = {}
    for model in models:
        for kind, settings in TRAININGS.items():
            alone = {name: value for name, value in settings.items() if name != "fsdp"}
            name = f"{model.name}-{kind}"
            known = f"{model.name}-rows"
            one[name] = one[known] if not alone and known in one else trained(
                Subject(str(model), "cpu"), folder / f"one-{name}", **alone
            )  # fmt: skip
    return Ran(folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)], one)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.long)])
def ran(request, tmp_path_factory) -> Ran:
    """A llama; of four processes, two groups of two read different rows."""
    model = write_small_model(tmp_path_factory.mktemp("models") / "llama")
    return run_all(tmp_path_factory.mktemp("shared"), [model], request.param)


@pytest.fixture(scope="module")
def families_ran(tmp_path_factory) -> Ran:
    """Families with windows of several kinds, soft caps, and angles that differ by layer."""
    models, folder = [], tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        models.append(folder / family)
        checkpoint(models[-1], family, sliding_window=7)
    return run_all(tmp_path_factory.mktemp("shared"), models, 2)


def require_equal(ran: Ran, name: str) -> None:
    """That all processes found what one does."""
    for rank, found in enumerate(ran.found):
        assert found[name]["losses"] == pytest.approx(ran.one[name]["losses"], rel=1e-5)
        assert found[name]["eval_losses"] == pytest.approx(ran.one[name]["eval_losses"], rel=1e-5)
        own = torch.load(ran.folder / f"{name}-{rank}.pt")
        assert set(own) == set(ran.one[name]["gradients"])
        for parameter, gradient in ran.one[name]["gradients"].items():
            assert (own[parameter] - gradient).norm() <= 1e-5 * gradient.norm(), parameter


@posix
@pytest.mark.long
class TestSharedRows:
    def test_attention_and_its_gradients_are_those_of_the_whole_row(self, ran):
        """One document and several, grouped heads, windows, soft caps, and heads in portions."""
        for found in ran.found:
            assert len(found["attention"]) == 24
            assert max(found["attention"].values()) < 1e-12, found["attention"]

    @pytest.mark.parametrize("kind", TRAININGS)
    def test_gradients_and_losses_are_those_of_one_process(self, ran, kind):
        """Of unequal documents with untrained prompts, packs, accumulation; and with frozen weights shared as well."""
        require_equal(ran, f"llama-{kind}")


@posix
@pytest.mark.long
@pytest.mark.parametrize("kind", TRAININGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_windows_and_soft_caps_train_as_in_one_process(families_ran, family, kind):
    require_equal(families_ran, f"{family}-{kind}")


def config_of(model_type: str, **fields):
    return AutoConfig.for_model(model_type, num_hidden_layers=2, **fields)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            config_of("qwen3_5_text", layer_types=["linear_attention", "full_attention"]),
            "linear attention, whose memory runs",
        ),
        (config_of("lfm2", layer_types=["conv", "full_attention"]), "a convolution over neighbouring tokens"),
        (config_of("gemma4_text"), "keys and values that several layers share"),
        (config_of("gpt2"), "gpt2 is outside oribi's family table"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_families_whose_layers_want_whole_rows_are_refused_by_name(config, reason):
    with pytest.raises(ConfigError, match=f"context_parallel = 2: .*{reason}"):
        require_shareable(config, 2)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "olmo3"])
def test_families_of_attention_alone_share_rows(family):
    require_shareable(config_of(family), 2)


@pytest.mark.parametrize(("processes", "shared"), [(1, 2), (3, 2), (4, 3), (2, 4)])
def test_processes_that_do_not_make_whole_groups_are_refused(processes, shared):
    require_groups(1, processes)
    require_groups(processes, processes)
    wanted = -(-processes // shared) * shared
    with pytest.raises(
        ConfigError, match=f"context_parallel = {shared}: .* Set gpus: {wanted}, or start {wanted} processes"
    ):
        require_groups(shared, processes)


@pytest.fixture(scope="module")
def base():
    return build(
        config_of("llama", hidden_size=16, intermediate_size=16, num_attention_heads=2, vocab_size=9),
        device="cpu",
    )


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"padding_free": False}, "padding_free = False makes rectangles"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha scales its noise"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor wants the logits"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices = False"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches gives the processes"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_settings_that_want_whole_rows_are_refused_by_name(base, monkeypatch, setting, reason):
    args = SFTConfig(context_parallel=2, **setting)
    monkeypatch.setattr(type(args), "world_size", 2)
    with pytest.raises(ConfigError, match=f"context_parallel = 2, but {reason}"):
        require_context(args, base)


def test_what_a_trainer_is_given_for_whole_rows_is_refused_by_name(base):
    trainer = SimpleNamespace(
        args=SFTConfig(context_parallel=2),
        compute_metrics=len,
        compute_loss_func=None,
        data_collator=PaddedCollator(0),
    )
    with pytest.raises(
        ConfigError, match=r"compute_metrics and data_collator \(PaddedCollator\) would take it"
    ):
        join_context(trainer)


def test_a_run_is_refused_before_anything_is_opened(oribi, config_file):
    done = oribi("train", config_file, "--context_parallel", 2)
    assert done.code == 1
    assert "context_parallel = 2: there is one process, and each row is shared by 2. Set gpus: 2" in done.err


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_parts_of_a_row_are_the_row_with_labels_shifted(processes, monkeypatch):
    monkeypatch.setattr(context_attention, "CHUNK_MULTIPLE", 4)
    examples = [{"input_ids": list(range(start, start + n)), "labels": [-100, *range(start + 1, start + n)]} for start, n in ((10, 9), (40, 1), (50, 13))]  # fmt: skip
    row = PackCollator()(examples)
    parts = [RowPart(PackCollator(), processes, rank)(examples) for rank in range(processes)]
    chunk = parts[0]["context_chunk"]
    whole = {}
    for name in ("input_ids", "labels", "shift_labels", "position_ids"):
        found = torch.empty(2 * processes, chunk, dtype=torch.int64)
        for rank, part in enumerate(parts):
            found[list(context_attention.own_chunks(rank, processes))] = part[name].view(2, chunk)
        whole[name] = found.flatten()
    tokens = row["input_ids"].shape[1]
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(whole[name][:tokens], row[name][0]), name
    shifted = torch.cat([row["labels"][0, 1:], torch.full((1,), -100)])
    assert torch.equal(whole["shift_labels"][:tokens], shifted)
    assert (whole["shift_labels"][tokens:] == -100).all()
    assert parts[0]["cu_seq_lens_q"].tolist() == [0, 9, 10, 2 * processes * chunk]
    assert parts[0]["max_length_q"] == 13
