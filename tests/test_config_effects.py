"""What every key of a run config does to a real run of a tiny model: the effect is there with the key, and not without."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import PeftModel
from peft.tuners.lora import LoraLayer

import oribi.run
from oribi.config import SETTINGS, RunConfig
from oribi.config_file import read_run_config
from oribi.train.samples import read_samples
from oribi.train.trainer import SFTTrainer
from tests.train.conftest import some_conversations

ROWS = 24
EPOCH = {"max_steps": -1, "gradient_accumulation_steps": 1, "packing": False}  # a step is 2 of 24 rows
STEPS = {"max_steps": 4}
HELD_OUT = {"eval_fraction": 0.25}
SEARCH = STEPS | HELD_OUT | {"eval_steps": 1, "learning_rate": 0.9}
TOGETHER: dict[str, Any] = {"max_steps": 1}  # keys that are seen in one run, in which all of them are set


@dataclass
class Ran:
    """A finished run: its trainer with model and rows, its folder, and its lines of log.jsonl."""

    trainer: SFTTrainer
    folder: Path

    @property
    def model(self) -> Any:
        return self.trainer.model

    @property
    def base(self) -> Any:
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def layers(self) -> dict[str, LoraLayer]:
        return {name: m for name, m in self.model.named_modules() if isinstance(m, LoraLayer)}

    @property
    def layer(self) -> LoraLayer:
        return next(iter(self.layers.values()))

    @property
    def texts(self) -> list[str]:
        tokenizer = self.trainer.processing_class
        return [tokenizer.decode(ids) for ids in self.trainer.train_dataset["input_ids"]]

    def logged(self, name: str) -> list[float]:
        lines = map(json.loads, (self.folder / "log.jsonl").read_text().splitlines())
        return [line[name] for line in lines if name in line]

    def trained_rows(self) -> list[str]:
        rows = next(iter(self.model.peft_config.values())).trainable_token_indices or {}
        return self.trainer.processing_class.convert_ids_to_tokens(rows.get("embed_tokens", []))

    def trained_share(self) -> float:
        labels = [label for row in self.trainer.train_dataset["labels"] for label in row]
        return sum(label != -100 for label in labels) / len(labels)

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("checkpoint-*"))

    def groups(self, name: str) -> set[float]:
        return {group[name] for group in self.trainer.optimizer.param_groups}

    def eval_batch(self) -> int:
        return len(next(iter(self.trainer.get_eval_dataloader()))["cu_seq_lens_q"]) - 1


@dataclass(frozen=True)
class Effect:
    """What is seen of a run with a key set.

    Args:
        value: the key's; a name in capitals stands for a path of `places`.
        seen: read from the finished run.
        expected: what is seen then, and without the key is not; None: anything that differs.
        beside: settings of both runs.
    """

    value: Any
    seen: Callable[[Ran], Any]
    expected: Any = None
    beside: dict[str, Any] | None = None


EFFECTS = {
    "model": Effect("OTHER_MODEL", lambda run: Path(run.base.oribi.name_or_path).name, "other"),
    "max_seq_length": Effect(32, lambda run: max(map(len, run.trainer.train_dataset["input_ids"])) <= 32, True),
    "load_in_4bit": Effect(False, lambda run: type(run.layer.base_layer.weight).__name__, "Parameter"),
    "keep_in_16bit": Effect(
        ["q_proj"], lambda run: type(run.base.model.layers[0].self_attn.q_proj.base_layer.weight).__name__, "Parameter"
    ),
    "train_for": Effect(
        "q8_0", lambda run: getattr(getattr(run.layer.base_layer.weight, "packed", None), "kind", None), "Q8_0"
    ),
    "dtype": Effect("bfloat16", lambda run: run.base.model.norm.weight.dtype, torch.bfloat16),
    "full_finetuning": Effect(True, lambda run: all(p.requires_grad for p in run.model.parameters()), True),
    "lora_r": Effect(7, lambda run: run.layer.lora_A["default"].weight.shape[0], 7),
    "lora_alpha": Effect(8, lambda run: run.layer.scaling["default"], 2.0),
    "lora_dropout": Effect(0.1, lambda run: getattr(run.layer.lora_dropout["default"], "p", 0), 0.1),
    "target_modules": Effect(["q_proj"], lambda run: {n.split(".")[-1] for n in run.layers}, {"q_proj"}),
    "modules_to_save": Effect(
        ["lm_head"], lambda run: any("lm_head" in n for n, p in run.model.named_parameters() if p.requires_grad), True,
    ),
    "use_rslora": Effect(True, lambda run: run.layer.scaling["default"], 8.0),
    "use_dora": Effect(True, lambda run: "default" in run.layer.lora_magnitude_vector, True),
    "rank_pattern": Effect({"q_proj": 2}, lambda run: run.layer.r["default"], 2, TOGETHER),
    "alpha_pattern": Effect(
        {"up_proj": 4}, lambda run: next(m for n, m in run.layers.items() if "up_proj" in n).scaling["default"], 1.0, TOGETHER
    ),
    "layers_to_transform": Effect([1], lambda run: {n.split(".layers.")[1][0] for n in run.layers}, {"1"}, TOGETHER),
    "finetune_last_n_layers": Effect(1, lambda run: {n.split(".layers.")[1][0] for n in run.layers}, {"1"}),
    "exclude_modules": Effect(["o_proj"], lambda run: any("o_proj" in n for n in run.layers), False, TOGETHER),
    # the first step of Adam gives all of a B that began with zeros the same size
    "init_lora_weights": Effect(
        "loftq", lambda run: run.layer.lora_B["default"].weight.abs().std().item() > 1e-3, True, TOGETHER
    ),
    "new_tokens": Effect(["<tool>"], lambda run: "<tool>" in run.trainer.processing_class.get_vocab(), True, TOGETHER),
    "trainable_tokens": Effect(["<|im_start|>"], lambda run: "<|im_start|>" in run.trained_rows(), True, TOGETHER),
    "gradient_checkpointing": Effect("off", lambda run: run.base.is_gradient_checkpointing, False),
    "dataset": Effect(["OTHER_ROWS"], lambda run: len(run.trainer.train_dataset), 5, {"packing": False}),
    "split": Effect("test", lambda run: len(run.trainer.train_dataset), 7, {"dataset": ["SPLITS"], "packing": False}),
    "dataset_text_field": Effect(
        "body", lambda run: "a body of text" in run.texts[0], True, {"dataset": ["BODIES"], "packing": False}
    ),
    "eval_dataset": Effect(["OTHER_ROWS"], lambda run: len(run.trainer.eval_dataset or []), 5),
    "eval_split": Effect("test", lambda run: len(run.trainer.eval_dataset), 7, {"eval_dataset": ["SPLITS"]}),
    "eval_fraction": Effect(0.25, lambda run: len(run.trainer.eval_dataset or []), ROWS // 4),
    "sample_prompts": Effect(
        "held_out", lambda run: [one.step for one in read_samples(run.folder)], [0, 2, 4],
        HELD_OUT | STEPS | {"eval_steps": 2},
    ),
    "sample_tokens": Effect(
        3, lambda run: max(s.tokens for one in read_samples(run.folder) for s in one.samples), 3,
        HELD_OUT | {"sample_prompts": "held_out"},
    ),
    "chat_template": Effect("alpaca", lambda run: "### Instruction:" in run.texts[0], True),
    "train_on_responses_only": Effect(False, lambda run: run.trained_share() > 0.9, True),
    "overlong": Effect(
        "drop", lambda run: len(run.trainer.train_dataset) < ROWS, True, {"max_seq_length": 40, "packing": False}
    ),
    "turns": Effect("split", lambda run: len(run.trainer.train_dataset), 4, {"dataset": ["TALKS"], "packing": False}),
    "columns": Effect(
        {"answer": "other"}, lambda run: "another answer" in run.texts[0], True, {"dataset": ["ANSWERS"], "packing": False}
    ),
    "role_aliases": Effect(
        {"bot": "system"}, lambda run: "system\nan answer" in run.texts[0], True, {"dataset": ["BOTS"], "packing": False}
    ),
    "chat_template_kwargs": Effect(
        {"date_string": "1 Jan 2001"}, lambda run: "1 Jan 2001" in run.texts[0], True,
        {"chat_template": "llama-3.1", "max_seq_length": 1024},
    ),
    "packing": Effect(False, lambda run: len(run.trainer.train_dataset), ROWS),
    "output_dir": Effect(
        "ELSEWHERE", lambda run: (run.folder.name, (run.folder / "adapter").is_dir()), ("elsewhere", True)
    ),
    "num_train_epochs": Effect(2.0, lambda run: len(run.logged("loss")), ROWS, EPOCH),
    "max_steps": Effect(3, lambda run: len(run.logged("loss")), 3, EPOCH),
    "per_device_train_batch_size": Effect(8, lambda run: len(run.logged("loss")), 3, EPOCH),
    "per_device_eval_batch_size": Effect(3, Ran.eval_batch, 3, HELD_OUT),
    "gradient_accumulation_steps": Effect(6, lambda run: len(run.logged("loss")), 2, EPOCH),
    "total_batch_size": Effect(6, lambda run: len(run.logged("loss")), 4, {"max_steps": -1, "packing": False}),
    "learning_rate": Effect(1e-5, lambda run: max(run.logged("learning_rate")), 1e-5),
    "embedding_learning_rate": Effect(
        1e-6, lambda run: run.groups("initial_lr"), {1e-2, 1e-6}, {"modules_to_save": ["lm_head"]}
    ),
    "loraplus_lr_ratio": Effect(8.0, lambda run: run.groups("initial_lr"), {1e-2, 8e-2}, TOGETHER),
    "lr_scheduler_kwargs": Effect(
        {"num_cycles": 2}, lambda run: [round(lr, 6) for lr in run.logged("learning_rate")], [0.01, 0.005, 0.01, 0.005],
        STEPS | {"lr_scheduler_type": "cosine_with_restarts"},
    ),
    "optim_args": Effect(
        {"momentum": 0.5}, lambda run: run.groups("momentum"), {0.5}, {"optim": "sgd"}
    ),
    "adam_beta1": Effect(0.5, lambda run: {g["betas"][0] for g in run.trainer.optimizer.param_groups}, {0.5}, TOGETHER),
    "adam_beta2": Effect(0.9, lambda run: {g["betas"][1] for g in run.trainer.optimizer.param_groups}, {0.9}, TOGETHER),
    "adam_epsilon": Effect(1e-3, lambda run: run.groups("eps"), {1e-3}, TOGETHER),
    "lr_scheduler_type": Effect(
        "cosine", lambda run: [round(lr, 6) for lr in run.logged("learning_rate")], [0.01, 0.008536, 0.005, 0.001464],
        STEPS,
    ),
    "warmup_steps": Effect(2, lambda run: run.logged("learning_rate"), [0.0, 0.005, 0.01, 0.005], STEPS),
    "optim": Effect("adamw_torch", lambda run: type(run.trainer.optimizer.optimizer), torch.optim.AdamW),
    "weight_decay": Effect(0.5, lambda run: 0.5 in run.groups("weight_decay"), True),
    # Adam divides by the gradient's own size, but not by less than its epsilon
    "max_grad_norm": Effect(1e-9, lambda run: run.layer.lora_B["default"].weight.norm().item() < 1e-2, True),
    # the same logits, of which every token's probability counts
    "label_smoothing_factor": Effect(0.2, lambda run: run.logged("loss")),
    "neftune_noise_alpha": Effect(5.0, lambda run: run.logged("loss")),
    "seed": Effect(1, lambda run: run.layer.lora_A["default"].weight.norm().item()),
    "deterministic": Effect(True, lambda run: run.trainer.was_deterministic, True),
    "logging_steps": Effect(2, lambda run: len(run.logged("loss")), 2, STEPS),
    "eval_steps": Effect(1, lambda run: len(run.logged("eval_loss")), 4, {**STEPS, **HELD_OUT}),
    "save_steps": Effect(2, Ran.checkpoints, ["checkpoint-2", "checkpoint-4"], STEPS),
    "save_strategy": Effect(
        "epoch", Ran.checkpoints, ["checkpoint-1", "checkpoint-2"],
        EPOCH | {"num_train_epochs": 2, "per_device_train_batch_size": ROWS},
    ),
    "load_best_model_at_end": Effect(True, lambda run: run.trainer.state.best_global_step, 4, SEARCH),
    # at this rate the second evaluation is worse than the first
    "early_stopping_patience": Effect(1, lambda run: run.trainer.state.global_step, 2, SEARCH),
    "save_total_limit": Effect(1, Ran.checkpoints, ["checkpoint-4"], {**STEPS, "save_steps": 1}),
    # the run without it leaves a checkpoint of its last step, after which nothing is left to do
    "resume": Effect(
        "true", lambda run: run.trainer.steps_done, 0, {"num_train_epochs": 0.25, **EPOCH, "save_steps": 2, "output_dir": "STOPPED"}
    ),
    "report_to": Effect(["tensorboard"], lambda run: bool(list(run.folder.rglob("events.out.*"))), True),
    "save_method": Effect(
        ["merged_16bit"], lambda run: (run.folder / "merged" / "model.safetensors").is_file(), True
    ),
    "quantization_method": Effect(["q8_0"], lambda run: len(list((run.folder / "gguf").glob("*.gguf"))), 1),
    "report": Effect(True, lambda run: (run.folder / "report.html").is_file(), True),
}  # fmt: skip
# these reach nothing on a machine without the hub; what they are passed to is tested in tests/models/test_files.py
# (revision, trust_remote_code) and tests/train/test_trainer.py (dataset_num_proc); without malformed a run with such rows does not
# begin: tests/data/test_rows.py
PASSED_ON = {"revision", "trust_remote_code", "dataset_num_proc", "malformed"}
# these act where there are several processes: tests/cli/test_train_gpus.py, tests/trust/test_processes.py and tests/train/test_context.py
OF_PROCESSES = {"gpus", "fsdp", "context_parallel", "ddp_timeout"}
# parameters that are no layers: tests/lora/test_starts.py
OF_EXPERTS = {"target_parameters"}
# and this one needs a GPU: tests/train/test_fp8.py
ON_A_GPU = {"fp8"}

# and these belong to the stages that are not supervised: tests/train/test_stages.py
OF_STAGES = {"stage"} | {name for name, setting in SETTINGS.items() if "sft" not in setting.used_by}


@pytest.fixture(scope="module")
def places(tiny_folder, tmp_path_factory) -> dict[str, str]:
    """Files that settings name in capitals."""
    folder = tmp_path_factory.mktemp("places")
    rows = some_conversations(ROWS)
    rows.to_json(folder / "rows.jsonl")
    rows.select(range(5)).to_json(folder / "other.jsonl")
    Dataset.from_list([{"messages": row["messages"] * 2} for row in rows.to_list()[:2]]).to_json(
        folder / "talks.jsonl"
    )
    rows.map(lambda row: {"body": "a body of text"}).to_json(folder / "bodies.jsonl")
    question, answer = "a question", "an answer"
    Dataset.from_list([{"question": question, "answer": answer, "other": "another answer"}] * 4).to_json(
        folder / "answers.jsonl"
    )
    said = [("user", question), ("bot", answer), ("user", question), ("assistant", answer)]
    Dataset.from_list([{"messages": [{"role": r, "content": c} for r, c in said]}] * 4).to_json(
        folder / "bots.jsonl"
    )
    DatasetDict({"train": rows, "test": Dataset.from_list(rows.to_list()[:7])}).save_to_disk(
        folder / "splits"
    )
    shutil.copytree(tiny_folder, folder / "other")
    return {
        "MODEL": str(tiny_folder), "OTHER_MODEL": str(folder / "other"), "ROWS": str(folder / "rows.jsonl"),
        "OTHER_ROWS": str(folder / "other.jsonl"), "BODIES": str(folder / "bodies.jsonl"),
        "TALKS": str(folder / "talks.jsonl"), "ANSWERS": str(folder / "answers.jsonl"), "BOTS": str(folder / "bots.jsonl"),
        "SPLITS": str(folder / "splits"), "ELSEWHERE": str(folder / "elsewhere"), "STOPPED": str(folder / "stopped"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def ran(places, tmp_path_factory) -> Callable[..., Ran]:
    """Runs a config of the tiny model for real, once for each set of settings."""
    known: dict[str, Ran] = {}

    class Watched(SFTTrainer):
        """Leaves itself behind, and says how many steps it did and in which state of PyTorch."""

        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            self.steps_done, self.was_deterministic = 0, False
            made.append(self)

        def training_step(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
            self.steps_done += 1
            self.was_deterministic = torch.are_deterministic_algorithms_enabled()
            return super().training_step(*arguments, **keywords)

    made: list[SFTTrainer] = []

    def place(value: Any) -> Any:
        if isinstance(value, dict):
            return value
        return [place(item) for item in value] if isinstance(value, list) else places.get(value, value)

    def run(settings: dict[str, Any]) -> Ran:
        key = repr(sorted(settings.items()))
        if key not in known:
            usual = {
                "model": "MODEL",
                "dataset": ["ROWS"],
                "output_dir": str(tmp_path_factory.mktemp("run")),
                "max_seq_length": 128,
                "dtype": "float32",
                "lora_r": 4,
                "max_steps": 1,
                "warmup_steps": 0,
                "learning_rate": 1e-2,
                "report": False,
            }
            if "total_batch_size" not in settings:  # it follows from that
                usual["gradient_accumulation_steps"] = 1  # fmt: skip
            given = {name: place(value) for name, value in {**usual, **settings}.items()}
            flags = [f"--{name}={json.dumps(value)}" for name, value in given.items()]
            config, _ = read_run_config(None, flags)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(oribi.run, "SFTTrainer", Watched)
                oribi.run.run(config)
            known[key] = Ran(made[-1], Path(config.output_dir))
        return known[key]

    return run


def test_every_key_is_here():
    assert set(EFFECTS) | PASSED_ON | OF_EXPERTS | OF_PROCESSES | ON_A_GPU | OF_STAGES == {
        f.name for f in fields(RunConfig)
    }


# handed on as they are to transformers' arguments or PEFT's config; the others decide what oribi itself does
HANDED_ON = {
    "adam_beta1", "adam_beta2", "adam_epsilon", "alpha_pattern", "early_stopping_patience", "eval_steps", "exclude_modules",
    "finetune_last_n_layers", "label_smoothing_factor", "layers_to_transform", "load_best_model_at_end", "logging_steps", "lora_alpha", "lora_dropout", "lr_scheduler_kwargs",
    "lr_scheduler_type", "max_grad_norm", "max_steps", "num_train_epochs", "optim", "optim_args", "output_dir",
    "per_device_eval_batch_size", "rank_pattern", "report", "report_to", "save_steps", "save_strategy",
    "save_total_limit", "use_dora", "use_rslora", "warmup_steps", "weight_decay",
}  # fmt: skip


@pytest.mark.parametrize(
    "key", [pytest.param(key, marks=pytest.mark.long if key in HANDED_ON else ()) for key in EFFECTS]
)
def test_a_key_has_its_effect(key, ran):
    effect = EFFECTS[key]
    beside = effect.beside or {}
    together = {name: one.value for name, one in EFFECTS.items() if one.beside is TOGETHER is beside}
    without = effect.seen(ran(beside))
    found = effect.seen(ran({**beside, key: effect.value, **together}))
    assert found != without
    if effect.expected is not None:
        assert found == (
            pytest.approx(effect.expected) if isinstance(effect.expected, float) else effect.expected
        )


def test_equal_runs_are_equal(ran):
    """So what differs between two runs is the key's doing."""
    one, two = ran({}), ran({"seed": RunConfig().seed})
    assert one is not two
    for name in ("seed", "neftune_noise_alpha"):
        assert EFFECTS[name].seen(one) == EFFECTS[name].seen(two)
