"""Several processes train TRL's stages on each row once per epoch, as one process does, and evaluate each row once."""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from oribi.config_file import read_run_config
from oribi.environment import detect
from oribi.errors import ConfigError
from oribi.run import _load, _trainer, read_data
from oribi.train.progress import Progress
from oribi.train.rewards import RewardFunction, load_reward_functions
from oribi.train.stages import RunData
from tests.train.test_ranks import found_by
from tests.train.test_stages import said, words

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="forks with gloo"),
]
ROWS, HELD_OUT, LONGEST = 13, 5, 96
SETTINGS = {
    "chat_template": "chatml", "max_seq_length": LONGEST, "dtype": "float32", "lora_r": 4, "learning_rate": 5e-3,
    "warmup_steps": 0, "optim": "adamw_torch", "adam_epsilon": 1e-3, "num_train_epochs": 2, "max_steps": -1,
    "per_device_eval_batch_size": 2, "save_strategy": "no", "report": False, "logging_steps": 1,
}  # fmt: skip
# micro-batches of the processes whose loss compares all of them are parts of one process's
PARTS_OF_ONE = ("kto",)
# figures of a micro-batch that weighs its tokens, or its extremes, differ from those of its parts
OF_ROWS = ("rewards/", "logps/", "loss", "accuracy", "margin", "kl", "mean_reward", "log_odds")


def rows_of(stage: str, count: int) -> list[dict]:
    pairs = [
        {"prompt": said("user", words(i, 2 + i % 5)), "chosen": said("assistant", words(2 * i, 2 + i % 4)),
         "rejected": said("assistant", words(5 * i + 1, 3 + i % 3))}
        for i in range(count)
    ]  # fmt: skip
    if stage == "kto":
        return [
            {"prompt": p["prompt"], "completion": p["chosen" if i % 3 else "rejected"], "label": bool(i % 3)}
            for i, p in enumerate(pairs)
        ]
    return [{"prompt": p["prompt"]} for p in pairs] if stage == "grpo" else pairs


# a reward function that lists which prompts it is asked about
LISTS_PROMPTS = """
import json, os


def asked(prompts, completions, trainer_state, origin):
    with open(os.path.dirname(__file__) + "/asked-" + os.environ.get("RANK", "0"), "a") as file:
        file.write(json.dumps({"epoch": trainer_state.epoch, "prompts": origin}) + "\\n")
    return [-float(len(one[0]["content"])) for one in completions]
"""


class Gradients(TrainerCallback):
    """Keeps the gradients with which each step is taken."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})


def train(model: Path, folder: Path, stage: str, flags: dict[str, object]) -> None:
    """Writes gradients and logs into FOLDER, one file per process."""
    torch.set_num_threads(1)
    files = {}
    for name, count in (("dataset", ROWS), ("eval_dataset", HELD_OUT)):
        files[name] = folder.parent / f"{name}.jsonl"
        if not files[name].exists():
            files[name].write_text("".join(json.dumps(row) + "\n" for row in rows_of(stage, count)))
    given = {"model": model, "stage": stage, "output_dir": folder / "run", **SETTINGS, **files, **flags}
    functions: list[RewardFunction] = []
    if stage == "grpo":
        (folder / "own.py").write_text(LISTS_PROMPTS)
        given |= {"reward_funcs": f"{folder}/own.py:asked", "num_generations": 2, "max_completion_length": 4}
        given |= {"reward_weights": 1}
        functions = load_reward_functions([given["reward_funcs"]])
    config, _ = read_run_config(
        None, [word for name, value in given.items() for word in (f"--{name}", str(value))]
    )
    loaded, tokenizer = _load(config, detect(), resumes=False)
    trainer = _trainer(config, loaded, tokenizer, RunData(*read_data(config, tokenizer), functions))
    trainer.remove_callback(Progress)
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    rank = os.environ.get("RANK", "0")
    torch.save(gradients.steps, folder / f"{rank}.pt")
    (folder / f"{rank}.json").write_text(json.dumps(trainer.state.log_history))


def both(model: Path, tmp_path: Path, stage: str, processes: int, *flags: dict[str, object]) -> None:
    """Compares a training of one process with one of several."""
    runs = []
    for count, given in zip((1, processes), flags):
        folder = tmp_path / str(count)
        folder.mkdir()
        logs = found_by(lambda: train(model, folder, stage, given), folder, count)  # noqa: B023
        runs.append([(torch.load(folder / f"{rank}.pt"), log) for rank, log in enumerate(logs)])
    ((expected, logged),) = runs[0]
    assert len(expected) > 2
    for steps, log in runs[1]:
        assert len(steps) == len(expected)
        for ours, theirs in zip(steps, expected):
            scale = max(float(one.abs().max()) for one in theirs.values())
            for name, gradient in theirs.items():
                assert float((ours[name] - gradient).abs().max()) < 1e-5 * scale, name
        for kind in ("loss", "eval_loss"):
            one, several = ([entry for entry in entries if kind in entry] for entries in (logged, log))
            assert len(one) == len(several) > 1
            for theirs, ours in zip(one, several):
                names = [n for n in theirs if kind == "eval_loss" or any(word in n for word in OF_ROWS)]
                names = [
                    n
                    for n in names
                    if not n.endswith(("runtime", "_per_second", "preparation_time", "num_tokens"))
                ]
                if (
                    kind == "loss" and theirs is not one[0]
                ):  # a smaller micro-batch counts as a whole one in a log
                    names = ["loss"]
                for name in names:
                    assert ours[name] == pytest.approx(theirs[name], rel=2e-5, abs=1e-6), (kind, name)


CASES = [
    ("dpo", 2, {}), ("orpo", 2, {}), ("kto", 2, {}), ("reward", 2, {}), ("dpo", 3, {}), ("kto", 3, {}),
    ("dpo", 2, {"loss_type": '["sft", "aot"]'}),
    ("dpo", 2, {"full_finetuning": True}), ("kto", 2, {"full_finetuning": True}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "processes", "flags"), CASES, ids=[f"{s}-{p}-{'-'.join(f)}" for s, p, f in CASES]
)
def test_several_processes_train_and_evaluate_a_stage_as_one_does(
    tiny_folder, tmp_path, stage, processes, flags
):
    batch, rounds = 2, 2
    one = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": rounds * processes}
    if stage in PARTS_OF_ONE:
        one = {"per_device_train_batch_size": batch * processes, "gradient_accumulation_steps": rounds}
    several = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": rounds}
    both(tiny_folder, tmp_path, stage, processes, one | flags, several | flags)


@pytest.mark.parametrize("processes", [1, 2])
def test_grpo_says_which_prompts_a_pass_leaves_out_and_an_evaluation_repeats(
    tiny_folder, tmp_path, processes
):
    """TRL forms steps of whole groups: of 13 prompts, four at a time, each pass leaves one out."""
    given = {"per_device_train_batch_size": 4 // processes, "gradient_accumulation_steps": 2}
    found_by(lambda: train(tiny_folder, tmp_path, "grpo", given), tmp_path, processes)
    lines = [
        line for rank in range(processes) for line in (tmp_path / f"asked-{rank}").read_text().splitlines()
    ]
    trained, evaluated = Counter(), Counter()
    for one in map(json.loads, lines):
        for prompt in one["prompts"]:
            (evaluated if prompt.startswith("eval") else trained)[int(one["epoch"]), prompt] += 1
    assert Counter(epoch for epoch, _ in trained) == {0: 12, 1: 12}
    assert set(trained.values()) == {2}
    assert Counter(evaluated.values()) == ({2: 10} if processes == 1 else {2: 8, 4: 2})
    said = (tmp_path / "0" / "out").read_text()
    assert "13 prompts are no multiple of the 4 that are answered at once: each pass leaves out 1" in said
    assert (
        "the 10 answers of an evaluation are no multiple of the 4 that 2 processes give at once: 2 answers"
        in said
    ) == (processes == 2)


def test_grpo_with_fewer_prompts_than_it_answers_at_once_is_refused(tiny_folder, tmp_path):
    given = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2}
    with pytest.raises(ConfigError, match="13 prompts, and stage = grpo answers 16 different ones at once"):
        train(tiny_folder, tmp_path, "grpo", given)
