"""STEP 4: rows to token ids and exact labels, packs and batches. Knows no model and no kernel."""

from importlib import import_module
from typing import Any

_HOME = {
    "prepare_dataset": "oribi.data.prepare",
    "PreparedData": "oribi.data.prepare",
    "DataReport": "oribi.data.report",
    "pack": "oribi.data.packing",
    "best_fit": "oribi.data.packing",
    "PackCollator": "oribi.data.collate",
    "PaddedCollator": "oribi.data.collate",
    "get_chat_template": "oribi.chat.named_templates",
    "standardize_data_formats": "oribi.data.reshape",
    "standardize_sharegpt": "oribi.data.reshape",
    "to_sharegpt": "oribi.data.reshape",
    "apply_chat_template": "oribi.data.reshape",
    "train_on_responses_only": "oribi.compat.responses_only",
    "inspect_data": "oribi.data.inspect",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(
            f"module 'oribi.data' has no attribute {name!r}; it has {', '.join(sorted(_HOME))}"
        )
    return getattr(import_module(_HOME[name]), name)
