"""Configs of other programs for preferences and rewards become run files with a stage, whose rows are read and trained."""

import json

import pytest

from oribi.config_file import read_run_config
from oribi.dialects import convert_file
from oribi.errors import ConfigError

# examples/train_lora/llama3_lora_dpo.yaml, llama3_lora_kto.yaml and llama3_lora_reward.yaml
FACTORY = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: d/e
dataset_dir: ONLINE
template: llama3
cutoff_len: 2048
max_samples: 1000
output_dir: saves/llama3-8b/lora
logging_steps: 10
save_steps: 500
plot_loss: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
"""
AXOLOTL = """
base_model: Qwen/Qwen2.5-0.5B
chat_template: chatml
adapter: lora
sequence_len: 2048
sample_packing: false
lora_r: 8
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
"""
# examples/qwen2/dpo.yaml
AXOLOTL_DPO = """
rl: dpo
datasets:
  - path: fozziethebeat/alpaca_messages_2k_dpo_test
    type: chat_template.default
    field_messages: conversation
    field_chosen: chosen
    field_rejected: rejected
    message_property_mappings:
      role: role
      content: content
    roles:
      system: [system]
      user: [user]
      assistant: [assistant]
"""
AXOLOTL_GRPO = """
rl: grpo
micro_batch_size: 8
trl:
  beta: 0.001
  max_completion_length: 256
  use_vllm: true
  vllm_gpu_memory_utilization: 0.5
  reward_funcs: [rewards.correct, trl.rewards.think_format_reward]
  reward_weights: [1.0, 0.5]
  num_generations: 4
  scale_rewards: false
datasets: [{path: openai/gsm8k, split: train}]
"""
TRL = "--model_name_or_path Qwen/Qwen2-0.5B-Instruct --dataset_name d/e --output_dir out --use_peft --lora_r 32 --lora_alpha 16"
MEANINGS = {
    "factory dpo": (FACTORY + "stage: dpo\npref_beta: 0.2\npref_loss: sigmoid\n", "x.yaml",
        {"stage": "dpo", "beta": 0.2, "loss_type": ["sigmoid"], "learning_rate": 5e-6, "gradient_accumulation_steps": 8}, set()),
    "factory ipo": (FACTORY + "stage: dpo\npref_loss: ipo\nsimpo_gamma: 0.7\n", "x.yaml", {"stage": "dpo", "loss_type": ["ipo"]}, set()),
    "factory ftx": (FACTORY + "stage: dpo\npref_ftx: 0.3\ndpo_label_smoothing: 0.1\n", "x.yaml",
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3], "label_smoothing": 0.1}, set()),
    "factory orpo": (FACTORY + "stage: dpo\npref_beta: 0.1\npref_loss: orpo\nneat_packing: true\n", "x.yaml",
        {"stage": "orpo", "beta": 0.1, "loss_type": None, "packing": False}, set()),
    "factory kto": (FACTORY + "stage: kto\npref_beta: 0.1\nkto_rejected_weight: 1.5\nlora_dropout: 0.1\n", "x.yaml",
        {"stage": "kto", "undesirable_weight": 1.5, "desirable_weight": 1.0, "per_device_train_batch_size": 2,
         "gradient_accumulation_steps": 4, "lora_dropout": 0.0}, set()),
    "factory rm": (FACTORY + "stage: rm\nlora_dropout: 0.1\ntrain_on_prompt: false\n", "x.yaml",
        {"stage": "reward", "beta": None, "lora_dropout": 0.1}, set()),
    "factory rl keys beside sft": (FACTORY + "stage: sft\npref_beta: 0.3\ntop_p: 0.7\nmax_new_tokens: 64\n", "x.yaml", {"stage": "sft", "beta": None}, set()),
    "axolotl dpo": (AXOLOTL + AXOLOTL_DPO, "x.yml",
        {"stage": "dpo", "columns": None, "chat_template": "chatml", "lora_dropout": 0.0, "overlong": "drop",
         "loss_type": ["sigmoid"], "packing": False}, set()),
    "axolotl ipo": (AXOLOTL + "rl: ipo\nrl_beta: 0.05\ndatasets: [{path: a, type: chatml.intel, split: train_prefs}]\n", "x.yml",
        {"stage": "dpo", "loss_type": ["ipo"], "beta": 0.05, "split": "train_prefs"}, set()),
    "axolotl rpo": (AXOLOTL + "rl: dpo\nrpo_alpha: 0.5\ndatasets: [{path: a, type: llama3.icr}]\n", "x.yml",
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "chat_template": "llama3", "columns": {"prompt": "input"}}, set()),
    "axolotl two of one form": (AXOLOTL + "rl: dpo\ndatasets: [{path: a, type: chatml.ultra}, {path: b, type: chatml.prompt_pairs}]\n", "x.yml",
        {"dataset": ["a", "b"], "chat_template": "chatml", "dataset_text_field": None}, set()),
    "axolotl orpo": (AXOLOTL + "rl: orpo\norpo_alpha: 0.2\nremove_unused_columns: false\ndatasets: [{path: a, type: chat_template.argilla}]\n", "x.yml",
        {"stage": "orpo", "beta": 0.2, "chat_template": "chatml"}, set()),
    "axolotl kto": (AXOLOTL + "rl: kto\nrl_beta: 0.5\nkto_desirable_weight: 0.2\ndatasets: [{path: a, type: llama3.ultra}]\n", "x.yml",
        {"stage": "kto", "beta": 0.5, "desirable_weight": 0.2, "undesirable_weight": 1.0}, set()),
    "axolotl user_defined": (AXOLOTL + "rl: dpo\ndatasets:\n- path: a\n  type: {field_prompt: ask, field_chosen: good, field_rejected: bad}\n", "x.yml",
        {"columns": {"prompt": "ask", "chosen": "good", "rejected": "bad"}, "dataset_text_field": "prompt"}, set()),
    "axolotl chatml by hand": (AXOLOTL + 'rl: dpo\ndatasets:\n- path: a\n  type:\n    prompt_format: "<|im_start|>user\\n{prompt}<|im_end|>\\n<|im_start|>assistant\\n"\n    chosen_format: "{chosen}<|im_end|>"\n    rejected_format: "{rejected}<|im_end|>"\n', "x.yml",
        {"chat_template": "chatml", "dataset_text_field": None}, set()),
    "axolotl reward": (AXOLOTL + "reward_model: true\nnum_labels: 1\ncenter_rewards_coefficient: 0.01\ndatasets: [{path: a, type: bradley_terry.chat_template}]\n", "x.yml",
        {"stage": "reward", "center_rewards_coefficient": 0.01, "columns": {"prompt": "input"}}, set()),
    "axolotl grpo": (AXOLOTL.replace("micro_batch_size: 2\n", "") + AXOLOTL_GRPO, "x.yml",
        {"stage": "grpo", "beta": 0.001, "max_completion_length": 256, "num_generations": 4, "scale_rewards": "none",
         "reward_funcs": ["rewards:correct", "trl.rewards:think_format_reward"], "reward_weights": [1.0, 0.5],
         "max_prompt_length": 2048, "max_seq_length": 2304, "lora_dropout": 0.05}, set()),
    "trl dpo": (f"trl dpo {TRL} --beta 0.05 --loss_type sigmoid sft --loss_weights 1 0.5 --no_remove_unused_columns", "x.sh",
        {"stage": "dpo", "beta": 0.05, "loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.5], "learning_rate": 1e-6, "lora_dropout": 0.0,
         "target_modules": ["q_proj", "v_proj"], "max_seq_length": 1024, "per_device_train_batch_size": 8}, {"no_remove_unused_columns"}),
    "trl kto": (f"python trl/scripts/kto.py {TRL} --desirable_weight 1.3 --per_device_train_batch_size 16 --lora_dropout 0.1 --disable_dropout false", "x.sh",
        {"stage": "kto", "desirable_weight": 1.3, "lora_dropout": 0.1}, set()),
    "trl orpo": (f"trl orpo {TRL} --max_prompt_length 512", "x.sh", {"stage": "orpo", "beta": 0.1}, {"max_prompt_length"}),
    "trl reward": (f"trl reward {TRL} --lora_task_type SEQ_CLS --lora_modules_to_save score --center_rewards_coefficient 0.01", "x.sh",
        {"stage": "reward", "learning_rate": 1e-4, "modules_to_save": [], "center_rewards_coefficient": 0.01}, set()),
    "trl grpo": (f"trl grpo {TRL} --reward_funcs accuracy_reward my.rewards.short --use_vllm --vllm_mode colocate --max_prompt_length 128 --num_generations 4", "x.sh",
        {"stage": "grpo", "reward_funcs": ["trl.rewards:accuracy_reward", "my.rewards:short"], "max_prompt_length": 128, "max_seq_length": 1024,
         "lora_dropout": 0.05, "learning_rate": 1e-6}, set()),
    "trl by accelerate": (f"accelerate launch --config_file multi.yaml trl/scripts/dpo.py {TRL} --beta 0.3", "x.sh", {"stage": "dpo", "beta": 0.3}, {"config_file"}),
    "trl file of one trainer's keys": ("model_name_or_path: m\ndataset_name: d\nuse_peft: true\nreward_funcs: [think_format_reward]\n", "config.yaml", {"stage": "grpo"}, set()),
    "trl file named after a trainer": ("model_name_or_path: m\ndataset_name: d\nuse_peft: true\nbeta: 0.2\n", "my-dpo_run.yaml", {"stage": "dpo", "beta": 0.2}, set()),
}  # fmt: skip


@pytest.mark.parametrize("name", MEANINGS)
def test_a_config_of_a_stage_becomes_a_run_file_that_is_read(oribi, tmp_path, monkeypatch, name):
    text, file, expected, unsupported = MEANINGS[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / file).write_text(text)
    result = oribi("convert", file, "-o", "config_of_oribi.yaml", "--json")
    assert result.code == 0, result.err
    assert set(result.records[0]["unsupported"]) == unsupported
    config, notes = read_run_config("config_of_oribi.yaml")
    assert notes == []
    assert {key: getattr(config, key) for key in expected} == expected


REFUSED = {
    "factory simpo": (FACTORY + "stage: dpo\npref_loss: simpo\n", "x.yaml", "pref_loss = simpo .*without a reference"),
    "factory kto_pair": (FACTORY + "stage: dpo\npref_loss: kto_pair\n", "x.yaml", "pref_loss = kto_pair .*stage: kto"),
    "factory reference": (FACTORY + "stage: dpo\nref_model: other/model\n", "x.yaml", "ref_model = other/model .*the reference is"),
    "factory kto with sft": (FACTORY + "stage: kto\npref_ftx: 0.1\n", "x.yaml", "pref_ftx = 0.1 .*dpo adds several"),
    "factory odd steps": (FACTORY.replace("steps: 8", "steps: 1") + "stage: kto\n", "x.yaml", "per_device_train_batch_size = 1 .*at least 2"),
    "axolotl simpo": (AXOLOTL + "rl: simpo\n", "x.yml", "rl = simpo .*without a reference"),
    "axolotl gdpo": (AXOLOTL + "rl: gdpo\n", "x.yml", "rl = gdpo .*oribi's stages are"),
    "axolotl rows by a function": (AXOLOTL + AXOLOTL_GRPO.replace("split: train", "type: rewards.transform"), "x.yml", "type = rewards.transform .*rewrites rows"),
    "axolotl form": (AXOLOTL + "rl: dpo\ndatasets: [{path: a, type: {prompt_format: '[INST] {prompt} [/INST]'}}]\n", "x.yml", "prompt format of its own"),
    "axolotl unknown form": (AXOLOTL + "rl: dpo\ndatasets: [{path: a, type: zephyr.nectar}]\n", "x.yml", "type = zephyr.nectar"),
    "axolotl forms": (AXOLOTL + "rl: dpo\ndatasets: [{path: a, type: chatml.intel}, {path: b, type: chat_template.default}]\n", "x.yml", "one form of prompts"),
    "axolotl text and form": (AXOLOTL + "rl: dpo\ndatasets: [{path: a, type: passthrough}, {path: b, type: chatml.ultra}]\n", "x.yml", "one form of prompts"),
    "axolotl noise": (AXOLOTL + AXOLOTL_DPO + "neftune_noise_alpha: 5\n", "x.yml", "neftune_noise_alpha = 5 .*without noise"),
    "grpo without rewards": (f"trl grpo {TRL}", "x.sh", "reward_funcs = None .*at least one"),
    "grpo with a model": (f"trl grpo {TRL} --reward_funcs org/model", "x.sh", "reward_funcs: org/model .*write a function"),
    "grpo groups": (f"trl grpo {TRL} --reward_funcs a.b --num_generations 3", "x.sh", "num_generations = 3 .*whole groups"),
    "grpo iterations": (f"trl grpo {TRL} --reward_funcs a.b --num_iterations 4", "x.sh", "num_iterations = 4"),
    "trl without a name": ("model_name_or_path: m\ndataset_name: d\nuse_peft: true\nbeta: 0.2\n", "config.yaml", "beta = 0.2 .*which of TRL's trainers"),
    "trl by an unknown script": (f"accelerate launch train.py {TRL} --beta 0.3", "x.sh", "beta = 0.3 .*which of TRL's trainers"),
    "trl loss": (f"trl dpo {TRL} --loss_type unheard_of", "x.sh", "loss_type = .*unheard_of"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_stage_cannot_do_is_refused(tmp_path, name):
    text, file, message = REFUSED[name]
    (tmp_path / file).write_text(text)
    with pytest.raises(ConfigError, match=message):
        convert_file(tmp_path / file)


def test_one_trl_block_is_not_read_without_its_training(tmp_path):
    (tmp_path / "x.yml").write_text(
        AXOLOTL + "trl: {beta: 0.1, use_vllm: true}\ndatasets: [{path: a, type: chat_template}]\n"
    )
    found = convert_file(tmp_path / "x.yml")
    assert "stage" not in found.values
    assert {"beta", "use_vllm"} <= set(found.idle)


ASK = [{"from": "human", "value": "How much is two and two?"}]
FOUR, FIVE = {"from": "gpt", "value": "It is four."}, {"from": "gpt", "value": "It is five."}
MESSAGES = [{"role": "user", "content": "How much is two and two?"}]
RIGHT, WRONG = (
    {"role": "assistant", "content": "It is four."},
    {"role": "assistant", "content": "It is five."},
)
PLAIN = {"prompt": "How much is two and two?", "chosen": "It is four.", "rejected": "It is five."}
# a form of rows as a program's data sets have it: the line of Axolotl, or the entry of dataset_info.json; the stage; a row
ROWS = {
    "chatml.intel": ("dpo", {"system": "Be brief.", "question": "How?", "chosen": "So.", "rejected": "No."}),
    "chatml.argilla": ("dpo", {"instruction": "How?", "chosen_response": "So.", "rejected_response": "No."}),
    "chatml.argilla_chat": ("dpo", {"chosen": [*MESSAGES, RIGHT], "rejected": [*MESSAGES, WRONG]}),
    "chatml.icr": ("dpo", {"system": "", "input": "How?", "chosen": "So.", "rejected": "No."}),
    "chatml.prompt_pairs": ("dpo", PLAIN),
    "chatml.ultra": ("dpo", {"prompt": "How much is two and two?", "chosen": [*MESSAGES, RIGHT], "rejected": [*MESSAGES, WRONG]}),
    "llama3.intel": ("dpo", {"system": "Be brief.", "question": "How?", "chosen": "So.", "rejected": "No."}),
    "chat_template.default": ("dpo", {"messages": MESSAGES, "chosen": RIGHT, "rejected": WRONG}),
    "chat_template.argilla": ("orpo", {"chosen": [*MESSAGES, RIGHT], "rejected": [*MESSAGES, WRONG]}),
    "passthrough": ("dpo", PLAIN),
    "{field_prompt: ask, field_chosen: good}": ("dpo", {"ask": "How?", "good": " So.", "rejected": " No."}),
    "chatml.argilla ": ("kto", {"instruction": "How?", "completion": "So.", "label": True}),
    "llama3.intel ": ("kto", {"question": "How?", "completion": "So.", "label": True}),
    "llama3.ultra": ("kto", {"prompt": "How?", "completion": "So.", "label": True}),
    "bradley_terry.chat_template": ("reward", {"input": "How?", "chosen": "So.", "rejected": "No."}),
}  # fmt: skip
TABLES = {
    "sharegpt ranking": ("dpo", {"ranking": True, "formatting": "sharegpt", "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}},
        {"conversations": ASK, "chosen": FOUR, "rejected": FIVE}),
    "alpaca ranking": ("rm", {"ranking": True, "columns": {"prompt": "instruction", "query": "input", "chosen": "good", "rejected": "bad"}},
        {"instruction": "How?", "input": "", "good": "So.", "bad": "No."}),
    "sharegpt judged": ("kto", {"formatting": "sharegpt", "columns": {"messages": "messages", "kto_tag": "label"}, "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}},
        {"messages": [*MESSAGES, RIGHT], "label": True}),
    "alpaca judged": ("kto", {"columns": {"prompt": "instruction", "response": "output", "kto_tag": "liked"}},
        {"instruction": "How?", "output": "So.", "liked": False}),
}  # fmt: skip


def seen(oribi, config: str) -> dict:
    """What `oribi inspect data` says of a run file's rows."""
    looked = oribi("inspect", "data", config, "--json")
    assert looked.code == 0, looked.err
    return looked.records[-1]


@pytest.mark.parametrize("form", ROWS)
def test_rows_in_a_form_of_axolotls_are_read(oribi, tiny_folder, tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    stage, row = ROWS[form]
    rows = [row, {**row, "label": not row["label"]}] if stage == "kto" else [row] * 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    asked = "reward_model: true" if stage == "reward" else f"rl: {stage}"
    text = AXOLOTL.replace("Qwen/Qwen2.5-0.5B", str(tiny_folder)).replace("chat_template: chatml\n", "")
    (tmp_path / "x.yml").write_text(
        f"{text}{asked}\ndatasets: [{{path: rows.jsonl, type: {form.strip()}}}]\n"
    )
    result = oribi("convert", "x.yml", "-o", "config.yaml")
    assert result.code == 0, result.err
    assert seen(oribi, "config.yaml")["examples"] == 2


@pytest.mark.parametrize("name", TABLES)
def test_rows_of_llama_factorys_table_are_read(oribi, tiny_folder, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    stage, entry, row = TABLES[name]
    (tmp_path / "rows.json").write_text(json.dumps([row, row]))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "rows.json", **entry}}))
    text = (
        FACTORY.replace("d/e", "mine")
        .replace("ONLINE", ".")
        .replace("meta-llama/Meta-Llama-3-8B-Instruct", str(tiny_folder))
    )
    (tmp_path / "x.yaml").write_text(f"{text}stage: {stage}\n")
    result = oribi("convert", "x.yaml", "-o", "config.yaml")
    assert result.code == 0, result.err
    assert seen(oribi, "config.yaml")["examples"] == 2


REWARDS = "def short(completions, **row):\n    return [-float(len(str(answer))) for answer in completions]\n"
TRAINED = {
    "factory.yaml": f"{FACTORY}stage: dpo\nmax_steps: 2\n".replace("d/e", "rows.jsonl"),
    "axolotl.yml": f"{AXOLOTL}max_steps: 2\nrl: kto\nlogging_steps: 1\noutput_dir: out\ndatasets: [{{path: rows.jsonl, type: chatml.prompt_pairs}}]\n",
    "trl.sh": f"trl grpo {TRL} --reward_funcs rewards.short --max_steps 2 --num_generations 2 --per_device_train_batch_size 2 "
    "--max_completion_length 8 --logging_steps 1".replace("d/e", "rows.jsonl"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_a_converted_stage_trains(oribi, tiny_folder, tmp_path, monkeypatch, name):
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    row = {"prompt": "How?", "completion": "So.", "label": True} if "axolotl" in name else PLAIN
    rows = [row, {**row, "label": False}] if "label" in row else [row]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows * 8))
    (tmp_path / "rewards.py").write_text(REWARDS)
    text = TRAINED[name]
    for model in ("meta-llama/Meta-Llama-3-8B-Instruct", "Qwen/Qwen2.5-0.5B", "Qwen/Qwen2-0.5B-Instruct"):
        text = text.replace(model, str(tiny_folder))
    text = text.replace("saves/llama3-8b/lora", "out").replace("logging_steps: 10\n", "logging_steps: 1\n")
    (tmp_path / name).write_text(text)
    converted = oribi("convert", name, "-o", "config.yaml")
    assert converted.code == 0, converted.err
    trained = oribi("train", "config.yaml", "--dtype", "float32", "--report", "false")
    assert trained.code == 0, trained.err
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "loss" in line] == [1, 2]
