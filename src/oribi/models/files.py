"""Finding a model's files: a directory, a GGUF file, a training run, or a name on the Hugging Face hub."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, Literal

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from oribi.errors import ModelError
from oribi.formats.packed import PackedSource
from oribi.formats.settings import packed_format
from oribi.gguf.source import GGUFSource
from oribi.models.download import HubOptions, download, missing_folder
from oribi.models.original import load_original, original_of
from oribi.run_record import newest_model
from oribi.tensors import PickleSource, SafetensorsSource, TensorSource, open_bytes

# everything about a model but its weights
_SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.tiktoken", "vocab.txt", "merges.txt", "README.md"]
_LARGEST_JSON = 64 << 20  # bytes; an index of thousands of tensors has a few
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_OTHERS_NAME = re.compile(
    r"(?P<host>(?:https?://)?(?:hf\.co|huggingface\.co)/)?(?P<repository>\w[\w.-]*/[\w.-]+)(?::(?P<tag>[\w.-]+))?/?"
)
_PICKLES = (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


@dataclass(frozen=True)
class Location:
    """Where a model lies.

    Args:
        kind: "checkpoint" (config.json and weights), "gguf" (one file) or "adapter" (LoRA on another model).
        directory: holds the config, tokenizer and weights.
        name: what the user called it.
        file: the GGUF file.
        notes: what was decided on the way, one line each.
    """

    kind: Literal["checkpoint", "gguf", "adapter"]
    directory: Path
    name: str
    file: Path | None = None
    notes: tuple[str, ...] = ()


def locate(name: str, options: HubOptions, gguf_file: str | None = None) -> Location:
    """The files of a model, downloaded where the name is one of the hub's; weights come with `weight_files`.

    Args:
        name: a directory, a .gguf file, or owner/name on the hub.
        options: for the hub.
        gguf_file: which GGUF file of the directory or repository to take.

    Raises:
        ModelError: nothing usable is there.
    """
    try:
        path = Path(name).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, RuntimeError) as error:  # a name of 300 characters; a user's folder that is unknown
        raise ModelError(
            f"{name!r} is no possible name of a model: {getattr(error, 'strerror', None) or error}"
        ) from error
    if is_file:
        if path.suffix.lower() == ".gguf":
            return Location("gguf", path.parent, name, path)
        raise ModelError(
            f"{name} is a file but not a .gguf file; give the directory of a checkpoint or a hub name"
        )
    if is_folder:
        return _in_directory(path / options.subfolder, name, gguf_file)
    _refuse_names_of_others(name)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name:
        raise ModelError(missing_folder(name))
    patterns = [gguf_file] if gguf_file else _SMALL_FILES + ["*.py"] * options.trust_remote_code
    directory = Path(download(name, options, patterns)) / options.subfolder
    location = _in_directory(directory, name, gguf_file)
    return replace(location, name=name)


def _refuse_names_of_others(name: str) -> None:
    """Raise over a repository as Ollama and llama.cpp (owner/name:Q4_K_M) or a browser name it, with the name that is one here."""
    found = _OTHERS_NAME.fullmatch(name)
    if found is None or not (found["host"] or found["tag"]):
        return
    repository, tag = found["repository"], found["tag"]
    one = (
        f": fetch one file (hf download {repository} --include '*{tag}*.gguf' --local-dir .) and give that as model, or name it in "
        "Python with gguf_file="
    )
    raise ModelError(f"{name!r} is the name that other programs use for {repository!r}{one if tag else ''}")


def written_name(name: str) -> str:
    """A model's name for adapters to keep: `models/llama` that is a folder here must not be asked of a hub elsewhere."""
    path = Path(name)
    relative = path.exists() and not path.is_absolute() and not name.startswith((".", "~"))
    return f"./{name}" if relative else name


def weight_files(location: Location, options: HubOptions, allow_pickle: bool = False) -> list[Path]:
    """The files of a model's weights, downloaded if need be: a checkpoint's shards, or the GGUF file.

    Args:
        location: of kind "checkpoint" or "gguf".
        allow_pickle: whether PyTorch's .bin shards may be read where there is no safetensors file.

    Raises:
        ModelError: there are no weights, a shard is missing, or there are only pickles.
    """
    if location.kind == "gguf":
        return [location.file]
    directory = location.directory
    names = shard_names(directory / SAFE_WEIGHTS_INDEX_NAME)
    if names is None:
        names = ["model.safetensors"]
        _fetch(location, options, names)
        if not (directory / names[0]).is_file():
            names = sorted(
                p.name for p in directory.glob("*.safetensors") if not p.name.startswith("consolidated")
            )
    if not names:
        return _pickles(location, options, allow_pickle)
    _fetch(location, options, names)
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ModelError(
            f"{location.name}: {len(missing)} of {len(names)} shards are missing, {missing[0]} the first"
        )
    return [directory / name for name in names]


def open_weights(
    location: Location,
    options: HubOptions,
    rename: Callable[[str], str | None] = lambda name: name,
    allow_pickle: bool = False,
    any_dtype: bool = False,
) -> TensorSource:
    """The tensors of a checkpoint or a GGUF file, downloaded if need be.

    Args:
        location: of kind "checkpoint" or "gguf".
        rename: the model's name for a name in the files, None for a tensor that is left out; a GGUF file's have theirs.
        allow_pickle: as in `weight_files`.
        any_dtype: as in `SafetensorsSource`.

    Returns:
        The tensors; weights quantised for servers are read dequantised, those in NF4 as their codes.

    Raises:
        ModelError: as `weight_files`, or a file is damaged or contradicts the others, or quantised weights lack a part.
    """
    if location.kind == "gguf":
        return GGUFSource(location.file)
    files = weight_files(location, options, allow_pickle)
    packed = packed_format(stored_settings(location.directory))
    if files[0].suffix == ".bin":
        if packed is not None:
            raise ModelError(
                f"{location.name}: weights quantised by {packed.name} are read from .safetensors files alone"
            )
        return PickleSource(files, rename)
    index = _weight_map(location.directory / SAFE_WEIGHTS_INDEX_NAME) or {}
    homes = {name: location.directory / shard for name, shard in index.items()}
    if packed is None:
        return SafetensorsSource(files, rename, homes, any_dtype)
    try:
        return PackedSource(
            SafetensorsSource(files, shard_of=homes, any_dtype=True), packed, rename, any_dtype
        )
    except ModelError as error:
        raise ModelError(
            f"{location.name}: {error}. {load_original(location.name, location.directory)}"
        ) from error


def stored_settings(directory: Path) -> dict[str, Any] | None:
    """quantization_config of a checkpoint's config.json, or of its text model's there; None where weights are floats."""
    file = directory / "config.json"
    settings = read_json(file) if file.is_file() else {}
    text = settings.get("text_config")
    for part in (settings, text if isinstance(text, dict) else {}):
        for name in (
            "quantization_config",
            "compression_config",
        ):  # the second is compressed-tensors' older name
            if isinstance(part.get(name), dict):
                return part[name]
    return None


def adapter_weights(location: Location, options: HubOptions, allow_pickle: bool = False) -> Path:
    """The weights of an adapter, downloaded if need be.

    Raises:
        ModelError: they are missing, or are a pickle that was not asked for.
    """
    names = ["adapter_model.safetensors"] + ["adapter_model.bin"] * allow_pickle
    _fetch(location, options, names)
    for name in names:
        if (location.directory / name).is_file():
            return location.directory / name
    raise ModelError(
        f"{location.name} has an adapter_config.json but no {' or '.join(names)}"
        + ("" if allow_pickle else "; a pickled adapter_model.bin is read with use_safetensors=False")
    )


def _pickles(location: Location, options: HubOptions, allow_pickle: bool) -> list[Path]:
    if "gguf" in PurePath(location.name).name.lower():
        raise ModelError(
            f"{location.name} holds GGUF files and no checkpoint: name one of them with gguf_file=, as its page lists them. "
            + load_original(location.name, location.directory)
        )
    if not allow_pickle:
        raise ModelError(
            f"{location.name} has no .safetensors weights. Pickled .bin weights are read only on request: pass "
            "use_safetensors=False, or convert them once with transformers' from_pretrained and save_pretrained"
        )
    directory = location.directory
    _fetch(location, options, list(_PICKLES))
    names = shard_names(directory / _PICKLES[1]) or [_PICKLES[0]]
    _fetch(location, options, names)
    if not all((directory / name).is_file() for name in names):
        raise ModelError(
            f"{location.name} has neither .safetensors nor .bin weights, or not all of their shards"
        )
    return [directory / name for name in names]


def shard_names(index: Path) -> list[str] | None:
    """The files that an index of shards names; None where there is no index.

    Raises:
        ModelError: it cannot be read.
    """
    found = _weight_map(index)
    return None if found is None else sorted(set(found.values()))


def _weight_map(index: Path) -> dict[str, str] | None:
    if not index.is_file():
        return None
    found = read_json(index).get("weight_map")
    if (
        not isinstance(found, dict)
        or not found
        or not all(isinstance(shard, str) for shard in found.values())
    ):
        raise ModelError(
            f"{index} is not an index of shards: its weight_map does not name a file for each tensor"
        )
    outside = [
        shard for shard in found.values() if shard != PurePath(shard).name or "\\" in shard or "\0" in shard
    ]
    if outside:
        raise ModelError(
            f"{index} names the shard {outside[0]!r}; shards must be in the folder of their index, so this is refused"
        )
    return found


def _in_directory(directory: Path, name: str, gguf_file: str | None) -> Location:
    _refuse_links_out(directory)
    if gguf_file:
        file = directory / gguf_file
        if not file.is_file():
            raise ModelError(f"{name} has no file {gguf_file}")
        return Location("gguf", directory, name, file)
    if (directory / "adapter_config.json").is_file():
        return Location("adapter", directory, name)
    files = sorted(directory.glob("*.gguf"))
    if (directory / "config.json").is_file() and not (files and _only_gguf(directory, name)):
        _weight_map(
            directory / SAFE_WEIGHTS_INDEX_NAME
        )  # what loading would refuse is refused wherever the model is looked at
        return Location("checkpoint", directory, name)
    inner = newest_model(directory)
    if inner is not None:
        note = f"{name} is a run: {inner.note}"
        return replace(_in_directory(inner.path, str(inner.path), None), notes=(note,))
    if len(files) == 1:
        return Location("gguf", directory, name, files[0])
    if files and all(_PART.search(file.name) for file in files):
        return Location("gguf", directory, name, files[0])
    if files:
        listed = ", ".join(file.name for file in files)
        raise ModelError(f"{name} holds several GGUF files ({listed}); name one with gguf_file=")
    original = original_of(name, directory)
    raise ModelError(
        f"{name} has neither config.json nor adapter_config.json, so there is no model to load; a GGUF file of a hub "
        "repository is named with gguf_file=" + (f"; the original is {original}" if original else "")
    )


def _only_gguf(directory: Path, name: str) -> bool:
    """Whether a folder of this machine has a config.json beside GGUF files alone, as repositories of them do."""
    held = any(directory.glob("*.safetensors*")) or any(directory.glob("*.bin"))
    return Path(name).expanduser().exists() and not held


def _refuse_links_out(directory: Path) -> None:
    """A link of a downloaded folder must not bring a file of this machine into what is saved and uploaded.

    Weights are left out: linked ones are common, and what is not a file of tensors is refused when it is read.
    """
    inside = directory.resolve()
    for pattern in [*_SMALL_FILES, "*.py", "additional_chat_templates/*"]:
        for file in directory.glob(pattern):
            target = file.resolve()
            cached = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
            if not target.is_relative_to(inside) and not cached:
                raise ModelError(
                    f"{file}: a link to {target}, outside its folder, so it is not read. If it is meant, put a copy in its "
                    "place"
                )


def _fetch(location: Location, options: HubOptions, names: list[str]) -> None:
    """Downloads files of a hub model that are not in the cache; a local directory is left as it is."""
    if Path(location.name).expanduser().exists() or all((location.directory / n).exists() for n in names):
        return
    download(location.name, options, names)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: the file cannot be read, is larger than settings are, is not JSON, or holds no object.
    """
    try:
        with open_bytes(path) as file:
            raw = file.read(_LARGEST_JSON + 1)
        if len(raw) > _LARGEST_JSON:
            raise ModelError(f"{path}: larger than {_LARGEST_JSON >> 20} MiB, so it holds no settings")
        found = json.loads(raw.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}:{error.lineno}: no valid JSON: {error.msg}. Download it again") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path}: no valid JSON: {error}. Download it again") from error
    if not isinstance(found, dict):
        raise ModelError(
            f"{path}: expected keys with values, got a {type(found).__name__}. Download it again"
        )
    return found
