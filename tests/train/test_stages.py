"""Stages other than supervised fine-tuning from the run file: TRL trains, and everything else is as in every run of oribi."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from oribi.config import SETTINGS, STAGES
from oribi.config_file import read_run_config
from oribi.errors import ConfigError, TrainingError
from oribi.run import load_run, run, state_of
from oribi.run_record import checkpoints
from oribi.train.stages import RunData, stage_arguments
from tests.train.conftest import WORDS

ROWS = 16
REWARDS = """
def short(completions, **kwargs):
    return [-len(c[0]["content"]) / 10 for c in completions]


def has_answer(completions, answer):
    return [float(a.split()[0] in c[0]["content"]) for c, a in zip(completions, answer)]
"""
# what each stage logs of its own
LOGGED = {
    "dpo": [
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "eval_rewards/margins",
    ],
    "orpo": ["rewards/margins", "rewards/accuracies", "log_odds_ratio", "nll_loss"],
    "kto": ["rewards/chosen", "rewards/rejected", "rewards/margins", "kl"],
    "reward": ["accuracy", "margin", "mean_reward", "eval_accuracy"],
    "grpo": ["reward", "rewards/short/mean", "rewards/has_answer/mean", "completions/mean_length", "kl"],
}
STARTS = [*LOGGED]


def others_long(*kept: str) -> list:
    """The stages, of which all but some are long."""
    return [pytest.param(stage, marks=() if stage in kept else pytest.mark.long) for stage in STARTS]


def words(start: int, count: int) -> str:
    return " ".join(WORDS[(start + 3 * i) % len(WORDS)] for i in range(count))


def said(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


def rows_of(stage: str) -> list[dict]:
    pairs = [
        {"prompt": said("user", words(i, 3 + i % 3)), "chosen": said("assistant", words(2 * i, 4)),
         "rejected": said("assistant", words(5 * i + 1, 5))}
        for i in range(ROWS)
    ]  # fmt: skip
    if stage == "kto":
        return [
            {"prompt": p["prompt"], "completion": p["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
            for i, p in enumerate(pairs)
        ]
    if stage == "grpo":
        return [{"prompt": p["prompt"], "answer": p["chosen"][0]["content"]} for p in pairs]
    return pairs


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory) -> Path:
    """Run files of every stage, with their data."""
    folder = tmp_path_factory.mktemp("stages")
    (folder / "rewards.py").write_text(REWARDS)
    for stage in STAGES[1:]:
        (folder / f"{stage}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(stage)))
        answers = "reward_funcs: [rewards.py:short, rewards.py:has_answer]\nreward_weights: [1, 0.5]\nnum_generations: 2\n"
        answers += "max_completion_length: 6\nbeta: 0.05\n"
        (folder / f"{stage}.yaml").write_text(
            f"stage: {stage}\nmodel: {tiny_folder}\ndataset: {folder / stage}.jsonl\nmax_seq_length: 64\ndtype: float32\n"
            f"lora_r: 4\nlearning_rate: 5e-3\nwarmup_steps: 0\nmax_steps: 4\nper_device_train_batch_size: 2\n"
            f"gradient_accumulation_steps: 2\nsave_steps: 2\noutput_dir: {folder / stage}\n"
            + (answers if stage == "grpo" else "")
        )
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    """Trains the run file of a stage, once for all tests."""
    done: dict[tuple, Path] = {}

    def train(stage: str, *flags: str, name: str | None = None) -> Path:
        key = (stage, flags, name)
        if key not in done:
            output = folder / (name or f"{stage}-{len(done)}")
            config, _ = read_run_config(folder / f"{stage}.yaml", [*flags, "--output_dir", str(output)])
            run(config)
            done[key] = output
        return done[key]

    return train


def logged(output: Path, name: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if line.get(name) is not None]


HELD_OUT = ("--eval_fraction", "0.25", "--per_device_eval_batch_size", "4")


@pytest.mark.parametrize("stage", STARTS)
def test_a_stage_goes_from_its_run_file_to_report_and_export(stage, trained):
    output = trained(stage, *HELD_OUT)
    assert len(logged(output)) == 4
    for name in LOGGED[stage]:
        assert logged(output, name), f"{name} is not logged"
    weights = load_file(output / "adapter" / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert all(tensor.any() for name, tensor in weights.items() if "lora_B" in name), (
        "a layer was not trained"
    )
    assert not list(output.rglob("ref")), "the reference's adapter is in a file"
    report = json.loads((output / "report.json").read_text())
    assert set(report["measures"]) == {"base", "tuned"}
    assert (len(report["measures"]["tuned"]["samples"]) > 1) == (stage != "reward")
    page = (output / "report.html").read_text()
    assert page.count("<svg") >= 4
    assert (output / "rewards.png").is_file()
    if stage == "grpo":
        assert "short -" in page  # each answer with what it earned
        assert report["measures"]["tuned"]["samples"][0]["rewards"].keys() == {"short", "has_answer"}
    else:
        assert 0 <= report["measures"]["tuned"]["scores"]["accuracy"] <= 1
    assert state_of(output).finished


@pytest.mark.parametrize("stage", others_long("dpo", "grpo"))
def test_a_run_that_was_killed_and_resumed_equals_one_that_was_not(stage, trained, folder, tmp_path):
    whole = trained(stage)
    stopped = Path(shutil.copytree(whole, tmp_path / "stopped"))
    # as after a kill behind step 2: nothing of what came later
    shutil.rmtree(stopped / "checkpoint-4")
    shutil.rmtree(stopped / "adapter")
    shutil.copy(stopped / "checkpoint-2" / "oribi_run.json", stopped / "oribi_run.json")
    config, _ = read_run_config(folder / f"{stage}.yaml", ["--output_dir", str(stopped), "--resume"])
    run(config)
    assert logged(stopped) == logged(whole)
    assert logged(stopped, "grad_norm") == logged(whole, "grad_norm")
    ours, theirs = (load_file(one / "adapter" / "adapter_model.safetensors") for one in (stopped, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [one.step for one in checkpoints(stopped)] == [2, 4]


def test_the_reference_is_the_model_without_its_adapter(folder, tmp_path):
    from oribi.environment import detect
    from oribi.run import _load, _trainer, read_data

    config, _ = read_run_config(folder / "dpo.yaml", ["--output_dir", str(tmp_path)])
    model, tokenizer = _load(config, detect(), resumes=False)
    trainer = _trainer(config, model, tokenizer, RunData(*read_data(config, tokenizer)))
    assert list(model.peft_config) == ["default"]
    assert trainer.ref_model is None
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    trainer.train()
    assert logged(tmp_path)[0] == pytest.approx(
        0.6931, abs=1e-4
    )  # log 2: model and reference are equal at first


def test_a_trained_adapter_is_its_own_reference(trained, folder, tmp_path):
    before = trained("dpo")
    config, _ = read_run_config(
        folder / "dpo.yaml", ["--model", str(before), "--output_dir", str(tmp_path), "--max_steps", "1"]
    )
    run(config)
    assert logged(tmp_path)[0] == pytest.approx(0.6931, abs=1e-4)
    assert not list(tmp_path.rglob("ref"))


# setting -> another value than its default; what it is beside
OTHER = {
    "beta": 0.3, "loss_type": {"dpo": "ipo", "kto": "apo_zero_unpaired", "grpo": "dr_grpo"}, "loss_weights": 0.7,
    "label_smoothing": 0.2, "desirable_weight": 1.5, "undesirable_weight": 1.5, "center_rewards_coefficient": 0.01,
    "reward_weights": 0.5, "num_generations": 4, "max_completion_length": 17, "temperature": 0.7, "top_p": 0.9, "top_k": 5,
    "min_p": 0.1, "epsilon": 0.3, "scale_rewards": "batch", "mask_truncated_completions": True, "learning_rate": 3e-4,
    "per_device_train_batch_size": 16, "gradient_accumulation_steps": 8,
}  # fmt: skip
# these reach the data, and the trainer as functions
ELSEWHERE = {"max_prompt_length", "reward_funcs", "packing"}


def arguments_of(stage: str, *flags: str) -> dict:
    needed = ["--reward_funcs", "m:f"] if stage == "grpo" else []
    config, _ = read_run_config(
        None, ["--model", "m", "--dataset", "d", "--stage", stage, "--output_dir", "o", *needed, *flags]
    )
    return {
        name: value for name, value in vars(stage_arguments(config, False)).items() if not callable(value)
    }


def test_every_setting_of_a_stage_is_here():
    of_stages = {name for name, setting in SETTINGS.items() if setting.stages}
    assert of_stages == set(OTHER) | ELSEWHERE


@pytest.mark.parametrize(
    ("stage", "name"),
    [(stage, name) for name in OTHER for stage in STAGES[1:] if stage in SETTINGS[name].stages],
)
def test_a_setting_of_a_stage_reaches_its_trainer(stage, name):
    value = OTHER[name][stage] if isinstance(OTHER[name], dict) else OTHER[name]
    before, after = arguments_of(stage), arguments_of(stage, f"--{name}", json.dumps(value))
    found = after[name]
    assert (found[0] if isinstance(found, list) else found) == value
    assert before[name] != found


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", [n for n, setting in SETTINGS.items() if len(setting.used_by) < len(STAGES)])
def test_a_stage_refuses_what_it_does_not_use(stage, name):
    if stage in SETTINGS[name].used_by:
        return
    values = {"packing": "true", "train_on_responses_only": "false", "turns": "split", "fp8": "true", "reward_funcs": "m:f",
              "max_prompt_length": "9", "neftune_noise_alpha": "5.0", "fsdp": "true", "sample_tokens": "9",
              "context_parallel": "2", "label_smoothing_factor": "0.1"}  # fmt: skip
    value = values.get(name, OTHER.get(name))
    value = next(iter(value.values())) if isinstance(value, dict) else value
    needed = ["--reward_funcs", "m:f"] if stage == "grpo" else []
    with pytest.raises(ConfigError, match=f"{name} = .*stage = {stage} does not use it"):
        read_run_config(
            None, ["--model", "m", "--dataset", "d", "--stage", stage, *needed, f"--{name}", str(value)]
        )


@pytest.mark.parametrize("stage", STAGES[1:])
def test_the_table_gives_each_stage_its_defaults(stage):
    needed = ["--reward_funcs", "m:f"] if stage == "grpo" else []
    config, _ = read_run_config(None, ["--model", "m", "--dataset", "d", "--stage", stage, *needed])
    assert config.learning_rate == SETTINGS["learning_rate"].stages[stage] < 2e-4
    assert config.packing is False
    assert (config.beta is None) == (stage == "reward")
    assert read_run_config(None, ["--model", "m", "--dataset", "d"])[0].beta is None


def test_settings_that_cannot_be_together_are_told_at_once():
    with pytest.raises(ConfigError) as raised:
        read_run_config(
            None,
            [
                "--model",
                "m",
                "--dataset",
                "d",
                "--stage",
                "grpo",
                "--num_generations",
                "3",
                "--loss_type",
                "dappo",
            ],
        )
    for told in ("reward_funcs", "num_generations", "whole groups", "did you mean dapo"):
        assert told in str(raised.value)


@pytest.mark.parametrize("stage", ["dpo", "kto", "grpo"])
def test_a_pair_on_the_head_that_would_not_train_is_refused_before_anything_loads(stage):
    needed = ["--reward_funcs", "m:f"] if stage == "grpo" else []
    flags = ["--model", "m", "--dataset", "d", "--stage", stage, *needed]
    with pytest.raises(ConfigError, match="past a LoRA pair.*modules_to_save"):
        read_run_config(None, [*flags, "--target_modules", "[q_proj, lm_head]"])
    read_run_config(None, [*flags, "--modules_to_save", "lm_head"])


def test_a_reward_function_that_fails_names_file_and_line_of_the_row(folder, tmp_path):
    rows = rows_of("grpo")
    rows[5]["answer"] = None
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.py").write_text(
        "def first(completions, answer, origin):\n"
        "    assert all(one.startswith('asked.jsonl:') for one in origin)\n"
        "    return [float(len(one.split())) for one in answer]\n"
    )
    flags = ["--dataset", str(tmp_path / "asked.jsonl"), "--reward_funcs", f"{tmp_path / 'own.py'}:first"]
    flags += [
        "--reward_weights",
        "1",
        "--output_dir",
        str(tmp_path / "out"),
        "--max_steps",
        "16",
        "--report",
        "false",
    ]
    config, _ = read_run_config(folder / "grpo.yaml", flags)
    with pytest.raises(
        TrainingError, match=r"own.py:first failed in line 3: .* It fails on asked.jsonl:6, prompt"
    ):
        run(config)


@pytest.mark.parametrize("release", [None, "1.14.2", "1.17.0"])
def test_without_its_trl_a_stage_ends_before_the_model_loads(release, folder, monkeypatch):
    import oribi.train.stages as stages
    from oribi.environment import detect

    def version(name: str) -> str:
        if release is None:
            raise stages.PackageNotFoundError
        return release

    monkeypatch.setattr(stages, "version", version)
    with pytest.raises(ConfigError, match=r"pip install 'trl>=1.15,<1.17'"):
        stages.require_trl("dpo", detect())
    stages.require_trl("sft", detect())


def test_what_a_run_depends_on_may_not_change_when_it_is_resumed(trained, folder, tmp_path):
    stopped = Path(shutil.copytree(trained("dpo"), tmp_path / "stopped"))
    config, _ = read_run_config(
        folder / "dpo.yaml", ["--output_dir", str(stopped), "--resume", "--beta", "0.5", "--max_steps", "6"]
    )
    with pytest.raises(ConfigError, match="beta: 0.1 in the run, 0.5 now"):
        run(config)
    config, _ = read_run_config(
        folder / "orpo.yaml", ["--output_dir", str(stopped), "--resume", "--max_steps", "6"]
    )
    with pytest.raises(ConfigError, match="stage: dpo in the run, orpo now"):
        run(config)


def test_other_rows_are_refused_when_a_run_is_resumed(trained, folder, tmp_path):
    stopped = Path(shutil.copytree(trained("dpo"), tmp_path / "stopped"))
    rows = rows_of("dpo")
    rows[3]["rejected"] = said("assistant", "the old lake")
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config, _ = read_run_config(
        folder / "dpo.yaml",
        [
            "--output_dir",
            str(stopped),
            "--resume",
            "--max_steps",
            "6",
            "--dataset",
            str(tmp_path / "other.jsonl"),
        ],
    )
    with pytest.raises(ConfigError, match=r"first difference is in row 4 .*other.jsonl:4"):
        run(config)


def test_a_whole_model_trains_on_preferences_without_a_second_one(folder, tmp_path):
    config, _ = read_run_config(
        folder / "dpo.yaml",
        [
            "--output_dir",
            str(tmp_path),
            "--full_finetuning",
            "--max_steps",
            "2",
            "--learning_rate",
            "1e-3",
            "--report",
            "false",
        ],
    )
    run(config)
    assert logged(tmp_path)[0] == pytest.approx(0.6931, abs=1e-4)
    assert logged(tmp_path, "rewards/margins")[1] != 0
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_a_gradient_that_is_not_finite_ends_the_run(folder, tmp_path):
    from oribi.errors import TrainingError

    config, _ = read_run_config(
        folder / "dpo.yaml", ["--output_dir", str(tmp_path), "--learning_rate", "0.9", "--beta", "1e30"]
    )
    with pytest.raises(TrainingError, match="step .*The loss compares rows"):
        run(config)


@pytest.mark.parametrize("stage", others_long("kto"))
def test_eval_says_what_a_stage_is_about(stage, trained, oribi):
    done = oribi("eval", trained(stage, *HELD_OUT), "--samples", "1", "--max-new-tokens", "4", "--json")
    assert done.code == 0, done.err
    first = done.records[0]
    assert first["stage"] == stage
    if stage == "grpo":
        assert [one["model"] for one in done.records[:2]] == ["base", "tuned"]
        assert first["rewards"]["short"] < 0
    else:
        report = json.loads((trained(stage, *HELD_OUT) / "report.json").read_text())
        assert first["accuracy"] == report["measures"]["tuned"]["scores"]["accuracy"]
        assert first["margin"] == pytest.approx(report["measures"]["tuned"]["scores"]["margin"], abs=1e-4)


def test_a_reward_model_does_not_chat(trained, oribi):
    done = oribi("chat", trained("reward", *HELD_OUT), "-p", "hello")
    assert done.code == 1
    assert "scores texts and writes none" in done.err


def test_a_run_of_a_stage_is_exported_as_any_run(trained, oribi, tmp_path):
    done = oribi("export", trained("dpo", *HELD_OUT), "--to", "merged", "--output", tmp_path)
    assert done.code == 0, done.err
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_a_run_of_a_stage_is_loaded_as_any_run(trained):
    loaded = load_run(trained("dpo", *HELD_OUT))
    assert loaded.has_adapter
    assert loaded.config.stage == "dpo"


def test_a_reward_run_is_exported_merged_and_refused_where_nothing_reads_scores(
    trained, folder, oribi, tmp_path
):
    output = trained("reward", *HELD_OUT)
    done = oribi("export", output, "--to", "merged,adapter", "--output", tmp_path)
    assert done.code == 0, done.err
    assert "scores read back: scores of" in done.err
    assert "scores in plain PEFT" in done.err
    for form in ("gguf:q8_0", "gguf-adapter", "merged_4bit"):
        refused = oribi("export", output, "--to", form, "--output", tmp_path / "other")
        assert refused.code == 1
        assert "a sequence classifier is" in refused.err
    merged = str(tmp_path / "merged")
    estimated = oribi("estimate", "--stage", "reward", "--model", merged, "--dataset", "d", "--gpu", "T4")
    assert estimated.code == 0, estimated.err
    config, _ = read_run_config(
        folder / "dpo.yaml", ["--model", merged, "--output_dir", str(tmp_path / "dpo")]
    )
    with pytest.raises(
        ConfigError, match="it scores labels, and stage = dpo trains models that continue texts"
    ):
        run(config)
