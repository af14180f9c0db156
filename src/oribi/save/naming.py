"""What an exported model is called."""

import os
import re

from torch import nn

from oribi.errors import ConfigError
from oribi.models.unwrap import source_of


def base_name(model: nn.Module) -> str:
    """Name or path that the model was loaded by; "" if it was made from a config."""
    source = source_of(model)
    return str(
        source.name_or_path if source is not None else getattr(model.config, "_name_or_path", "") or ""
    )


def model_name(model: nn.Module) -> str:
    """A name for files: the last part of the name or path that the model was loaded by."""
    stem = os.path.basename(base_name(model).rstrip("/")).removesuffix(".gguf")
    stem = re.sub(r"\.(I?Q\d\w*|F16|F32|BF16)$", "", stem, flags=re.IGNORECASE)
    return re.sub(r"[^\w.-]+", "-", stem.removesuffix("-bnb-4bit")) or "model"


def file_name(name: str) -> str:
    """A name that a caller gives to files, as it is.

    Raises:
        ConfigError: it is empty, has a folder in it, or a character that shells and file systems do not take well.
    """
    if not re.fullmatch(r"[\w(+][\w .()+@-]*", name):
        raise ConfigError(
            f"name = {name!r}; expected a name for files: letters, digits, spaces and . - _ + @ ( ), without a folder"
        )
    return name
