"""Settings files of every encoding and shape are read or refused, soon, with file and line."""

import random
import time
import tracemalloc
from dataclasses import fields
from pathlib import Path

import pytest

from oribi.config import ALIASES, RunConfig, json_schema
from oribi.config_file import as_yaml, read_run_config
from oribi.dialects import convert_file
from oribi.errors import ConfigError

NEEDED = "model: m\ndataset: d\n"
BOMB = "\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x]", *(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)
)])  # fmt: skip


@pytest.fixture
def read(tmp_path):
    """Reads a config from bytes or text behind the settings that every run needs."""

    def read_bytes(content: str | bytes, needed: str = NEEDED) -> RunConfig:
        path = tmp_path / "run.yaml"
        path.write_bytes(content if isinstance(content, bytes) else (needed + content).encode())
        return read_run_config(path)[0]

    return read_bytes


def refusal(read, content: str | bytes, needed: str = NEEDED) -> str:
    with pytest.raises(ConfigError) as error:
        read(content, needed)
    return " ".join(str(error.value).split())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (BOMB, "run.yaml:8: no valid YAML: its aliases stand for more than 100,000 values"),
        (BOMB.replace("[", "{k: ", 1).replace("]", "}", 1), "no valid YAML"),
        ("lora_r: " + "[" * 100_000, "run.yaml:3: no valid YAML: values lie more than 40 deep"),
        ("- " * 5000, "no valid YAML"),
        ("lora_r: &r [*r]", "run.yaml:3: no valid YAML: an alias stands for what it is a part of"),
        ("model: !!python/object/apply:os.getpid []", "could not determine a constructor"),
        ("lora_r: !!timestamp soon", "run.yaml:3: tag:yaml.org,2002:timestamp does not fit"),
        ("lora_r:\n\t8", "run.yaml:4: no valid YAML: found character '\\t' that cannot start any token; indent"),
        ("<<: {lora_r: 8}", "line 3: << merge keys are not read"),
        ("? [lora_r]\n: 8", "line 3: a sequence a key is one word"),
        ("lora_r: 8\n---\nlora_r: 16", "run.yaml:4: no valid YAML: but found another document"),
        ("x: " + "y" * (1 << 20), "larger than 1 MiB, so it is not a settings file"),
    ],
    ids=range(12),
)  # fmt: skip
def test_a_file_that_grows_nests_or_is_no_yaml_is_refused_at_once(read, content, says):
    started = time.process_time()
    tracemalloc.start()
    found = refusal(read, content)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
    assert says in found
    assert time.process_time() - started < 5


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_every_unicode_encoding_with_its_mark_is_read(read, encoding):
    assert read((NEEDED + "output_dir: läufe\n").encode(encoding)).output_dir == "läufe"


def test_other_encodings_are_named_with_their_line(read):
    assert "run.yaml:3: not UTF-8 (byte 0xe4); save the file as UTF-8" in refusal(
        read, (NEEDED + "output_dir: läufe\n").encode("latin-1")
    )
    assert "not UTF-16" in refusal(read, b"\xff\xfe\x00\xd8")
    assert "no valid YAML" in refusal(read, (NEEDED).encode("utf-16-le"))


def test_names_stay_as_they_are_written(read):
    """YAML 1.1 makes numbers, dates and truth values of them."""
    written = {"revision": "1e5", "split": "no", "output_dir": "007", "chat_template": "2024-01-01"}
    config = read("".join(f"{key}: {value}\n" for key, value in written.items()))
    assert {key: getattr(config, key) for key in written} == written
    assert read_run_config(None, ["--model", "1.0", "--dataset", "a, b.jsonl", "010"])[0].dataset == ["a, b.jsonl", "010"]  # fmt: skip


def test_numbers_are_decimal(read):
    config = read(
        "seed: 010\nmax_steps: 1_000\nlora_r: 0x10\nlearning_rate: 1.e-4\nweight_decay: .5\npacking: off\n"
    )
    assert (config.seed, config.max_steps, config.lora_r) == (10, 1000, 16)
    assert (config.learning_rate, config.weight_decay, config.packing) == (1e-4, 0.5, False)
    assert "must be a whole number" in refusal(read, "seed: 1:30\n")


def test_a_quoted_number_is_told_from_a_number(read):
    assert "learning_rate = '2e-4' must be a number; write it without the quotes" in refusal(
        read, "learning_rate: '2e-4'\n"
    )
    assert "packing = 'true' must be true or false; write it without the quotes" in refusal(
        read, 'packing: "true"\n'
    )
    assert refusal(read, "lora_r: '0'\n").endswith("lora_r = '0' must be a whole number")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("quantization_method: q4_km", None),  # said where the methods are known
        ("lr_scheduler_type: cosin", "did you mean cosine?"),
        ("optim: adamw", "did you mean adamw_8bit?"),
        ("optim: AdamW-8bit", "did you mean adamw_8bit?"),
        ("optim: prodigy", "must be one of adamw_8bit, adamw_torch"),
        ("dtype: bfloat", "must be one of auto, bfloat16, float16, float32; did you mean bfloat16?"),
        ("report_to: [wandbb]", "did you mean wandb?"),
        ("LoRA_r: 8", "unknown key; did you mean lora_r?"),
        ("lora-alpha: 8", "unknown key; did you mean lora_alpha?"),
        ("epochs: 3", "unknown key; did you mean num_train_epochs?"),
        ("deepspeed: ds.json", "unknown key; several GPUs: gpus: all"),
        ("wandb_project: p", "unknown key; report_to names the tracker"),
        ("flash_attention: true", "unknown key; chosen automatically"),
        ("datasets: [a]", "unknown key; did you mean dataset?"),
        ("colour: blue", "unknown key"),
    ],
)
def test_the_nearest_allowed_word_is_named(read, line, says):
    if says is None:
        read(line)
    else:
        assert says in refusal(read, line)


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("dtype: bf16", "dtype", "bfloat16"),
        ("dtype: half", "dtype", "float16"),
        ("gradient_checkpointing: oribi", "gradient_checkpointing", "auto"),
        ("gradient_checkpointing: no", "gradient_checkpointing", "off"),
        ("save_method: [adapter, merged]", "save_method", ["lora", "merged_16bit"]),
    ],
)
def test_other_words_for_a_choice_are_read_as_it(read, line, key, value):
    assert getattr(read(line), key) == value


def test_a_problem_names_the_key_that_was_written(read):
    assert "line 3: lora_rank = 0 must be at least 1" in refusal(read, "lora_rank: 0\n")
    assert "line 4: val_size = 0.1 eval_dataset is given already" in refusal(
        read, "validation_file: e\nval_size: 0.1\n"
    )


def read_or_refused(path: Path) -> RunConfig | None:
    """The config; None after an error that names the file and is short."""
    try:
        return read_run_config(path)[0]
    except ConfigError as error:
        said = str(error)
    assert path.name in said
    assert len(said) < 2000
    return None


BAD = (
    "", "0", "-1", "0.5", "1e400", "-.inf", ".nan", "9" * 400, "''", "'0'", "null", "true", "[]", "[[1], {a: b}]",
    "{a: 1}", '"\\0"', "x" * 300, "2024-01-01", "!!binary aGk=",
)  # fmt: skip


@pytest.mark.parametrize("key", [field.name for field in fields(RunConfig)])
def test_any_value_of_any_key_is_read_or_refused_with_its_line(tmp_path, key):
    lines = {"model": "model: m", "dataset": "dataset: d"}
    for value in BAD:
        path = tmp_path / "run.yaml"
        path.write_text("\n".join({**lines, key: f"{key}: {value}"}.values()))
        config = read_or_refused(path)
        if config is not None:
            path.write_text(as_yaml(config))
            assert read_run_config(path)[0] == config


def test_damaged_files_are_read_or_refused(tmp_path):
    """Characters of a whole file replaced, moved or cut."""
    draw = random.Random(5)
    whole = as_yaml(RunConfig(model="m", dataset=["d"]))
    path: Path = tmp_path / "run.yaml"
    for _ in range(150):
        text = list(whole)
        for _ in range(draw.randint(1, 5)):
            text[draw.randrange(len(text))] = draw.choice("[]{}:,&*!|>'\"%@`#-?\n\t\\ <~=\0é")
        path.write_text("".join(text[: draw.randrange(len(text))] if draw.random() < 0.2 else text))
        read_or_refused(path)


@pytest.mark.parametrize("name", ["c.yaml", "c.json"])
@pytest.mark.parametrize(
    "content", [BOMB, "[" * 100_000, "\xff", '{"a": ' * 50_000, "\0", "9" * 5000], ids=range(6)
)
def test_a_foreign_config_is_read_within_the_same_bounds(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match=name):
        convert_file(path)


def test_every_key_and_every_alias_is_in_the_schema():
    schema = json_schema()
    assert set(schema["properties"]) == {f.name for f in fields(RunConfig)} | set(ALIASES)
    assert schema["additionalProperties"] is False


def test_limits_choices_and_defaults_are_the_configs():
    properties = json_schema()["properties"]
    assert properties["lora_r"] == {
        "description": "Rank of the adapter.", "type": "integer", "minimum": 1, "maximum": 65536,
        "default": 16,
    }  # fmt: skip
    assert properties["learning_rate"]["exclusiveMaximum"] == 1
    assert properties["overlong"]["anyOf"][0]["enum"] == ["truncate", "drop", "split", "error"]
    assert True in properties["gradient_checkpointing"]["enum"]
    assert properties["eval_steps"]["anyOf"][1] == {"type": "null"}
    several, one = properties["dataset"]["anyOf"]
    assert one == several["items"]
    text, settings = one["anyOf"]
    assert text == {"type": "string"}
    assert settings["required"] == ["path"]
    assert settings["additionalProperties"] is False
    assert properties["sequence_len"]["deprecated"]
    assert properties["sequence_len"]["type"] == "integer"
