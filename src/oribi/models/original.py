"""The model that a repository repacks: what to load where its own files cannot be trained on."""

import re
from pathlib import Path

from oribi.errors import ModelError
from oribi.tensors import open_bytes

_LARGEST_CARD = 1 << 20  # bytes
_BASE_MODEL = re.compile(
    r"^base_model:[ \t]*(?:\n[ \t]*-)?[ \t]*[\"']?([\w.-]+/[\w.-]+)[\"']?[ \t]*$", re.MULTILINE
)
# what repositories that repack a model put behind its name
_REPACKED = re.compile(
    r"(-unsloth)?(-bnb-4bit|-GGUF|-FP8(-\w+)?|-NVFP4|-AWQ|-GPTQ(-\w+)?|-\d+bit)$", re.IGNORECASE
)


def original_of(name: str, directory: Path) -> str | None:
    """The name of the 16-bit model that a repository or folder repacks, by its card's `base_model` or else its own name.

    Args:
        name: as the user calls it.
        directory: of its files.
    """
    card = directory / "README.md"
    if card.is_file():
        try:
            with open_bytes(card) as file:
                head = file.read(_LARGEST_CARD).decode("utf-8", "replace")
        except (ModelError, OSError):
            head = ""
        parts = head.split("---", 2)
        found = _BASE_MODEL.search(parts[1]) if len(parts) == 3 else None
        if found is not None and found[1] != name:
            return found[1]
    bare = _REPACKED.sub("", name)
    return bare if bare != name else None


def load_original(name: str, directory: Path) -> str:
    """What a message says to load instead; arguments as of `original_of`."""
    found = original_of(name, directory)
    return f"Load the 16-bit original instead: {found}" if found else "Take the original 16-bit release"
