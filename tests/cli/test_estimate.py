"""`oribi estimate` and `oribi init`: without GPU and without weights."""

import json
import shutil

import pytest

from oribi.cli.estimate import _data_size
from oribi.config import RunConfig
from oribi.config_file import read_run_config
from oribi.data.prepare import PreparedData
from oribi.data.report import DataReport
from tests.models.tiny import tiny_config


@pytest.fixture
def bare_config(config_file, tiny_folder, tmp_path):
    """The config with a model that has no weights."""
    bare = tmp_path / "bare"
    shutil.copytree(tiny_folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    path = tmp_path / "config.yaml"
    path.write_text(config_file.read_text().replace(str(tiny_folder), str(bare)))
    return path


def test_a_run_is_estimated_without_weights(oribi, bare_config):
    flags = ["--gpu", "T4", "--gpu", "H100", "--max_steps", -1, "--quantization_method", "q8_0"]
    t4, h100 = oribi("estimate", bare_config, *flags, "--json").records
    assert (t4["gpu"], h100["gpu"]) == ("T4", "H100")
    assert t4["fits"]
    assert t4["peak_bytes"] == sum(t4["parts"].values())
    assert t4["usable_bytes"] < h100["usable_bytes"]
    assert t4["step_seconds"] > h100["step_seconds"]
    assert t4["steps"] >= 1  # counted from the data file
    assert t4["disk"]["gguf q8_0"] < t4["disk"]["model's files"]
    plain = oribi("estimate", bare_config, *flags)
    assert plain.code == 0
    assert "largest per_device_train_batch_size" in plain.out
    assert "T4" in plain.out


def test_a_base_in_the_codes_of_its_file_is_estimated_with_that_file(oribi, bare_config):
    flags = ["--gpu", "T4", "--train_for", "q8_0", "--save_method", "gguf-adapter", "--no-data"]
    (found,) = oribi("estimate", bare_config, *flags, "--json").records
    (plain,) = oribi("estimate", bare_config, "--gpu", "T4", "--no-data", "--json").records
    assert found["parts"]["weights"] > plain["parts"]["weights"]  # 8.5 bits a weight, not NF4's 4.1
    assert 0 < found["disk"]["base as gguf"] < found["disk"]["model's files"]
    assert "on one CPU core" in oribi("estimate", bare_config, *flags).out


def test_files_of_experts_are_estimated(oribi, tmp_path):
    tiny_config("qwen3_moe", mlp_only_layers=[], attention_bias=False).save_pretrained(tmp_path / "m")
    (tmp_path / "c.yaml").write_text(f"model: {tmp_path / 'm'}\ndataset: rows.jsonl\n")
    flags = ["--gpu", "T4", "--train_for", "q8_0", "--save_method", "gguf-adapter", "--no-data", "--json"]
    (found,) = oribi("estimate", tmp_path / "c.yaml", *flags).records
    share = found["disk"]["base as gguf"] / found["disk"]["model's files"]
    assert 0.53 < share < 0.7  # 8.5 of 16 bits


def test_tokens_that_are_cut_off_are_not_subtracted_twice(monkeypatch):
    report = DataReport("rows", tokens=7680, tokens_cut=4875, examples=30)
    monkeypatch.setattr("oribi.preflight.tokenizer_of", lambda _: None)
    monkeypatch.setattr("oribi.run.read_data", lambda *_: (PreparedData(None, report), None))
    settings = RunConfig(model="m", dataset=["."], eval_fraction=0.0)
    assert _data_size(settings) == (7680, 30)


def test_the_adapter_takes_the_disk_that_was_estimated(oribi, config_file, trained_run):
    record = oribi("estimate", config_file, "--gpu", "T4", "--no-data", "--json").records[0]
    written = (trained_run / "adapter" / "adapter_model.safetensors").stat().st_size
    assert record["disk"]["adapter"] == pytest.approx(written, rel=0.1)
    assert record["steps"] == 4


def test_several_gpus_share_the_steps_and_with_fsdp_the_weights(oribi, bare_config):
    flags = ["--gpu", "T4", "--max_steps", -1]
    one = oribi("estimate", bare_config, *flags, "--json").records[0]
    two = oribi("estimate", bare_config, *flags, "--gpus", 2, "--fsdp", "true", "--json").records[0]
    assert (one["gpus"], two["gpus"]) == (1, 2)
    assert two["steps"] == -(-one["steps"] // 2)
    assert two["parts"]["weights"] != one["parts"]["weights"]
    said = oribi("estimate", bare_config, *flags, "--gpus", "0,2").out
    assert "2, each with all weights" in said


def test_gpus_that_share_rows_hold_longer_ones_and_take_as_many_steps(oribi, bare_config):
    flags = ["--gpu", "T4", "--max_steps", -1, "--max_seq_length", 4096]
    one = oribi("estimate", bare_config, *flags, "--json").records[0]
    two = oribi("estimate", bare_config, *flags, "--gpus", 2, "--context_parallel", 2, "--json").records[0]
    assert two["steps"] == one["steps"]
    assert two["parts"]["weights"] == one["parts"]["weights"]
    assert (
        two["parts"]["activations"] + two["parts"]["temporary"]
        < one["parts"]["activations"] + one["parts"]["temporary"]
    )
    assert two["largest_batch"] > 1.5 * one["largest_batch"]
    refused = oribi("estimate", bare_config, *flags, "--gpus", 3, "--context_parallel", 2)
    assert "there are 3 processes, and each row is shared by 2. Set gpus: 4" in refused.err


def test_init_writes_the_gpus_and_keeps_the_effective_batch(oribi, bare_config, tmp_path):
    model = read_run_config(bare_config, [])[0].model
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    path = tmp_path / "two.yaml"
    done = oribi("init", model, rows, "--output", path, "--gpu", "T4", "--gpus", 2)
    assert done.code == 0, done.err
    config = read_run_config(path, [])[0]
    assert (config.gpus, config.fsdp) == ("2", False)
    assert config.total_batch_size == 8
    size = config.per_device_train_batch_size
    assert [config.shared_by(n).gradient_accumulation_steps for n in (1, 2)] == [8 // size, 4 // size]
    assert "\ngradient_accumulation_steps" not in path.read_text()
    done = oribi("init", model, rows, "--output", path, "--gpu", "T4", "--gpus", 3, "--force")
    assert read_run_config(path, [])[0].total_batch_size % 3 == 0, done.err


def test_an_unknown_gpu_is_named(oribi, bare_config):
    result = oribi("estimate", bare_config, "--gpu", "H1000")
    assert result.code == 1
    assert "H1000" in result.err


def test_init_writes_a_config_that_reads_back(oribi, tiny_folder, data_file, tmp_path):
    path = tmp_path / "new.yaml"
    result = oribi("init", tiny_folder, data_file, "--output", path, "--gpu", "T4", "--max-seq-length", 64)
    assert result.code == 0, result.err
    config, notes = read_run_config(path)
    assert notes == []
    assert (config.model, config.dataset, config.max_seq_length) == (str(tiny_folder), [str(data_file)], 64)
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 8
    text = path.read_text()
    assert "# Peak learning rate" in text
    assert "learning_rate: 0.0002" in text
    again = oribi("init", tiny_folder, data_file, "--output", path)
    assert again.code == 1
    assert "--force" in again.err
    assert oribi("init", tiny_folder, data_file, "--output", path, "--force").code == 0


@pytest.mark.parametrize(
    ("row", "stage", "written"),
    [
        ({"prompt": "x", "chosen": "a", "rejected": "b"}, "dpo", {"learning_rate": 1e-5, "packing": False}),
        ({"prompt": "x", "completion": "a", "label": True}, "kto", {"per_device_train_batch_size": 4}),
        ({"prompt": "x", "unit_tests": [1]}, "grpo", {"reward_funcs": ["rewards.py:score"]}),
    ],
)
@pytest.mark.parametrize("gpu", [None, "T4"])
def test_init_sees_which_stage_rows_are_made_for(gpu, row, stage, written, oribi, tiny_folder, tmp_path):
    data, path = tmp_path / "rows.jsonl", tmp_path / "config.yaml"
    data.write_text(json.dumps(row) + "\n")
    named = ["--gpu", gpu, "--max-seq-length", 64] if gpu else []
    result = oribi("init", tiny_folder, data, "--output", path, *named)
    assert f"the rows are made for stage {stage}" in result.err
    config, _ = read_run_config(path)
    assert config.stage == stage
    if not gpu:
        assert {name: getattr(config, name) for name in written} == written
    assert "train_on_responses_only" not in path.read_text()


def test_init_gives_a_model_without_template_one(oribi, tiny_folder, data_file, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_folder, bare)
    for name in ("chat_template.jinja",):
        (bare / name).unlink(missing_ok=True)
    result = oribi("init", bare, data_file, "--output", tmp_path / "c.yaml", "--json")
    config, _ = read_run_config(tmp_path / "c.yaml")
    # a tokenizer with ChatML's tokens gets the template by the loader's repair already
    assert config.chat_template in (None, "chatml")
    assert result.records[0]["values"]["model"] == str(bare)


def test_estimate_counts_what_stays_in_16_bits(oribi, tmp_path):
    from transformers import AutoConfig

    config = AutoConfig.for_model("olmoe", num_hidden_layers=48, vocab_size=151936, hidden_size=2048, num_experts=128,
                                  intermediate_size=768, num_attention_heads=32, num_key_value_heads=4)  # fmt: skip
    config.architectures = ["OlmoeForCausalLM"]
    config.save_pretrained(tmp_path / "m")
    (tmp_path / "c.yaml").write_text(f"model: {tmp_path / 'm'}\ndataset: rows.jsonl\n")
    done = oribi("estimate", tmp_path / "c.yaml", "--gpu", "A100-40GB", "--gpu", "H200", "--json")
    assert done.code == 0
    small, large = done.records
    # 48 layers x 128 experts x 3 matrices of 2048 x 768, two bytes each
    assert small["parts"]["experts"] == 48 * 128 * 3 * 2048 * 768 * 2
    assert (small["weights_fit"], large["weights_fit"]) == (False, True)
    assert "stay in 16 bits, above all model.layers.*.mlp.experts" in done.err
