"""Every example runs as it stands, on a tiny model, and so does the benchmark of the ops."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
LEFT = {
    "chat": "adapter/adapter_model.safetensors",
    "completion": "adapter/adapter_model.safetensors",
    "continued_pretraining": "merged/model.safetensors",
    "tool_calling": "adapter/adapter_model.safetensors",
    "reasoning": "gguf/*.gguf",
    "dpo": "adapter/adapter_model.safetensors",
}


class LogProbabilities:
    """TRL's DPOTrainer takes them from a Triton kernel of its own and has no other way: here is one for the CPU."""

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs):
        z = torch.nn.functional.linear(hidden.float(), weight.float(), bias) * logit_scale / temperature
        log_probs = z.log_softmax(-1)
        chosen = log_probs.gather(1, targets[:, None])[:, 0]
        extra = {
            "entropy": -(log_probs.exp() * log_probs).sum(-1),
            "log_sum_sq_probs": (2 * log_probs).logsumexp(-1),
            "mean_logits": z.mean(-1),
            "is_top1": z.argmax(-1) == targets,
        }
        return chosen, *(value if name in outputs else None for name, value in extra.items())


pytestmark = pytest.mark.slow


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    surroundings = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, env=surroundings)


def test_every_example_is_known_here():
    assert set(SCRIPTS) == set(LEFT)


def words(model: Path, output: Path) -> list[str]:
    return ["--model", str(model), "--output", str(output), "--max_steps", "2"]


def left(name: str, folder: Path) -> None:
    assert list(folder.glob(LEFT[name])), sorted(path.name for path in folder.rglob("*"))


@pytest.mark.long
def test_an_example_runs_in_a_process_of_its_own(tiny_folder, tmp_path):
    done = run(sys.executable, "examples/chat.py", *words(tiny_folder, tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    left("chat", tmp_path)


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "chat"])
def test_an_example_runs(name, tiny_folder, tmp_path, monkeypatch):
    if name == "dpo" and not torch.cuda.is_available():
        import trl.trainer.utils

        monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", LogProbabilities)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words(tiny_folder, tmp_path)])
    runpy.run_path(f"examples/{name}.py", run_name="__main__")
    left(name, tmp_path)


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param(path.stem, marks=() if path.stem in ("dpo", "grpo") else pytest.mark.long)
        for path in sorted((ROOT / "examples" / "stages").glob("*.yaml"))
    ],
)
def test_the_run_file_of_a_stage_runs(stage, oribi, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    less = ["--max_steps", "2", "--dtype", "float32"]
    less += ["--max_completion_length", "8"] if stage == "grpo" else []
    done = oribi(
        "train",
        f"examples/stages/{stage}.yaml",
        "--model",
        tiny_folder,
        "--output_dir",
        tmp_path / "run",
        *less,
    )
    assert done.code == 0, done.err[-3000:]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.long  # tests/cli/test_train_gpus.py and tests/trust/test_processes.py start several in every run
def test_two_processes_train_one_model(tiny_folder, tmp_path):
    done = run(
        "examples/two_gpus.sh", str(tiny_folder), "examples/data/chat.jsonl", str(tmp_path / "run"), "--max_steps", "2",
        "--max_seq_length", "128", PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}", CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert sum('"loss"' in line for line in log) == 2
    assert done.stderr.count("step 2/2") == 1  # the two know of each other, and one of them speaks
    assert done.stdout.count("report.html") == 1


def test_the_benchmark_of_the_ops_runs(monkeypatch, capsys):
    words = ["ops.py", "--model", "tiny", "--tokens", "64", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(ROOT / "benchmarks" / "ops.py"), run_name="__main__")
    assert capsys.readouterr().out.count("| oribi") > 20
