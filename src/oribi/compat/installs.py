"""Lines of a notebook that install packages: those that would replace what oribi runs on are taken out.

A notebook for Unsloth pins releases of transformers, TRL and others that oribi is newer than; running such a line again would
break the environment that the copy runs in.
"""

import re
from collections.abc import Iterator

from oribi.compat.blocks import Block

# what oribi runs on in a release that it was installed with, and what takes its place or pulls in another release of it
_KEPT = {
    "unsloth", "unsloth-zoo", "vllm", "torch", "torchvision", "torchaudio", "triton", "xformers", "flash-attn", "transformers",
    "trl", "peft", "accelerate", "bitsandbytes", "datasets", "huggingface-hub", "tokenizers", "safetensors", "numpy", "pillow",
    "cut-cross-entropy", "kernels", "liger-kernel",
}  # fmt: skip
_PIP = re.compile(r"\bpip3?\s+(un)?install\b|\buv\s+(pip\s+install|add)\b")
# options that are followed by a value
_VALUED = {"-r", "--requirement", "-c", "--constraint", "-i", "--index-url", "--extra-index-url", "-f", "--find-links", "-t",
           "--target", "--python", "--torch-backend", "--index-strategy", "--prefix", "--platform"}  # fmt: skip
_QUOTED = re.compile(r"\"[^\"]*\"|'[^']*'|\S+")


def without_pins(block: Block) -> Iterator[str]:
    """Take what oribi runs on out of a block's installations.

    Returns:
        One sentence per line that changed, beginning with its place.
    """
    for first, last in _commands(block):
        start, end = block.starts[first - 1], block.starts[last]
        text = block.text[start:end]
        found = _PIP.search(text)
        if found is None or (block.kind == "shell" and text.lstrip().startswith("#")):
            continue
        # an assignment's result may be read later
        if block.kind == "python" and not text.lstrip().startswith(("!", "%")):
            continue
        packages, kept = _packages(text, found.end())
        taken = [package for package in packages if _is_kept(package[0])]
        if not taken:
            continue
        names = ", ".join(dict.fromkeys(name for name, *_ in taken))
        # a name in braces is a package of an earlier line, mostly a pinned one
        others = [p for p in packages if p not in taken and not p[0].startswith("{")]
        if (others or kept) and not re.search(r"&&|\|\||[;|]|\bun\w*install\b", text):
            for name, a, b in packages:
                if (name, a, b) not in others:
                    block.edit(start + a, start + b, "")
            what = f"{names} left out of pip install"
        else:
            _switch_off(block, first, last)
            what = f"pip install of {names} switched off"
        yield f"{block.at(first)}: {what}: oribi runs with the releases that it was installed with"


def _commands(block: Block) -> Iterator[tuple[int, int]]:
    """First and last line of each command for the shell or for IPython."""
    numbers = block.commands if block.kind == "python" else range(2, len(block.lines) + 1)
    numbers = sorted(numbers) if block.kind in ("python", "shell") else []
    first = None
    for number in numbers:
        first = first or number
        if not block.lines[number - 1].rstrip().endswith("\\") or number == len(block.lines):
            yield first, number
            first = None


def _packages(text: str, at: int) -> tuple[list[tuple[str, int, int]], bool]:
    """What a command installs: names with their characters and the space before; and whether a file says more."""
    comment = re.search(r"\s#", text[at:])
    end = len(text) if comment is None else at + comment.start()
    packages, kept, skip = [], False, False
    for token in _QUOTED.finditer(text, at, end):
        word = token[0].strip("\"'")
        if skip or word == "\\":
            skip = False
        elif word.startswith("-"):
            skip = word in _VALUED
            kept |= word in ("-r", "--requirement", "-e", "--editable")
        else:
            space = len(text[: token.start()]) - len(text[: token.start()].rstrip(" \t"))
            packages.append((_name(word), token.start() - space, token.end()))
    return packages, kept


def _name(word: str) -> str:
    """The package's name in a requirement, a URL or a place of git's."""
    name, at, _ = word.partition("@")
    if "/" in (name if at else word) and ("://" in word or word.startswith("git+")):
        name = re.sub(r"(\.git)?(@.*)?$", "", word.split("#")[0].rstrip("/")).rsplit("/", 1)[-1]
    bare = re.match(r"[\w.-]+", name.strip())
    return word if bare is None else re.sub(r"[-_.]+", "-", bare[0]).lower()


def _is_kept(name: str) -> bool:
    return name in _KEPT or name.startswith("torch-")


def _switch_off(block: Block, first: int, last: int) -> None:
    """Make a comment of a command's lines, behind a statement without effect."""
    for number in range(first, last + 1):
        line = block.lines[number - 1]
        at = block.starts[number - 1] + len(line) - len(line.lstrip())
        nothing = "true" if block.kind == "shell" else "pass"
        block.edit(at, at, f"{nothing}  # " if number == first else "# ")
