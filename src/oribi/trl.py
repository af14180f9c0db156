"""TRL's names for scripts that fine-tune: `from oribi.trl import DPOConfig, DPOTrainer`.

`SFTTrainer` and `SFTConfig` are oribi's. Every other trainer and config is TRL's own class behind a subclass that only translates
the keywords of earlier releases; any other name is TRL's object itself. Importing this module imports and changes nothing of TRL.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("__") and name != "__version__":
        raise AttributeError(f"module 'oribi.trl' has no attribute {name!r}")
    from oribi.quiet import without_advice

    with without_advice():
        from oribi.compat.trl import trl_name

        value = globals()[name] = trl_name(name)  # one class per name, which pickled arguments find again
    return value
