"""Step 7: the trained model as an adapter, a merged checkpoint, or GGUF files, each checked against the trained one."""

from importlib import import_module
from typing import Any

_HOME = {
    "save_merged": "oribi.save.merged",
    "save_gguf": "oribi.save.gguf",
    "save_gguf_adapter": "oribi.save.gguf",
    "push_merged": "oribi.save.merged",
    "push_gguf": "oribi.save.gguf",
    "print_quantization_methods": "oribi.gguf.mixes",
    "ExportReport": "oribi.save.report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'oribi.save' has no attribute {name!r}; it has {', '.join(_HOME)}")
    return getattr(import_module(_HOME[name]), name)
