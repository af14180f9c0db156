"""oribi: QLoRA fine-tuning of language models.

Public names are imported when first used, so `import oribi` costs milliseconds and touches nothing else.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "FastLanguageModel": "oribi.compat.language_model",
    "FastModel": "oribi.compat.language_model",
    "FastSentenceTransformer": "oribi.compat.embeddings",
    "add_new_tokens": "oribi.lora.tokens",
    "prepare_dataset": "oribi.data.prepare",
    "inspect_data": "oribi.data.view",
    "get_chat_template": "oribi.chat.named_templates",
    "standardize_data_formats": "oribi.compat.reshape",
    "standardize_sharegpt": "oribi.compat.reshape",
    "to_sharegpt": "oribi.compat.reshape",
    "apply_chat_template": "oribi.compat.reshape",
    "train_on_responses_only": "oribi.compat.responses_only",
    "execute_with_time_limit": "oribi.compat.untrusted",
    "check_python_modules": "oribi.compat.untrusted",
    "create_locked_down_function": "oribi.compat.untrusted",
    "SFTConfig": "oribi.trl",
    "SFTTrainer": "oribi.train.trainer",
    "save_merged": "oribi.save",
    "save_gguf": "oribi.save",
    "push_merged": "oribi.save",
    "push_gguf": "oribi.save",
    "print_quantization_methods": "oribi.save",
    "is_bfloat16_supported": "oribi.environment",
    "is_bf16_supported": "oribi.environment",
    "OribiError": "oribi.errors",
    "ConfigError": "oribi.errors",
    "DataError": "oribi.errors",
    "ModelError": "oribi.errors",
    "ExportError": "oribi.errors",
    "TrainingError": "oribi.errors",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    from oribi.quiet import without_advice

    with without_advice():
        return _imported(name)


def _imported(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if not name.startswith("_"):
        from oribi.compat.names import NAMES, PLACES

        if name in PLACES:
            return import_module(f"oribi.{name}")
        if name in NAMES and NAMES[name].home:
            return getattr(import_module(NAMES[name].home), name)
        if name in NAMES:
            raise ImportError(f"oribi has no {name}: {NAMES[name].note}")
    raise AttributeError(f"module 'oribi' has no attribute {name!r}; it has {', '.join(sorted(_HOME))}")


def __dir__() -> list[str]:
    return sorted(__all__)
