"""A run's settings as the arguments of the calls that take them: the adapter's and the trainer's."""

from pathlib import Path
from typing import Any

from oribi.config import RunConfig
from oribi.errors import ConfigError
from oribi.gguf.mixes import mix_of
from oribi.lora.starts import packed_settings
from oribi.lora.targets import is_tied
from oribi.text import did_you_mean
from oribi.train.arguments import SFTConfig
from oribi.train.best import saving_arguments

# settings that `SFTConfig` has under the same names
_SAME = (
    "output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "learning_rate", "embedding_learning_rate", "loraplus_lr_ratio", "lr_scheduler_type",
    "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay",
    "max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha", "seed", "fp8", "deterministic", "logging_steps", "report_to", "packing",
    "eval_steps", "early_stopping_patience", "ddp_timeout", "context_parallel",
)  # fmt: skip


def training_arguments(config: RunConfig, evaluates: bool) -> SFTConfig:
    """The trainer's part of a config, under the trainer's names.

    Args:
        config: of a supervised run. evaluates: whether it has held-out rows.
    """
    return SFTConfig(
        **{name: getattr(config, name) for name in _SAME},
        **saving_arguments(config, evaluates),
        max_length=config.max_seq_length,
        eval_packing=False,
        run_name=Path(config.output_dir).name,  # in trackers
        fsdp=True if config.fsdp else None,
        merges_codes=config.train_for in [mix_of(method).name for method in config.quantization_method],
    )


def adapter_arguments(config: RunConfig, model: Any, tokenizer: Any) -> dict[str, Any]:
    """The adapter's part of a config, as `attach_lora` takes it; what is off is left out.

    Args:
        config: of a run with an adapter. model: without it. tokenizer: the model's, with the run's new tokens.

    Raises:
        ConfigError: a token that is to be trained is not the tokenizer's.
    """
    start = {"true": True, "false": False}.get(config.init_lora_weights, config.init_lora_weights)
    further = {
        "rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern,
        "exclude_modules": config.exclude_modules, "target_parameters": config.target_parameters,
    }  # fmt: skip
    if config.trainable_tokens:
        tables = ("embed_tokens",) if is_tied(model) else ("embed_tokens", "lm_head")
        further["trainable_token_indices"] = dict.fromkeys(
            tables, token_ids(config.trainable_tokens, tokenizer)
        )
    return {
        "r": config.lora_r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": "all-linear" if config.target_modules == ["all-linear"] else config.target_modules,
        "modules_to_save": config.modules_to_save or None,
        "layers_to_transform": config.layers_to_transform,
        "finetune_last_n_layers": config.finetune_last_n_layers,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "init_lora_weights": start,
        "use_gradient_checkpointing": config.gradient_checkpointing,
        "random_state": config.seed,
        **{name: value for name, value in further.items() if value},
    }


def adapter_ranks(config: RunConfig) -> dict[str, Any]:
    """What an adapter's config will say of ranks and alphas, as far as it is known before the training."""
    asked = {"r": config.lora_r, "lora_alpha": config.lora_alpha, "use_rslora": config.use_rslora}
    if config.init_lora_weights != "eva":  # it chooses them
        asked |= {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}
    if config.load_in_4bit and config.init_lora_weights.startswith("pissa"):
        asked = packed_settings(config.init_lora_weights, asked)
    return {"lora_r": asked.pop("r"), **asked, "use_rslora": config.use_rslora or None}


def token_ids(tokens: list[str], tokenizer: Any) -> list[int]:
    """The ids of tokens by their texts.

    Raises:
        ConfigError: one of them is no single token.
    """
    vocabulary = tokenizer.get_vocab()
    unknown = [token for token in tokens if token not in vocabulary]
    if unknown:
        raise ConfigError(
            f"trainable_tokens: the tokenizer has no token {unknown[0]!r}{did_you_mean(unknown[0], vocabulary)} Tokens that it does not "
            "have yet are added by new_tokens"
        )
    return sorted({vocabulary[token] for token in tokens})
