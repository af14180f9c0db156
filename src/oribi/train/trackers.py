"""Who takes a run's figures beside log.jsonl. The callbacks are transformers' own; here is asked whether they can run."""

from collections.abc import Sequence
from importlib.util import find_spec

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from oribi.errors import ConfigError

# packages of which one has to be there, where the tracker's name alone does not say it
PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "azure_ml": ("azureml",), "flyte": ("flytekit",),
            "kubeflow": ("kubernetes",)}  # fmt: skip


def require_trackers(names: str | Sequence[str] | None) -> None:
    """Find what is wrong with `report_to` before anything is loaded.

    Args:
        names: trackers; "none" and "all" (of those that are installed) stand alone.

    Raises:
        ConfigError: a tracker is unknown, or its package is not installed.
    """
    names = [names] if isinstance(names, str) else list(names or [])
    if names in (["none"], ["all"]):
        return
    known = sorted(INTEGRATION_TO_CALLBACK)
    for name in names:
        if name not in known:
            raise ConfigError(f"report_to = {name!r}; it can be none, all, or some of {', '.join(known)}")
        packages = PACKAGES.get(name, (name,))
        if not any(find_spec(package) for package in packages):
            raise ConfigError(
                f"report_to = {name!r}: the package is not installed; pip install {packages[0]}, or leave it out: "
                "log.jsonl has every figure, too"
            )
