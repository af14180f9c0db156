"""`oribi.trl`: TRL's trainers with the keywords of earlier releases, on oribi's model and with the same losses as elsewhere."""

import pickle
from dataclasses import fields
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, TrainingArguments

import oribi.trl
from oribi.compat.prompts import short_prompts, template_columns
from oribi.compat.trl import trainer_keywords
from oribi.compat.trl_keywords import fate_of
from oribi.errors import ConfigError
from oribi.lora.attach import attach_lora
from oribi.models.load import load_model
from tests.train.conftest import WORDS, write_tiny_model

STEPS = 5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# TRL 1.15 computes log probabilities with a Triton kernel on CPUs too, wherever Triton is installed
NEEDS_DRIVER = pytest.mark.skipif(
    version("trl").startswith("1.15.") and find_spec("triton") is not None and not torch.cuda.is_available(),
    reason="TRL 1.15 needs a CUDA device where Triton is installed",
)
SETTINGS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-2,
    "warmup_ratio": 0.0,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "seed": 3,
    "optim": "adamw_torch",
    "disable_tqdm": True,
    "use_cpu": DEVICE == "cpu",
    "bf16": False,
    "gradient_checkpointing": False,
    "overwrite_output_dir": True,
}


def words(start: int, count: int) -> str:
    return " ".join(WORDS[(start + 3 * i) % len(WORDS)] for i in range(count))


PAIRS = [
    {"prompt": words(i, 3 + i % 3), "chosen": " " + words(2 * i, 4), "rejected": " " + words(5 * i + 1, 5)}
    for i in range(10)
]
JUDGED = [
    {"prompt": row["prompt"], "completion": row["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
    for i, row in enumerate(PAIRS)
]
PROMPTS = [{"prompt": row["prompt"]} for row in PAIRS]


def longer_is_better(completions, **_):
    return [len(text) / 10 for text in completions]


def many_words(completions, **_):
    return [float(text.count(" ")) for text in completions]


# keywords of TRL 0.9 to 1.8 that 1.15 and 1.16 have no more, of the config and of the trainer
GONE = {
    "SFT": "chars_per_token dataset_batch_size infinite num_of_sequences use_liger max_seq_length neftune_noise_alpha packing eval_packing",
    "DPO": "base_model_attribute_name force_use_ref_model generate_during_eval is_encoder_decoder label_pad_token_id max_completion_length max_prompt_length max_target_length model_adapter_name model_init optimizer_cls_and_kwargs padding_value preprocess_logits_for_metrics ref_adapter_name ref_model_init_kwargs reference_free rpo_alpha tools use_liger_loss use_logits_to_keep use_num_logits_to_keep beta loss_type",
    "ORPO": "label_pad_token_id max_prompt_length truncation_mode",
    "KTO": "base_model_attribute_name embedding_func embedding_tokenizer generate_during_eval is_encoder_decoder label_pad_token_id max_completion_length max_density_ratio max_prompt_length min_density_ratio model_adapter_name model_init padding_value preprocess_logits_for_metrics prompt_sample_size ref_adapter_name ref_model_init_kwargs truncation_mode use_liger_loss",
    "CPO": "label_pad_token_id max_prompt_length max_target_length padding_value truncation_mode",
    "GRPO": "max_prompt_length use_liger_loss vllm_device vllm_dtype vllm_enable_prefix_caching vllm_guided_decoding_regex vllm_max_model_len wandb_log_unique_prompts",
    "RLOO": "base_model batch_size cliprange cliprange_value config data_collator dataset_num_proc exp_name gamma kl_coef lam local_batch_size local_mini_batch_size local_rollout_forward_batch_size max_prompt_length micro_batch_size mini_batch_size missing_eos_penalty non_eos_penalty normalize_advantage normalize_reward num_mini_batches num_ppo_epochs num_sample_generations num_total_batches num_updates penalty_reward_value policy ref_policy response_length reward_model reward_model_path rloo_k sanity_check sft_model_path stop_token stop_token_id token_level_kl total_episodes vf_coef vllm_guided_decoding_regex wandb_log_unique_prompts whiten_rewards world_size",
    "Reward": "model_init max_length",
}  # fmt: skip
TRANSFORMERS_4 = (
    "jit_mode_eval use_ipex fp16_opt_level half_precision_backend tpu_num_cores tpu_metrics_debug past_index fsdp_min_num_params "
    "fsdp_transformer_layer_cls_to_wrap adafactor group_by_length use_legacy_prediction_loop include_inputs_for_metrics fp16_backend "
    "evaluation_strategy push_to_hub_model_id push_to_hub_organization push_to_hub_token mp_parameters torchdynamo ray_scope "
    "dispatch_batches split_batches include_tokens_per_second overwrite_output_dir per_gpu_train_batch_size no_cuda use_mps_device "
    "per_gpu_eval_batch_size warmup_ratio logging_dir save_safetensors"
)

ANSWERS = {"num_generations": 2, "max_completion_length": 6, "temperature": 1.0, "beta": 0.1}
# trainer -> rows, what scripts write in the config, and what older ones write on the trainer
CASES = {
    "DPO": (PAIRS, {}, {"beta": 0.2, "max_length": 64}),
    "ORPO": (PAIRS, {"beta": 0.2, "max_length": 64}, {}),
    "KTO": (JUDGED, {"beta": 0.2, "max_length": 64, "evaluation_strategy": "no"}, {}),
    "GRPO": (PROMPTS, ANSWERS, {"reward_funcs": [longer_is_better, many_words]}),
    "RLOO": (PROMPTS, ANSWERS, {"reward_funcs": longer_is_better}),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A tiny model's folder, and an adapter on it whose B is not zero."""
    folder = write_tiny_model(tmp_path_factory.mktemp("model"))
    model, _ = load_model(
        str(folder), dtype="float32", device_map="cpu", load_in_4bit=False, max_seq_length=128
    )
    model = attach_lora(model, r=4, lora_alpha=8)
    for i, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(i))
    adapter = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(adapter)
    return folder, adapter


def losses(method, model, tokenizer, output):
    rows, config, keywords = CASES[method]
    arguments = getattr(oribi.trl, f"{method}Config")(output_dir=str(output), **SETTINGS, **config)
    trainer = getattr(oribi.trl, f"{method}Trainer")(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), tokenizer=tokenizer, **keywords
    )
    trainer.train()
    return [(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e]


@NEEDS_DRIVER
@pytest.mark.parametrize(
    ("method", "table", "tied"),
    [
        pytest.param(
            method, table, tied, marks=() if method == "DPO" or table == "lm_head" else pytest.mark.long
        )
        for method in ("DPO", "ORPO", "KTO", "GRPO")
        for table, tied in (("lm_head", False), ("embed_tokens", False), ("embed_tokens", True))
    ],
)
def test_tables_trained_whole_are_trained_as_in_transformers_and_peft(method, table, tied, tmp_path):
    folder = write_tiny_model(tmp_path / "model", tie_word_embeddings=tied)
    model, tokenizer = load_model(
        str(folder), dtype="float32", device_map="cpu", load_in_4bit=False, max_seq_length=128
    )
    adapter = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "modules_to_save": [table]}
    model = attach_lora(model, **adapter)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    settings = LoraConfig(**adapter, task_type="CAUSAL_LM", ensure_weight_tying=tied)
    plain = get_peft_model(base, settings)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(start[name])
    ours = losses(method, model, tokenizer, tmp_path / "ours")
    theirs = losses(method, plain, tokenizer, tmp_path / "theirs")
    assert ours == [pytest.approx(pair, rel=1e-3, abs=1e-4) for pair in theirs]
    trained = {name: p for name, p in model.named_parameters() if name in start and table in name}
    assert trained
    assert all(not torch.equal(p, start[name]) for name, p in trained.items())


@NEEDS_DRIVER
@pytest.mark.parametrize("method", CASES)
def test_losses_equal_those_of_transformers_and_peft(method, start, tmp_path):
    folder, adapter = start
    model, tokenizer = load_model(
        str(adapter), dtype="float32", device_map=DEVICE, load_in_4bit=False, max_seq_length=128
    )
    ours = losses(method, model, tokenizer, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").to(DEVICE)
    theirs = losses(method, PeftModel.from_pretrained(base, adapter, is_trainable=True), tokenizer, tmp_path)
    assert len(ours) == STEPS
    assert any(norm > 1e-3 for _, norm in ours)
    assert [loss for loss, _ in ours] == pytest.approx([loss for loss, _ in theirs], abs=1e-4)
    assert [norm for _, norm in ours] == pytest.approx([norm for _, norm in theirs], rel=1e-3, abs=1e-4)


class TestKeywordsOfEarlierReleases:
    def config(self, method="DPO", **keywords):
        return getattr(oribi.trl, f"{method}Config")(
            output_dir="unused", report_to="none", use_cpu=True, bf16=False, **keywords
        )

    def test_older_names_are_read_as_todays_and_said(self, capsys):
        args = self.config("GRPO", warmup_ratio=0.1, evaluation_strategy="no", max_new_tokens=7)
        assert (args.warmup_steps, args.eval_strategy, args.max_completion_length) == (0.1, "no", 7)
        said = capsys.readouterr().out
        assert "warmup_ratio read as warmup_steps = 0.1" in said
        assert "max_new_tokens read as max_completion_length = 7" in said

    def test_steps_of_warm_up_win_over_their_share(self):
        assert self.config(warmup_ratio=0.1, warmup_steps=5).warmup_steps == 5

    def test_a_keyword_without_counterpart_is_said(self, capsys):
        self.config(logging_dir="logs", label_pad_token_id=-100)
        assert "logging_dir has no effect" in capsys.readouterr().out

    def test_a_keyword_that_changes_the_training_is_refused(self):
        with pytest.raises(ConfigError, match="rpo_alpha = 1.0 .*loss_weights"):
            self.config(rpo_alpha=1.0)
        assert self.config(rpo_alpha=None).beta == 0.1

    def test_an_unknown_keyword_names_the_nearest(self):
        with pytest.raises(ConfigError, match="unknown keyword learning_rat; did you mean learning_rate?"):
            self.config(learning_rat=1e-3)

    def test_two_names_of_one_setting_must_agree(self):
        with pytest.raises(ConfigError, match="max_seq_length and max_length"):
            self.config(max_length=64, max_seq_length=128)

    def test_one_prompt_per_batch_is_raised_to_a_group_of_answers(self, capsys):
        args = self.config("GRPO", per_device_train_batch_size=1, num_generations=4)
        assert args.per_device_train_batch_size == 4
        assert "per_device_train_batch_size = 1 read as 4" in capsys.readouterr().out

    def test_batches_that_hold_whole_groups_stay(self):
        args = self.config(
            "GRPO", per_device_train_batch_size=1, gradient_accumulation_steps=4, num_generations=4
        )
        assert args.per_device_train_batch_size == 1

    def test_sampling_parameters_of_an_engine_are_read(self):
        class SamplingParams:
            temperature, top_p, top_k, min_p, stop = 0.7, 0.9, 20, 0.1, ["<end>"]

        args = self.config("GRPO", vllm_sampling_params=SamplingParams(), top_p=0.5, num_generations=2)
        assert (args.temperature, args.top_p, args.top_k, args.min_p) == (0.7, 0.5, 20, 0.1)
        assert args.generation_kwargs == {"stop_strings": ["<end>"]}

    def test_training_arguments_and_pickles_of_them(self):
        args = oribi.trl.TrainingArguments("unused", warmup_ratio=0.5, use_cpu=True, report_to="none")
        assert isinstance(args, TrainingArguments)
        assert pickle.loads(pickle.dumps(args)).warmup_steps == 0.5

    def test_a_prompt_above_max_prompt_length_is_left_out_and_said(self, start, tmp_path, capsys):
        model, tokenizer = load_model(str(start[1]), dtype="float32", load_in_4bit=False, max_seq_length=128)
        rows = Dataset.from_list([*PAIRS, {**PAIRS[0], "prompt": words(0, 60)}])
        trainer = oribi.trl.DPOTrainer(
            model, None, train_dataset=rows, tokenizer=tokenizer, max_prompt_length=40,
            args=oribi.trl.DPOConfig(str(tmp_path), report_to="none", use_cpu=True),
        )  # fmt: skip
        assert len(trainer.train_dataset) == len(PAIRS)
        assert "1 of 11 rows have a prompt above max_prompt_length = 40" in capsys.readouterr().out


class TestOnOribisModels:
    @pytest.fixture
    def loaded(self, start):
        return load_model(str(start[1]), dtype="float32", load_in_4bit=False, max_seq_length=128)

    def settings(self, tmp_path, name="SFTConfig", **more):
        return getattr(oribi.trl, name)(
            str(tmp_path), **{k: v for k, v in SETTINGS.items() if k != "bf16"} | {"max_steps": 1} | more
        )

    def test_a_second_trainer_takes_its_own_reference(self, loaded, tmp_path):
        model, tokenizer = loaded
        for _ in range(2):
            args = self.settings(tmp_path, "DPOConfig")
            oribi.trl.DPOTrainer(
                model, args=args, train_dataset=Dataset.from_list(PAIRS), tokenizer=tokenizer
            )
        assert sorted(model.peft_config) == ["default", "ref"]
        assert model.active_adapter == "default"

    def test_transformers_own_trainer_logs_the_evaluation(self, loaded, tmp_path):
        model, tokenizer = loaded
        rows = [dict(tokenizer(row["prompt"])) for row in PAIRS[:4]]
        args = self.settings(tmp_path, "TrainingArguments", evaluation_strategy="steps", eval_steps=1)
        pad = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        trainer = oribi.trl.Trainer(
            model, args, pad, Dataset.from_list(rows), Dataset.from_list(rows), tokenizer=tokenizer
        )
        trainer.train()
        assert any(entry.get("eval_loss", 0) > 1 for entry in trainer.state.log_history)

    @pytest.mark.parametrize("name", ["fp16_full_eval", "bf16_full_eval"])
    def test_an_evaluation_leaves_the_adapter_as_it_is(self, loaded, tmp_path, name):
        model, tokenizer = loaded
        rows = Dataset.from_list([{"text": row["prompt"]} for row in PAIRS])
        args = self.settings(tmp_path, **{name: True})
        trainer = oribi.trl.SFTTrainer(model, args, None, rows, rows, tokenizer=tokenizer)
        trainer.train()
        trainer.evaluate()
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}

    def test_settings_of_the_trainer_become_those_of_its_config(self, loaded, tmp_path, capsys):
        model, tokenizer = loaded
        rows = Dataset.from_list([{"text": row["prompt"]} for row in PAIRS])
        trainer = oribi.trl.SFTTrainer(
            model, self.settings(tmp_path, use_liger=True), train_dataset=rows, tokenizer=tokenizer, infinite=True,
            dataset_text_field="text", max_seq_length=32, eval_packing=False,
        )  # fmt: skip
        assert (trainer.args.max_length, trainer.args.eval_packing, trainer.args.use_liger_kernel) == (
            32,
            False,
            False,
        )
        said = capsys.readouterr().out
        assert "infinite has no effect" in said
        assert "use_liger_kernel has no effect" in said

    def test_rows_of_ids_alone_are_trained_whole(self, loaded, tmp_path, capsys):
        model, tokenizer = loaded
        rows = Dataset.from_list([dict(tokenizer(row["prompt"])) for row in PAIRS])
        args = self.settings(tmp_path, dataset_kwargs={"skip_prepare_dataset": True})
        oribi.trl.SFTTrainer(model, args, train_dataset=rows, tokenizer=tokenizer).train()
        assert "skip_prepare_dataset has no effect" in capsys.readouterr().out


class TestPrompts:
    def test_the_column_that_a_template_reads_is_given_to_it(self, start, capsys):
        _, tokenizer = load_model(str(start[1]), dtype="float32", load_in_4bit=False)
        rows = Dataset.from_list([{"prompt": "a", "reasoning_effort": "low", "thinking": True}] * 3)
        assert template_columns(rows, tokenizer, "GRPOTrainer") is None
        tokenizer.chat_template += "{{ reasoning_effort }}"
        assert template_columns(rows, tokenizer, "GRPOTrainer") == {"reasoning_effort": "low"}
        assert "prompts are rendered with reasoning_effort = 'low'" in capsys.readouterr().out
        other = Dataset.from_list([{"prompt": "a", "reasoning_effort": effort} for effort in ("low", "high")])
        with pytest.raises(ConfigError, match="rows differ in reasoning_effort .'low', 'high'."):
            template_columns(other, tokenizer, "GRPOTrainer")

    def test_rows_of_which_none_is_short_enough_are_an_error(self, start):
        _, tokenizer = load_model(str(start[1]), dtype="float32", load_in_4bit=False)
        with pytest.raises(
            ConfigError, match="10 of 10 rows have a prompt above max_prompt_length = 2; raise it"
        ):
            short_prompts(Dataset.from_list(PAIRS), tokenizer, 2, "GRPOTrainer: train_dataset")


class TestNames:
    @pytest.mark.parametrize("method", GONE)
    def test_every_keyword_that_a_config_or_trainer_had_has_its_fate(self, method):
        known = {f.name for f in fields(getattr(oribi.trl, f"{method}Config"))}
        taken = trainer_keywords(f"{method}Trainer")
        for keyword in [*GONE[method].split(), *TRANSFORMERS_4.split()]:
            assert keyword in taken or fate_of(keyword, known).kind != "unknown", keyword

    def test_a_helper_that_moved_is_found_and_one_that_is_gone_says_what_to_do(self):
        assert oribi.trl.DPODataCollatorWithPadding.__module__ == "trl.experimental.utils"
        with pytest.raises(AttributeError, match="train_on_responses_only"):
            oribi.trl.DataCollatorForCompletionOnlyLM  # noqa: B018

    def test_sft_is_oribis(self):
        from oribi import SFTConfig, SFTTrainer

        assert issubclass(oribi.trl.SFTTrainer, SFTTrainer)
        assert issubclass(oribi.trl.SFTConfig, SFTConfig)

    def test_other_names_are_trls_own(self):
        import trl

        assert oribi.trl.ModelConfig is trl.ModelConfig
        assert issubclass(oribi.trl.DPOTrainer, trl.DPOTrainer)

    def test_a_trainer_that_moved_is_found(self):
        assert oribi.trl.CPOConfig.__mro__[1].__module__.startswith("trl.experimental.cpo")

    def test_a_name_that_trl_has_not_is_an_error(self):
        with pytest.raises(AttributeError, match="has no DPOTrainr; did you mean DPOTrainer?"):
            getattr(oribi.trl, "DPOTrainr")  # noqa: B009
