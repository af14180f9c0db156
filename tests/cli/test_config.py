"""The run config: what it reads, how it converts, and everything it refuses, all at once."""

from dataclasses import fields
from pathlib import Path

import pytest

from oribi.config import ALIASES, RunConfig
from oribi.config_file import as_yaml, read_run_config
from oribi.errors import ConfigError

NEEDED = "model: m\ndataset: d\n"


@pytest.fixture
def read(tmp_path):
    """Reads a config from text."""

    def read_text(
        text: str, flags: tuple[str, ...] = (), needed: str = NEEDED
    ) -> tuple[RunConfig, list[str]]:
        path = tmp_path / "run.yaml"
        path.write_text(needed + text, encoding="utf-8")
        return read_run_config(path, flags)

    return read_text


def problems(read, text: str, flags: tuple[str, ...] = (), needed: str = NEEDED) -> str:
    with pytest.raises(ConfigError) as error:
        read(text, flags, needed)
    # the columns are for people
    return "\n".join(" ".join(line.split()) for line in str(error.value).splitlines())


def test_values_are_what_people_write(read):
    config, notes = read(
        "learning_rate: 2e-4\nlora_dropout: 0\nnum_train_epochs: 3\ndataset_num_proc: null\n"
        "target_modules: q_proj\nsave_method: [lora, merged_16bit]\ngradient_checkpointing: false\nlora_r: 8.0\n"
    )
    assert config.learning_rate == 2e-4
    assert isinstance(config.learning_rate, float)
    assert (config.lora_dropout, config.num_train_epochs) == (0.0, 3.0)
    assert config.dataset == ["d"]
    assert config.target_modules == ["q_proj"]
    assert config.save_method == ["lora", "merged_16bit"]
    assert config.gradient_checkpointing == "off"
    assert (config.lora_r, type(config.lora_r)) == (8, int)
    assert config.dataset_num_proc is None
    assert notes == ["gradient_checkpointing: 'false' read as off"]


def test_a_flag_overrides_its_line(read):
    flags = ("--lora-r", "4", "--learning_rate=1e-3", "--use_rslora", "--dataset", "a.jsonl", "b.jsonl")
    config, _ = read("lora_r: 8\n", flags)
    assert (config.lora_r, config.learning_rate, config.use_rslora) == (4, 1e-3, True)
    assert config.dataset == ["a.jsonl", "b.jsonl"]


def test_pairs_of_names_are_read_from_lines_blocks_and_flags(read):
    pairs = {"question": "task", "answer": "no"}
    assert read("columns: {question: task, answer: no}\n")[0].columns == pairs
    assert read("columns:\n  question: task\n  answer: no\n")[0].columns == pairs
    for flags in (("--columns", "question=task", "answer=no"), ("--columns={question: task, answer: no}",)):
        assert read("malformed: drop\nrole_aliases: {coach: assistant}\n", flags)[0].columns == pairs
    assert read_run_config(None, ["--model=m", "--dataset=d", "--role-aliases", "coach=user"])[
        0
    ].role_aliases == {"coach": "user"}
    found = problems(read, "columns: task\nmalformed: skip\nrole_aliases: {coach: [a]}\noptim:\n  x: y\n")
    assert "columns = 'task' must be pairs of names, {ours: yours}, or ours=yours as a flag" in found
    assert "malformed = 'skip' must be error or drop" in found
    assert found.count("must be pairs of names") == 2
    assert "optim: ... the file is flat" in found


def test_a_config_with_pairs_is_read_back(read, tmp_path):
    config, _ = read("columns: {question: task}\n")
    (tmp_path / "again.yaml").write_text(as_yaml(config))
    assert read_run_config(tmp_path / "again.yaml")[0] == config


def test_commas_join_names_of_modules_but_no_expression(read):
    stacks = "--target_parameters=mlp.experts.gate_up_proj,mlp.experts.down_proj"
    config, _ = read("", ("--target_modules", "q_proj, k_proj", stacks))
    assert config.target_modules == ["q_proj", "k_proj"]
    assert config.target_parameters == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    expression = r".*\.(q|k)_proj|.*\.\d{1,2}\.mlp\..*"
    assert read(f"target_modules: '{expression}'\n")[0].target_modules == [expression]


def test_flags_alone_are_a_config():
    config, notes = read_run_config(None, ["--base_model", "m", "--train_file", "d", "--max_steps", "-1"])
    assert (config.model, config.dataset, config.max_steps) == ("m", ["d"], -1)
    assert notes == ["base_model read as model", "train_file read as dataset"]


def test_names_of_other_trainers_are_read_and_reported(read):
    config, notes = read("sequence_len: 512\nmicro_batch_size: 3\nlora_rank: 32\nval_set_size: 0.1\n")
    assert (config.max_seq_length, config.per_device_train_batch_size, config.lora_r) == (512, 3, 32)
    assert config.eval_fraction == 0.1
    assert "sequence_len read as max_seq_length" in notes
    assert len(notes) == 4


def test_every_alias_names_a_setting():
    known = {field.name for field in fields(RunConfig)}
    assert set(ALIASES.values()) <= known
    assert not set(ALIASES) & known


def test_all_problems_come_at_once_with_their_lines(read):
    found = problems(
        read,
        "learning_rte: 2e-4\nlora_r: 0\nlora_dropout: 1.5\nwarmup_steps: soon\noverlong: cut\npacking: 3\n",
        ("--max_steps", "0"),
    )
    path, *lines = found.splitlines()
    assert path.endswith("run.yaml: 7 problems")
    assert lines == [
        "- max_steps = 0 must be positive, or -1 to train num_train_epochs",
        "line 3: learning_rte unknown key; did you mean learning_rate?",
        "line 4: lora_r = 0 must be at least 1",
        "line 5: lora_dropout = 1.5 must be below 1",
        "line 6: warmup_steps = 'soon' must be a number",
        "line 7: overlong = 'cut' must be one of truncate, drop, split, error",
        "line 8: packing = 3 must be true or false",
    ]


def test_two_names_of_one_setting_may_not_differ(read):
    found = problems(read, "lora_r: 8\nlora_rank: 16\n")
    assert "line 4: lora_rank = 16 means the same as lora_r, 8 on line 3; keep one" in found
    assert "given twice" in problems(read, "lora_r: 8\nlora_r: 16\n")
    assert read("lora_r: 8\nlora_rank: 8\n")[0].lora_r == 8


def test_contradictions_are_found(read):
    assert "full_finetuning needs false" in problems(read, "full_finetuning: true\nload_in_4bit: true\n")
    assert "eval_dataset is given already" in problems(read, "eval_dataset: e\neval_fraction: 0.1\n")
    assert "needs eval_dataset, eval_fraction or sample_prompts" in problems(read, "eval_steps: 5\n")
    assert "full_finetuning has no adapter" in problems(read, "full_finetuning: true\nsave_method: lora\n")
    assert "must be above 0" in problems(read, "num_train_epochs: 0\n")
    missing = problems(read, "", needed="seed: 1\n")
    assert "model missing" in missing
    assert "dataset missing" in missing


def test_data_sets_have_settings_of_their_own(read):
    config, _ = read(
        "dataset:\n  - path: a.csv\n    weight: 2\n    columns: {question: task}\n    max_rows: 10\n"
        "  - {path: b/c, split: test, weight: 1.5, dataset_text_field: body}\neval_dataset: {path: e.jsonl, split: dev}\n",
        needed="model: m\n",
    )
    assert config.sources() == [
        {"path": "a.csv", "weight": 2, "columns": {"question": "task"}, "max_rows": 10},
        {"path": "b/c", "split": "test", "weight": 1.5, "text_field": "body"},
    ]
    assert config.eval_dataset == [{"path": "e.jsonl", "split": "dev"}]
    assert read_run_config(None, ["--model=m", "--dataset", "a.csv", "{path: b.csv, max_rows: 3}"])[0].sources() == [
        {"path": "a.csv"}, {"path": "b.csv", "max_rows": 3},
    ]  # fmt: skip
    for source, message in {
        "{weight: 2}": "a data set needs a path: a file, a folder or a hub name",
        "{path: a, wieght: 2}": "a data set has no 'wieght'; did you mean weight?",
        "{path: a, weight: heavy}": "weight = 'heavy': must be a number above 0",
        "{path: a, max_rows: 0}": "max_rows = 0: must be a whole number above 0",
        "{path: a, columns: b}": "columns = 'b': must be pairs of names",
        "[{path: a, weight: 2}, b]": "1 of 2 have a weight; give all of them one, or none",
    }.items():
        assert message in problems(read, f"dataset: {source}\n", needed="model: m\n")


def test_a_data_type_is_read_as_other_trainers_write_it(read):
    for line, dtype in {
        "bf16: true": "bfloat16", "fp16: true": "float16", "bf16: full": "bfloat16", "bf16: auto": "auto",
        "bf16: false\nfp16: true": "float16", "tf32: true\nbf16: true": None,
    }.items():  # fmt: skip
        if dtype is None:
            assert "tf32 unknown key; use dtype" in problems(read, f"{line}\n")
        else:
            assert read(f"{line}\n")[0].dtype == dtype
    assert read("bf16: true\n")[1] == ["bf16: true read as dtype: bfloat16"]
    found = problems(read, "bf16: true\nfp16: true\n")
    assert "line 4: fp16 = 'float16' means the same as bf16, 'bfloat16' on line 3; keep one" in found


def test_values_of_single_layers_and_arguments_are_read_with_their_types(read):
    config, _ = read(
        "rank_pattern: {down_proj: 32, 'layers.[01].*': 4}\nlr_scheduler_type: cosine_with_min_lr\n"
        "lr_scheduler_kwargs: {min_lr: 2e-6}\ninit_lora_weights: loftq\nlayers_to_transform: [30, 31]\n"
        "chat_template_kwargs: {enable_thinking: false}\n",
        ("--alpha_pattern", "down_proj=64"),
    )
    assert config.rank_pattern == {"down_proj": 32, "layers.[01].*": 4}
    assert (config.alpha_pattern, config.layers_to_transform) == ({"down_proj": 64.0}, [30, 31])
    assert config.lr_scheduler_kwargs == {"min_lr": 2e-6}
    assert config.chat_template_kwargs == {"enable_thinking": False}
    for line, message in {
        "rank_pattern: {q_proj: many}": "q_proj: must be a whole number",
        "rank_pattern: {q_proj: 0}": "must be at least 1",
        "layers_to_transform: [1, -1]": "must be at least 0",
        "init_lora_weights: pisa": "did you mean pissa?",
        "init_lora_weights: olora": "is computed on 16-bit weights",
        "init_lora_weights: pissa\nuse_dora: true": "each set how layers begin",
        "init_lora_weights: eva\nstage: dpo": "eva begins with the rows of stage = sft",
        "finetune_last_n_layers: 2\nlayers_to_transform: [0]": "layers_to_transform says which layers",
        "total_batch_size: 8\ngradient_accumulation_steps: 3": "it follows from total_batch_size",
        "optim_args: momentum": "must be pairs of a name and a value",
        "init_lora_weights: loftq\nload_in_4bit: false": "loftq makes up for what NF4 rounds off",
        "full_finetuning: true\nrank_pattern: {q_proj: 8}": "full_finetuning has no adapter; leave it out",
        "trainable_tokens: [a]\nmodules_to_save: [embed_tokens]": "embed_tokens is trained whole already",
        "fsdp: true\ninit_lora_weights: loftq\nnew_tokens: [a]": "with fsdp a process holds parts of them",
        "early_stopping_patience: 3": "needs evaluations: eval_dataset or eval_fraction",
        "eval_fraction: 0.1\neval_steps: 3\nsave_steps: 4\nload_best_model_at_end: true": "needs a multiple of eval_steps = 3",
        "eval_fraction: 0.1\nsave_steps: 4\nload_best_model_at_end: true": "or save_strategy: best",
        "save_strategy: epoch\nsave_steps: 4": "save_strategy = epoch does not use it",
    }.items():  # fmt: skip
        assert message in problems(read, f"{line}\n")
    assert (
        read("init_lora_weights: pissa_niter_4\nload_in_4bit: false\n")[0].init_lora_weights
        == "pissa_niter_4"
    )


def test_a_setting_that_another_one_leaves_without_effect_is_named(read):
    for lines, message in {
        "full_finetuning: true\nlora_rank: 8": "lora_rank = 8 is not used: full_finetuning has no adapter",
        "sample_tokens: 9": "sample_tokens = 9 is not used",
        "save_total_limit: 2": "save_total_limit = 2 is not used: no checkpoints are written",
        "per_device_eval_batch_size: 2": "nothing is evaluated",
        "max_steps: 9\nnum_train_epochs: 2": "num_train_epochs = 2 is not used: max_steps ends the training",
        "lr_scheduler_type: constant\nwarmup_ratio: 0.1": "constant has no warm-up; constant_with_warmup has one",
    }.items():
        assert message in " ".join(read(f"{lines}\n")[1])
        used = f"{lines}\neval_fraction: 0.1\nsave_steps: 5\nsample_prompts: held_out\nload_in_4bit: false\n"
        if lines[:4] in ("samp", "save", "per_"):
            assert "is not used" not in " ".join(read(used)[1])
    text = "optim: sgd\noptim_args: momentum=0.9, nesterov=true\n"
    assert read(text)[0].optim_args == {"momentum": 0.9, "nesterov": True}


def test_early_stopping_keeps_the_best_weights_unless_the_file_says_otherwise(read):
    text = "eval_fraction: 0.1\nearly_stopping_patience: 2\n"
    assert read(text)[0].load_best_model_at_end is True
    assert read(f"{text}load_best_model_at_end: false\n")[0].load_best_model_at_end is False


def test_a_file_that_is_no_flat_mapping_is_refused(read, tmp_path):
    assert "line 3: lora: ... the file is flat" in problems(read, "lora:\n  r: 8\n")
    assert "expected lines of 'key: value', got a sequence" in problems(read, "- a\n- b\n", needed="")
    assert "run.yaml:3: no valid YAML" in problems(read, "a: [1\nb: 2\n", needed="model: m\n")
    with pytest.raises(ConfigError, match="nothing.yaml: cannot be read: No such file"):
        read_run_config(tmp_path / "nothing.yaml")


def test_a_stray_word_is_no_flag():
    with pytest.raises(ConfigError, match="flags are written --key value"):
        read_run_config(None, ["-x", "--model", "m", "--dataset", "d"])


def test_a_flag_that_is_no_yaml_is_taken_as_it_stands():
    config, _ = read_run_config(None, ["--model", "{m", "--dataset", "d"])
    assert config.model == "{m"


def test_the_saved_config_reads_back(read, tmp_path):
    config, _ = read(
        "lora_r: 3\nlearning_rate: 1e-5\neval_fraction: 0.25\nquantization_method: [q8_0, q4_k_m]\n"
        "rank_pattern: {q_proj: 4}\ninit_lora_weights: gaussian\nearly_stopping_patience: 2\n"
        "lr_scheduler_type: polynomial\nlr_scheduler_kwargs: {power: 2.0}\n"
    )
    path = tmp_path / "saved.yaml"
    path.write_text(as_yaml(config))
    assert read_run_config(path) == (config, [])


def test_train_checks_a_config_and_stops(oribi, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(NEEDED)
    result = oribi("train", path, "--check", "--lr", "3e-4")
    assert result.code == 0
    assert "learning_rate: 0.0003" in result.out
    assert "lr read as learning_rate" in result.err
    failed = oribi("train", "--check", "--lora_r", "0")
    assert failed.code == 1
    assert "flags: 3 problems" in failed.err
    assert "Traceback" not in failed.err


def test_a_run_can_be_repeated_from_its_folder(trained_run):
    """The resolved config lies in the run; adapter and log beside it."""
    config, _ = read_run_config(trained_run / "config.yaml")
    assert Path(config.output_dir) == trained_run
    assert {path.name for path in trained_run.iterdir()} >= {"adapter", "config.yaml", "log.jsonl"}
    assert (trained_run / "adapter" / "adapter_model.safetensors").is_file()


def test_a_runs_folder_names_its_config(tmp_path):
    (tmp_path / "config.yaml").write_text("model: m\ndataset: d\n")
    with pytest.raises(ConfigError, match=r"is a folder; .* such as its own .*config\.yaml"):
        read_run_config(tmp_path)
