"""Plausible mistakes and the words that answer them, kept as they are in `mistakes.txt`.

ORIBI_WRITE_SNAPSHOTS=1 writes the file anew; read the difference before keeping it.
"""

import os
import re
from pathlib import Path

import pytest

SNAPSHOT = Path(__file__).parent / "mistakes.txt"
# name -> what config.yaml holds beside model and dataset, and the command line after `oribi`
MISTAKES: dict[str, tuple[str, list[str]]] = {
    "a key with a letter missing": ("learning_rte: 1e-4", ["train", "CONFIG", "--check"]),
    "a key of no program": ("colour: blue", ["train", "CONFIG", "--check"]),
    "rank 0": ("lora_r: 0", ["train", "CONFIG", "--check"]),
    "a word for a number": ("lora_r: sixteen", ["train", "CONFIG", "--check"]),
    "half a rank": ("lora_r: 8.5", ["train", "CONFIG", "--check"]),
    "a learning rate above 1": ("learning_rate: 2", ["train", "CONFIG", "--check"]),
    "yes in quotes": ("packing: 'yes'", ["train", "CONFIG", "--check"]),
    "fp8 beside what it cannot be": ("fp8: true\nlora_dropout: 0.1\ndtype: float32", ["train", "CONFIG", "--check"]),
    "an unknown dtype": ("dtype: float8", ["train", "CONFIG", "--check"]),
    "two names of one setting": ("sequence_len: 64\ncutoff_len: 128", ["train", "CONFIG", "--check"]),
    "a key given twice": ("lora_r: 8\nlora_r: 16", ["train", "CONFIG", "--check"]),
    "a nested file": ("lora:\n  r: 8", ["train", "CONFIG", "--check"]),
    "4 bits and every weight": ("full_finetuning: true\nload_in_4bit: true", ["train", "CONFIG", "--check"]),
    "two sources of evaluation": ("eval_dataset: a.jsonl\neval_fraction: 0.1", ["train", "CONFIG", "--check"]),
    "evaluation of nothing": ("eval_steps: 5", ["train", "CONFIG", "--check"]),
    "no steps": ("max_steps: 0", ["train", "CONFIG", "--check"]),
    "an adapter of a whole model": ("full_finetuning: true\nload_in_4bit: false\nsave_method: lora", ["train", "CONFIG", "--check"]),
    "three mistakes at once": ("lora_r: 0\nepochs: 3\nwarmup_steps: -1", ["train", "CONFIG", "--check"]),
    "no YAML": ("lora_r: [8", ["train", "CONFIG", "--check"]),
    "no model and no data": ("", ["train", "--lora_r", "8", "--check"]),
    "a flag without its dashes": ("", ["train", "CONFIG", "lora_r", "8", "--check"]),
    "a config that is not there": ("", ["train", "absent.yaml"]),
    "a model that is not there": ("", ["train", "CONFIG", "--model", "./absent"]),
    "data that is not there": ("", ["train", "CONFIG", "--dataset", "absent.jsonl"]),
    "a layer that is not there": ("target_modules: [q_porj]", ["train", "CONFIG"]),
    "a template that is not there": ("chat_template: lama3", ["train", "CONFIG"]),
    "a run that is not there": ("", ["inspect", "run", "absent"]),
    "a folder that is no run": ("", ["inspect", "run", "MODEL"]),
    "an adapter that is a model": ("", ["inspect", "adapter", "MODEL"]),
    "chat with nothing": ("", ["chat", "./absent", "-p", "hello"]),
    "the base of a model without adapter": ("", ["chat", "MODEL", "--base", "-p", "hello"]),
    "evaluation without rows": ("", ["eval", "MODEL"]),
    "a form that is not there": ("", ["export", "MODEL", "--to", "onnx", "--output", "out"]),
    "a method that is not there": ("", ["export", "MODEL", "--to", "gguf:q9_k", "--output", "out"]),
    "the adapter of a model": ("", ["export", "MODEL", "--to", "adapter", "--output", "out"]),
    "a tokenizer without a name": ("", ["inspect", "data", "rows.jsonl"]),
    "a GPU that is not there": ("", ["estimate", "CONFIG", "--gpu", "H1000"]),
    "a config that needs no conversion": ("", ["convert", "CONFIG"]),
    "a schedule with a letter missing": ("lr_scheduler_type: cosin", ["train", "CONFIG", "--check"]),
    "an optimizer with a letter missing": ("optim: adamw8bit", ["train", "CONFIG", "--check"]),
    "a flag without its value": ("", ["train", "CONFIG", "--learning_rate"]),
    "a flag given twice": ("", ["train", "CONFIG", "--lora_r", "8", "--lora_r", "16"]),
    "a GGUF for a form of saving": ("save_method: gguf", ["train", "CONFIG", "--check"]),
    "data for a config": ("", ["train", "rows.jsonl"]),
    "a folder for a config": ("", ["train", "MODEL"]),
    "a GGUF method with a letter wrong": ("quantization_method: q4_k_n", ["train", "CONFIG", "--check"]),
    "a column that is not there": ("dataset_text_field: bdoy", ["train", "CONFIG"]),
    "columns of no known name": ("", ["inspect", "data", "columns.jsonl", "--model", "MODEL"]),
    "data of preferences": ("", ["inspect", "data", "pairs.jsonl", "--model", "MODEL", "--stage", "sft"]),
    "data of another stage": ("", ["inspect", "data", "rows.jsonl", "--model", "MODEL", "--stage", "dpo"]),
    "a stage with a letter wrong": ("", ["inspect", "data", "pairs.jsonl", "--model", "MODEL", "--stage", "dop"]),
    "an empty file": ("", ["inspect", "data", "empty.jsonl", "--model", "MODEL"]),
    "a line that broke off": ("", ["inspect", "data", "broken.jsonl", "--model", "MODEL"]),
    "a table without rows": ("", ["inspect", "data", "head.csv", "--model", "MODEL"]),
    "chat with data": ("", ["chat", "rows.jsonl"]),
    "a config of data that is not there": ("", ["init", "MODEL", "absent.jsonl"]),
    "a config of another trainer": ("", ["convert", "dpo.yaml"]),
    "a script with a variable": ("", ["convert", "run.sh"]),
    "a config that exists already": ("", ["init", "MODEL", "rows.jsonl", "--output", "CONFIG"]),
    "a tab in the config": ("columns:\n\tquestion: q", ["train", "CONFIG", "--check"]),
    "ranks of a layer that is not there": ("rank_pattern: {q_porj: 8}", ["train", "CONFIG"]),
    "a schedule without its argument": ("lr_scheduler_type: cosine_with_min_lr", ["train", "CONFIG"]),
    "an argument that a schedule has not": ("lr_scheduler_type: polynomial\nlr_scheduler_kwargs: {powr: 2}", ["train", "CONFIG"]),
    "early stopping without evaluation": ("early_stopping_patience: 3", ["train", "CONFIG", "--check"]),
    "OLoRA on 4 bits": ("init_lora_weights: olora", ["train", "CONFIG", "--check"]),
    "two data types": ("bf16: true\nfp16: true", ["train", "CONFIG", "--check"]),
    "a key of a data set with a letter wrong": ("eval_dataset: [{path: rows.jsonl, splt: test}]", ["train", "CONFIG", "--check"]),
    "a token that is not there": ("trainable_tokens: ['<|im_strat|>']", ["train", "CONFIG"]),
    "a key of help with a letter wrong": ("", ["help", "learnign_rate"]),
    "a table with semicolons and one column": ("", ["inspect", "data", "semicolon.csv", "--model", "MODEL", "--stage", "sft"]),
    "a null answer": ("", ["inspect", "data", "null.jsonl", "--model", "MODEL"]),
    "a table in the encoding of Windows": ("", ["init", "MODEL", "excel.csv", "--output", "new.yaml"]),
    "a role of no one": ("", ["inspect", "data", "role.jsonl", "--model", "MODEL"]),
}  # fmt: skip

# what else lies in the folder
FILES = {
    "columns.jsonl": '{"q": "a", "a": "b", "lang": "en"}\n',
    "pairs.jsonl": '{"prompt": "x", "chosen": "a", "rejected": "b"}\n',
    "empty.jsonl": "",
    "broken.jsonl": '{"messages": [{"role": "user", "content": "a"}\n',
    "head.csv": "messages\n",
    "semicolon.csv": "\ufeffquery;reply\na;b\n",
    "excel.csv": b'Question;Answer\r\nWie viel?;"0,10 \x80 je Seite,\r\nbei M\xfcller"\r\n',
    "null.jsonl": '{"question": "a", "answer": null}\n',
    "role.jsonl": '{"messages": [{"role": "user", "content": "a"}, {"role": "narrator", "content": "b"}]}\n',
    "dpo.yaml": "model_name_or_path: a/b\ndataset: d\nstage: dpo\nuse_galore: true\n",
    "run.sh": "trl sft --model_name_or_path $MODEL --dataset_name d\n",
}


def snapshots() -> dict[str, str]:
    """Name -> message, of the file."""
    parts = re.split(r"^## (.+)\n", SNAPSHOT.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {name: text.strip() for name, text in zip(parts[::2], parts[1::2])}


@pytest.fixture
def said(oribi, tiny_folder, tmp_path, monkeypatch):
    """The message that a mistake brings, with this machine's paths left out."""

    def ask(settings: str, words: list[str]) -> str:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "rows.jsonl").write_text(
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
        )
        for name, text in FILES.items():
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        config = tmp_path / "config.yaml"
        config.write_text(f"model: {tiny_folder}\ndataset: rows.jsonl\n{settings}\n")
        places = {"CONFIG": "config.yaml", "MODEL": str(tiny_folder)}
        result = oribi(*(places.get(word, word) for word in words))
        assert result.code == 1, result.err
        assert "Traceback" not in result.err
        kept = [line for line in result.err.splitlines() if not line.startswith(NOISE)]
        return "\n".join(kept).replace(str(tiny_folder), "MODEL").replace(str(tmp_path), "FOLDER").strip()

    return ask


NOISE = ("Writing model", "Preparing", "Failed to load CPU gemm", "oribi: ", "Loading", "[transformers]")


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_answered_in_these_words(name, said):
    message = said(*MISTAKES[name])
    if os.environ.get("ORIBI_WRITE_SNAPSHOTS"):
        known = snapshots() if SNAPSHOT.exists() else {}
        known[name] = message
        text = "".join(f"## {n}\n{known[n]}\n\n" for n in MISTAKES if n in known)
        SNAPSHOT.write_text(text, encoding="utf-8")
    assert message == snapshots()[name]


def test_there_are_as_many_answers_as_mistakes():
    assert len(MISTAKES) >= 60
    assert set(snapshots()) == set(MISTAKES)
