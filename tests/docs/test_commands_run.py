"""Every command line of the documents is executed on a tiny run, or stands in a list with the reason why not here."""

import shlex

import pytest

from tests.docs.test_docs import commands

pytestmark = pytest.mark.slow  # together they take 15 s
# the least that each program's file may say
CONFIGS = {
    "axolotl.yml": "base_model: a/b\nadapter: qlora\nlora_r: 8\nlora_alpha: 16\nlora_target_linear: true\nlearning_rate: 1e-4\ndatasets: [{path: train.jsonl, type: alpaca}]\n",
    "llama3_lora_sft.yaml": "model_name_or_path: a/b\nstage: sft\nfinetuning_type: lora\ndataset: train\ntemplate: llama3\n",
    "sft.yaml": "model_name_or_path: a/b\ndataset_name: c/d\nuse_peft: true\n",
    "dataset_info.json": '{"train": {"file_name": "train.jsonl"}}',
}
# run word for word, or with a local model in place of the hub's, by tests of test_docs.py
WHOLE_PAGES = {"README.md", "getting-started.md"}
ELSEWHERE = {
    **dict.fromkeys(
        ["oribi train config.yaml --gpus all", "oribi train config.yaml --gpus 2 --context_parallel 2"],
        "needs GPUs; tests/cli/test_train_gpus.py starts processes on a CPU",
    ),
    "oribi watch runs": "it serves until it is stopped; tests/watch has its parts",
    "oribi eval runs/dpo": "tests/train/test_stages.py evaluates a run of each stage",
}


def lines() -> list[str]:
    """Command lines of the other pages, once each; what names a verb or a flag in running text is no command line."""
    found = {shlex.join(words) for page, words in commands() if page not in WHOLE_PAGES}
    names = {"oribi inspect data"}
    return sorted(
        line
        for line in found - names
        if line == "oribi doctor"
        or (len(line.split()) > 2 and "..." not in line and not any(map(str.isupper, line.split()[2:])))
    )


def test_every_reason_belongs_to_a_documented_command():
    assert set(ELSEWHERE) <= {shlex.join(words) for _, words in commands()}


@pytest.mark.parametrize("line", [line for line in lines() if line not in ELSEWHERE])
def test_a_documented_command_runs(
    line, oribi, trained_run, config_file, data_file, tiny_folder, tmp_path, monkeypatch
):
    places = {
        "runs/latest": trained_run, "run.yaml": config_file, "train.jsonl": data_file,
        "Qwen/Qwen2.5-0.5B-Instruct": tiny_folder, "/tmp/exports": tmp_path / "exports",
    }  # fmt: skip
    if "convert" not in line:  # which writes it
        places["config.yaml"] = config_file
    words = [str(places.get(word, word)) for word in shlex.split(line)[1:]]
    # four bits change every answer of a random model of 64 dimensions, which its export is refused for
    words = [word.replace("q4_k_m", "f16").replace("merged_4bit", "merged") for word in words]
    if words[0] == "export" and "--output" not in words:
        words += ["--output", str(tmp_path / "exports")]
    if words[0] == "chat" and "--prompt" not in words:
        words += ["--prompt", "the red fox"]
    if words[0] == "train" and not {"--resume", "--overwrite", "--output_dir"} & set(words):
        words += ["--output_dir", str(tmp_path / "run")]
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "where", "chosen": "here", "rejected": "there"}\n')
    for script in ("train.py", "script.py"):
        (tmp_path / script).write_text("from unsloth import FastLanguageModel\n")
    for name, text in CONFIGS.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "train.csv").write_text("question,answer\nwhere,here\nwhen,now\n")
    (tmp_path / "notebook.ipynb").write_text('{"cells": []}')
    monkeypatch.chdir(tmp_path)
    done = oribi(*words)
    assert done.code == 0, done.err[-2000:]
    assert done.out.strip()
