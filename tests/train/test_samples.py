"""Answers while training: the prompts of files and of held-out rows, what is written, and that a training takes no notice."""

import json
from pathlib import Path

import pytest
import torch

import oribi.run
from oribi.config_file import read_run_config
from oribi.errors import ConfigError, DataError
from oribi.models.load import load_model
from oribi.preflight import tokenizer_of
from oribi.train.samples import read_samples, sample_prompts
from tests.train.conftest import some_conversations


@pytest.fixture
def config_of(tiny_folder, tmp_path):
    """A run config with further settings; file names are in the test's folder."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in some_conversations(16)))

    def make(**settings):
        base = {
            "model": tiny_folder, "dataset": rows, "output_dir": tmp_path / "run", "max_steps": 4, "dtype": "float32",
            "max_seq_length": 128, "learning_rate": 0.01, "report": "false", "gradient_accumulation_steps": 1,
            "packing": "false", "sample_tokens": 8, **settings,
        }  # fmt: skip
        flags = [str(word) for name, value in base.items() for word in (f"--{name}", value)]
        return read_run_config(None, flags)[0]

    return make


def written(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter/adapter_model.safetensors")


QUESTION = "What does the red boat carry?"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("asked.txt", f"\ufeff{QUESTION}\n\n  And the lake?  \n", ["", ""]),
        ("asked.jsonl", json.dumps({"prompt": [{"role": "user", "content": QUESTION}]}) + "\n", [""]),
        ("asked.csv", f'question,answer\n"{QUESTION}",Salt\n', ["Salt"]),
        (
            "asked.json",
            json.dumps(
                [
                    {
                        "messages": [
                            {"role": "user", "content": QUESTION},
                            {"role": "assistant", "content": "Salt"},
                        ]
                    }
                ]
            ),
            ["Salt"],
        ),
        (
            "pairs.jsonl",
            json.dumps({"prompt": QUESTION, "chosen": "Salt", "rejected": "Sand"}) + "\n",
            ["Salt"],
        ),
    ],
)
def test_prompts_of_a_file(config_of, tmp_path, name, text, expected):
    config = config_of(sample_prompts=written(tmp_path, name, text))
    tokenizer = tokenizer_of(config)
    found = sample_prompts(config, tokenizer, None)
    assert [prompt.expected for prompt in found] == expected
    assert QUESTION in found[0].text
    if not name.startswith("pairs"):  # plain texts have no turns
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_dict=False
        )
        assert found[0].ids == ids


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("empty.txt", "\n\n", "empty.txt is empty; write one question on each line"),
        (
            "texts.jsonl",
            '{"text": "Once upon a time there was a boat."}\n',
            "texts.jsonl is plain text and holds no prompts",
        ),
        ("broken.jsonl", '{"prompt": \n', "broken.jsonl:1"),
        ("latin.txt", b"caf\xe9\n", "latin.txt is not UTF-8"),
    ],
)
def test_files_without_prompts_are_told_before_the_model_loads(
    config_of, tmp_path, monkeypatch, name, text, says
):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.setattr(oribi.run, "load_model", lambda *a, **k: pytest.fail("it loaded"))
    with pytest.raises(DataError, match=says):
        oribi.run.run(config_of(sample_prompts=path))


def test_held_out_prompts_need_held_out_rows(config_of):
    with pytest.raises(
        ConfigError, match="sample_prompts = 'held_out' .*needs eval_dataset or eval_fraction"
    ):
        config_of(sample_prompts="held_out")


def test_answers_at_each_evaluation_beside_the_base_s(config_of, tmp_path, capsys):
    config = config_of(sample_prompts="held_out", eval_fraction=0.25, eval_steps=2, report="true")
    oribi.run.run(config)
    found = read_samples(tmp_path / "run")
    assert [one.step for one in found] == [0, 2, 4]
    base, _, last = found
    assert len(base.samples) == 4
    assert all(sample.expected and sample.tokens <= 8 for one in found for sample in one.samples)
    assert [sample.said for sample in base.samples] != [sample.said for sample in last.samples]
    # the last answers are those of the trained model, and step 0 is the base
    report = json.loads((tmp_path / "run/report.json").read_text())
    for one, name in ((base, "base"), (last, "tuned")):
        longer = report["measures"][name]["samples"]
        assert all(whole["said"].startswith(short.said) for whole, short in zip(longer, one.samples))
    told = capsys.readouterr().out
    assert "answers at step 4" in told
    for sample in last.samples:  # the question, without what the template wrote around it
        assert f"  prompt:   {sample.turns[-1][1].strip()}\n" in told
    page = (tmp_path / "run/report.html").read_text()
    assert "Answers while training" in page
    assert "step 2" in page or "steps 2 to 4" in page


def test_a_training_takes_the_same_steps_with_and_without(config_of, tmp_path):
    asked = written(tmp_path, "asked.txt", f"{QUESTION}\n")
    found = []
    for name, settings in (("plain", {}), ("asked", {"sample_prompts": asked, "eval_steps": 1})):
        oribi.run.run(config_of(output_dir=tmp_path / name, lora_dropout=0.1, max_steps=3, **settings))
        found.append(weights_of(tmp_path / name))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    assert [one.step for one in read_samples(tmp_path / "asked")] == [0, 1, 2, 3]
    assert not (tmp_path / "plain/samples.jsonl").exists()


def test_a_resumed_run_keeps_the_answers_up_to_its_checkpoint(config_of, tmp_path):
    asked = written(tmp_path, "asked.txt", f"{QUESTION}\n")
    settings = {"sample_prompts": asked, "eval_steps": 1, "save_steps": 2}
    oribi.run.run(config_of(**settings))
    whole = (tmp_path / "run/samples.jsonl").read_text().splitlines()
    with (tmp_path / "run/samples.jsonl").open("a") as file:
        file.write('{"step": 5, "sam')  # killed while it wrote
    import shutil

    shutil.rmtree(tmp_path / "run/checkpoint-4")
    oribi.run.run(config_of(**settings, resume="true"))
    found = read_samples(tmp_path / "run")
    assert [one.step for one in found] == [0, 1, 2, 3, 4]
    again = [
        json.loads(line)["samples"] for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()
    ]
    assert again == [json.loads(line)["samples"] for line in whole]


def test_without_an_evaluation_prompts_are_answered_at_the_end_of_each_epoch(config_of, tmp_path):
    asked = written(tmp_path, "asked.txt", f"{QUESTION}\n")
    oribi.run.run(
        config_of(sample_prompts=asked, max_steps=-1, num_train_epochs=2, per_device_train_batch_size=8)
    )
    assert [one.step for one in read_samples(tmp_path / "run")] == [0, 2, 4]


def test_the_base_of_a_full_fine_tuning_is_answered_before_it_changes(config_of, tmp_path, tiny_folder):
    asked = written(tmp_path, "asked.txt", f"{QUESTION}\n")
    oribi.run.run(
        config_of(sample_prompts=asked, full_finetuning="true", eval_steps=4, save_method="merged_16bit")
    )
    base, tuned = read_samples(tmp_path / "run")
    model, tokenizer = load_model(str(tiny_folder), max_seq_length=128, dtype="float32", load_in_4bit=False)
    from oribi.train.evaluate import answer_prompts

    prompts = sample_prompts(config_of(sample_prompts=asked), tokenizer, None)
    assert base.samples[0].said == answer_prompts(model, tokenizer, prompts, 8)[0].text.strip()
    assert base.samples[0].said != tuned.samples[0].said
