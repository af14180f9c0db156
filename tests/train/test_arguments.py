"""No argument of a training is passed over: each is read by what trains, refused, or named."""

import sys
from dataclasses import fields
from typing import Any

import pytest
import torch

import oribi
from oribi.errors import ConfigError
from oribi.train.arguments import SFTConfig
from oribi.train.optimizer_settings import require_optimizer
from oribi.train.setup import NOT_HONOURED, NOT_USED
from oribi.train.trainer import SFTTrainer

# what a training on one CPU does not ask for, and who does
READ_ELSEWHERE = {
    **dict.fromkeys(("do_train", "do_eval", "do_predict", "resume_from_checkpoint", "local_rank"), "scripts"),
    **dict.fromkeys(("ddp_backend", "ddp_timeout", "use_cpu", "tf32", "log_level", "log_level_replica", "log_on_each_node",
                     "save_on_each_node", "deepspeed", "fsdp_config"), "TrainingArguments, of its process"),
    **dict.fromkeys(("hub_always_push", "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy", "hub_token"),
                    "push_to_hub"),
    **dict.fromkeys(("project", "run_name", "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id"), "trackers"),
    **dict.fromkeys(("gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
                    "checkpointing that is on"),
    "length_column_name": "rows grouped by length", "prediction_loss_only": "an evaluation with compute_metrics",
    "trust_remote_code": "a model that is given by its name",
}  # fmt: skip
# code that copies or shows all fields, and uses none
COPIES = ("training_args.py", "dataclasses.py", "copy.py", "train/arguments.py")
SHOWS = ("to_dict", "to_sanitized_dict", "to_json_string")
READ: set[str] = set()


class Watched(SFTConfig):
    """Notes which of its fields are asked for."""

    def __getattribute__(self, name: str) -> Any:
        code = sys._getframe(1).f_code
        if not code.co_filename.endswith(COPIES) and code.co_name not in SHOWS:
            READ.add(name)
        return super().__getattribute__(name)


@pytest.mark.long
def test_every_argument_is_read_refused_or_named(load, conversations, tmp_path):
    model, tokenizer = load()
    args = Watched(
        output_dir=str(tmp_path), max_steps=4, save_steps=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        gradient_accumulation_steps=1, report_to="tensorboard", disable_tqdm=True,
    )  # fmt: skip
    READ.clear()
    trainer = SFTTrainer(
        model,
        args,
        train_dataset=conversations,
        eval_dataset=conversations.select(range(6)),
        tokenizer=tokenizer,
    )
    trainer.train()
    trainer.train(resume_from_checkpoint=True)
    # those that a transformers release has no field for are not asked for
    unread = {one.name for one in fields(SFTConfig)} - READ
    assert unread <= {*READ_ELSEWHERE, *NOT_HONOURED, *NOT_USED}
    assert {*READ_ELSEWHERE, *NOT_HONOURED, *NOT_USED} <= {one.name for one in fields(SFTConfig)} | {
        "local_rank"
    }


def test_what_is_not_used_is_said_once(load, conversations, tmp_path, capsys):
    model, tokenizer = load()
    args = SFTConfig(output_dir=str(tmp_path), ddp_bucket_cap_mb=25, disable_tqdm=True)
    SFTTrainer(model, args, train_dataset=conversations, tokenizer=tokenizer)
    assert "ddp_bucket_cap_mb has no effect: processes exchange gradients" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "adamw_8bit", "optim_args": "momentum=0.9"}, "optim = adamw_8bit does not take it"),
        ({"optim": "adamw_torch", "optim_args": "betas=0.9"}, "betas = '0.9': optim = adamw_torch does not take it"),
        ({"optim": "sgd", "optim_args": "momentum=0.9,weight_decay=0.1"}, "weight_decay = '0.1': optim = sgd"),
        ({"optim": "sgd", "optim_args": "momentum=much"}, "could not convert"),
        ({"optim": "sgd", "optim_args": "momentum=-1"}, "Invalid momentum value"),
        ({"optim": "sgd", "adam_beta1": 0.8}, "adam_beta1 = 0.8: optim = sgd does not use it"),
        ({"optim": "lion_32bit", "adam_epsilon": 1e-6}, "adam_epsilon = 1e-06: optim = lion_32bit"),
        ({"optim": "grokadamw"}, "optim = grokadamw.*install"),
    ],
)  # fmt: skip
def test_settings_that_an_optimizer_does_not_take_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        SFTConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"optim": "sgd", "optim_args": {"momentum": 0.9, "nesterov": True}},
        {"optim": "ademamix", "optim_args": "alpha=5.0, beta3=0.999"},
        {"optim": "adagrad", "optim_args": "lr_decay=0.0"},
        {"optim": "lion_32bit", "adam_beta1": 0.8},
        {"optim": "adamw_8bit", "adam_beta2": 0.95},
    ],
)
def test_settings_that_an_optimizer_takes_are_taken(settings):
    args = SFTConfig(**settings)
    require_optimizer(args)
    kind, options = SFTTrainer.get_optimizer_cls_and_kwargs(args)
    made = kind([torch.nn.Parameter(torch.zeros(1))], **options)
    given = settings.get("optim_args")
    for name, value in given.items() if isinstance(given, dict) else ():
        assert made.defaults[name] == value


def test_older_names_are_read_by_the_public_config_alone():
    args = oribi.SFTConfig(evaluation_strategy="steps", eval_steps=2, max_seq_length=64, warmup_ratio=0.1)
    assert (args.eval_strategy, args.max_length, args.get_warmup_steps(50)) == ("steps", 64, 5)
    assert isinstance(args, SFTConfig)
    with pytest.raises(TypeError):
        SFTConfig(max_seq_length=64)
