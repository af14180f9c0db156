"""What two processes train and evaluate is what one does, whichever data, model and trainer."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from oribi import FastLanguageModel, trl
from oribi.errors import OribiError
from oribi.lora.attach import attach_lora
from oribi.models import layer_shards
from oribi.models.load import load_model
from oribi.models.load_together import LoadTogether
from oribi.models.unwrap import is_sharded
from oribi.selftest.subject import Subject, write_small_model
from tests.compat.test_trl import PAIRS
from tests.models.tiny_checkpoint import checkpoint
from tests.train.conftest import write_tiny_model
from tests.trust import forks
from tests.trust.runs import losses_of, trainer_in

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="forks with gloo"),
]
RANK = "RANK"
USUAL = {
    "max_steps": 3, "save_strategy": "no", "neftune_noise_alpha": None, "warmup_steps": 0, "optim": "adamw_torch",
    "adam_epsilon": 1e-3, "use_cpu": True, "per_device_eval_batch_size": 2,
}  # fmt: skip
EPOCHS = {"max_steps": -1, "num_train_epochs": 2, "count": 21}
EVALUATES = {"eval_strategy": "steps", "eval_steps": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("small"))


def gpt2(path: Path) -> tuple[Any, Any]:
    """A model outside the family table."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=320, n_embd=64, n_layer=2, n_head=2, n_positions=256, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0, pad_token_id=0
    )  # fmt: skip
    lora = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    return peft.get_peft_model(GPT2LMHeadModel(config), lora), AutoTokenizer.from_pretrained(path)


# settings; of the tests' own: shares (processes of a row), streams, unfused, and evaluates (held-out rows)
CASES: dict[str, dict[str, Any]] = {
    "one row is evaluated": {"evaluates": 1, **EVALUATES},
    "one row is evaluated, shared": {"evaluates": 1, "shares": 2, **EVALUATES},
    "evaluation before training, shared": {"evaluates": 3, "evaluates_first": True, "shares": 2, **EVALUATES},
    "evaluation before training, sharded": {"evaluates": 3, "evaluates_first": True, "fsdp": True, **EVALUATES},
    "a stream of several passes": {"streams": True, "count": 21, "max_steps": 6},
    "a stream, shared": {"streams": True, "count": 37, "max_steps": 6, "shares": 2, "evaluates": 3, **EVALUATES},
    "a model outside the table": {"unfused": True, "evaluates": 5, **EPOCHS, "eval_strategy": "epoch"},
    "rectangles": {"padding_free": False, "evaluates": 5, **EPOCHS, "eval_strategy": "epoch"},
    "grouped by length, shared": {"train_sampling_strategy": "group_by_length", "shares": 2, **EPOCHS},
    "only whole batches": {"dataloader_drop_last": True, **EPOCHS},
    "experts": {"experts": True},
    "experts, sharded": {"experts": True, "fsdp": True},
    "experts, loaded in parts": {"experts": True, "fsdp": True, "in_parts": True},
    "experts in 16 bits, sharded": {"experts": True, "fsdp": True, "load_in_4bit": False},
    "a worker reads": {"dataloader_num_workers": 1, **EPOCHS, "num_train_epochs": 1},
}  # fmt: skip


def with_experts(path: Path, processes: int, in_parts: bool = False, **options: Any) -> tuple[Any, Any]:
    """A model with experts, which two processes may load together, each keeping its part of the layers."""
    together = None
    if in_parts and processes > 1:
        dist.init_process_group("gloo")
        together = LoadTogether(torch.device("cpu"), True)
    options = {"dtype": "float32", "device_map": torch.device("cpu"), "max_seq_length": 192, **options}
    model, tokenizer = load_model(str(path), together=together, **options)
    assert (model.model.shards is not None) == (together is not None)
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return attach_lora(model, r=4, target_parameters=stacks, use_gradient_checkpointing=False), tokenizer


def train(path: Path, folder: Path, processes: int, given: dict[str, Any]) -> None:
    """Writes losses and the trained weights' sums into FOLDER/RANK.json."""
    settings = {**USUAL, **given}
    shares = settings.pop("shares", 1) if processes > 1 else settings.pop("shares", 1) and 1
    unfused, streams = settings.pop("unfused", False), settings.pop("streams", False)
    loaded = gpt2(path) if unfused else None
    if settings.pop("experts", False):
        options = {name: settings.pop(name) for name in ("in_parts", "load_in_4bit") if name in settings}
        loaded = with_experts(folder.parent / "experts", processes, **options)
    first = settings.pop("evaluates_first", False)
    subject = Subject(str(path), "cpu")
    settings["gradient_accumulation_steps"] = 4 * shares // processes
    if shares > 1:
        settings["context_parallel"] = shares
    if streams:
        settings["rows"] = subject.rows(settings["count"], 320).to_iterable_dataset()
        held_out = settings.pop("evaluates", 0)
        settings["held_out"] = subject.rows(held_out, 320).to_iterable_dataset() if held_out else None
    trainer = trainer_in(subject, folder / "run", loaded=loaded, **settings)
    if first:
        trainer.evaluate()
    trainer.train()
    assert is_sharded(trainer.model) == (processes > 1 and given.get("fsdp", False))
    found = {
        "losses": losses_of(trainer),
        "evaluated": [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry],
        "weights": [float(p.double().norm()) for p in trainer.model.parameters() if p.requires_grad],
    }
    (folder / f"{os.environ.get(RANK, '0')}.json").write_text(json.dumps(found))


def found_by(run: Callable[[], None], folder: Path, processes: int) -> list[dict[str, Any]]:
    """What `run` wrote in each process."""
    codes = forks.together(run, folder, processes)
    said = "".join((folder / str(rank) / "err").read_text()[-1500:] for rank in range(processes))
    assert codes == [0] * processes, said
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_find_what_one_does(model, tmp_path, name):
    torch.set_num_threads(1)
    if "experts" in name:
        checkpoint(tmp_path / "experts", "qwen3_moe")
    both: dict[int, list[dict[str, Any]]] = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        both[processes] = found_by(lambda: train(model, folder, processes, CASES[name]), folder, processes)  # noqa: B023
    (one,) = both[1]
    assert one["losses"]
    for found in both[2]:
        for what, values in one.items():
            assert found[what] == pytest.approx(values, rel=1e-5), what


@pytest.mark.parametrize("before", ["trained", "evaluated"])
def test_a_trainer_of_trl_on_a_model_that_oribis_trainer_had_trains_with_all_processes(
    tiny_folder, tmp_path, before
):
    """accelerate takes such a model for one that is wrapped: each process would train alone, without a word."""
    torch.set_num_threads(1)

    def run() -> None:
        model, tokenizer = load_model(str(tiny_folder), dtype="float32", device_map="cpu", max_seq_length=64)
        model = attach_lora(model, r=4, lora_alpha=4)
        rows = Dataset.from_list([{"text": row["prompt"]} for row in PAIRS])
        usual = {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
        }
        args = trl.SFTConfig(**usual, dataset_text_field="text")
        first = trl.SFTTrainer(model, args=args, train_dataset=rows, eval_dataset=rows, tokenizer=tokenizer)
        first.train() if before == "trained" else first.evaluate()
        args = trl.ORPOConfig(**usual, per_device_train_batch_size=2, max_length=64)
        second = trl.ORPOTrainer(
            model, args=args, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer
        )
        second.train()
        weights = [float(p.double().norm()) for p in model.parameters() if p.requires_grad]
        (tmp_path / f"{os.environ[RANK]}.json").write_text(json.dumps({"weights": weights}))

    first, second = found_by(run, tmp_path, 2)
    assert first == second


def test_a_script_whose_processes_all_save_has_each_file_written_once(tiny_folder, tmp_path, monkeypatch):
    """As scripts for one process do under torchrun: they save, load what they saved, and merge."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)

    def run() -> None:
        options = {"max_seq_length": 64, "dtype": torch.float32, "load_in_4bit": True}
        model, tokenizer = FastLanguageModel.from_pretrained(str(tiny_folder), **options)
        model = FastLanguageModel.get_peft_model(model, r=4, lora_alpha=4)
        rows = Dataset.from_list([{"text": row["prompt"]} for row in PAIRS])
        args = trl.SFTConfig(
            output_dir="out", max_steps=1, save_strategy="no", report_to="none", dataset_text_field="text"
        )
        trl.SFTTrainer(model, args=args, train_dataset=rows, tokenizer=tokenizer).train()
        if os.environ[RANK] == "0":
            time.sleep(1)  # the other one comes first, and has to wait
        model.save_pretrained("adapter")
        again, _ = FastLanguageModel.from_pretrained("adapter", **options)
        said = [None, None]
        try:
            model.save_pretrained_merged("no", tokenizer, save_method="merged_4bit", base="missing")
        except OribiError as error:
            said = [type(error).__name__, str(error)]
        report = model.save_pretrained_merged("merged", tokenizer)
        loaded = AutoModelForCausalLM.from_pretrained("merged")
        if os.environ[RANK] == "0":  # as scripts for several processes do
            model.save_pretrained("first")
        found = {
            "weights": [float(p.double().norm()) for p in again.parameters() if p.requires_grad],
            "merged": float(sum(p.double().norm() for p in loaded.parameters())),
            "error": said,
            "verdict": report.verdict,
        }
        Path(f"{os.environ[RANK]}.json").write_text(json.dumps(found))

    first, second = found_by(run, tmp_path, 2)
    (kind, text), (other, told) = first.pop("error"), second.pop("error")
    assert (kind, kind is not None) == (other, True)
    assert told == f"process 0 could not write {tmp_path}/no: {text}"
    assert first == second
    assert (tmp_path / "first" / "adapter_model.safetensors").is_file()
    assert "oribi" not in (tmp_path / "1" / "out").read_text()


def test_a_script_saves_and_predicts_the_same_while_processes_share_the_weights(tmp_path, monkeypatch):
    """Also in the first process alone, and where all of them gather each layer together."""
    torch.set_num_threads(1)
    base = write_tiny_model(tmp_path / "tiny", num_hidden_layers=4)  # more layers than are whole at a time

    def run(settings: dict[str, Any]) -> None:
        monkeypatch.setattr(layer_shards, "peer_memory", lambda size, device, group: None)
        options = {"max_seq_length": 64, "dtype": torch.float32, "load_in_4bit": True}
        model, tokenizer = FastLanguageModel.from_pretrained(str(base), **options)
        model = FastLanguageModel.get_peft_model(model, r=4, lora_alpha=4)
        rows = Dataset.from_list([{"text": row["prompt"]} for row in PAIRS])
        args = trl.SFTConfig(
            output_dir="out", max_steps=2, save_steps=1, report_to="none", dataset_text_field="text", use_cpu=True,
            per_device_train_batch_size=1, **settings,
        )  # fmt: skip
        held_out = rows.select(range(3))
        trainer = trl.SFTTrainer(
            model, args=args, train_dataset=rows, eval_dataset=held_out, tokenizer=tokenizer
        )
        trainer.train()
        assert is_sharded(model) == bool(settings)
        trainer.save_model("final")
        losses = [trainer.evaluate()["eval_loss"], trainer.predict(held_out).metrics["test_loss"]]
        model.save_pretrained_merged("merged", tokenizer)
        if trainer.is_world_process_zero():
            model.save_pretrained_merged("alone", tokenizer, save_method="merged_4bit")
            model.save_pretrained_merged("lora", tokenizer, save_method="lora")
            model.save_pretrained_gguf("model", tokenizer, quantization_method="q8_0")
            model.save_pretrained_gguf("adapter", tokenizer, save_method="lora")
        model.save_pretrained("last")
        args.max_steps = 3
        trainer.train(resume_from_checkpoint=True)
        Path(f"{os.environ[RANK]}.json").write_text(
            json.dumps({"losses": losses, "later": losses_of(trainer)})
        )

    files: dict[str, dict[Path, bytes]] = {}
    for name, settings in (("whole", {}), ("shared", {"fsdp": True})):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.chdir(folder)
        found_by(lambda: run(settings), folder, 2)  # noqa: B023
        written = [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".gguf")]
        files[name] = {path.relative_to(folder): path.read_bytes() for path in written}
        files[name] |= {Path(f"{rank}.json"): (folder / f"{rank}.json").read_bytes() for rank in range(2)}
    assert len(files["whole"]) > 10
    assert files["whole"] == files["shared"]
