"""What editors and type checkers read of oribi's lazy names; a test compares it with `__init__.py`."""

from typing import Any

from oribi.chat.named_templates import get_chat_template
from oribi.compat.embeddings import FastSentenceTransformer
from oribi.compat.language_model import FastLanguageModel, FastModel
from oribi.compat.reshape import (
    apply_chat_template,
    standardize_data_formats,
    standardize_sharegpt,
    to_sharegpt,
)
from oribi.compat.responses_only import train_on_responses_only
from oribi.compat.untrusted import (
    check_python_modules,
    create_locked_down_function,
    execute_with_time_limit,
)
from oribi.data.prepare import prepare_dataset
from oribi.data.view import inspect_data
from oribi.environment import is_bf16_supported, is_bfloat16_supported
from oribi.errors import ConfigError, DataError, ExportError, ModelError, OribiError, TrainingError
from oribi.gguf.mixes import print_quantization_methods
from oribi.lora.tokens import add_new_tokens
from oribi.save.gguf import push_gguf, save_gguf
from oribi.save.merged import push_merged, save_merged
from oribi.train.trainer import SFTTrainer
from oribi.trl import SFTConfig

__version__: str

__all__ = [
    "__version__",
    "FastLanguageModel",
    "FastModel",
    "FastSentenceTransformer",
    "add_new_tokens",
    "prepare_dataset",
    "inspect_data",
    "get_chat_template",
    "standardize_data_formats",
    "standardize_sharegpt",
    "to_sharegpt",
    "apply_chat_template",
    "train_on_responses_only",
    "execute_with_time_limit",
    "check_python_modules",
    "create_locked_down_function",
    "SFTConfig",
    "SFTTrainer",
    "save_merged",
    "save_gguf",
    "push_merged",
    "push_gguf",
    "print_quantization_methods",
    "is_bfloat16_supported",
    "is_bf16_supported",
    "OribiError",
    "ConfigError",
    "DataError",
    "ModelError",
    "ExportError",
    "TrainingError",
]

# further names of Unsloth's: oribi.compat.names
def __getattr__(name: str) -> Any: ...
