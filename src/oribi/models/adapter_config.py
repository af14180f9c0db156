"""adapter_config.json, read once and checked: whoever opens an adapter, to train, show or export it, asks here."""

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftType, TaskType

from oribi.errors import ModelError
from oribi.models.fields import (
    BOOLEAN,
    Field,
    are,
    each,
    field_problems,
    is_number,
    is_whole,
    number_from,
    whole_from,
)
from oribi.models.files import Location, read_json
from oribi.text import nearest, shown

_SECONDS = 10.0  # for all patterns on all names; plain ones take milliseconds
_MATCH = (
    "import json, re, sys\npatterns, names = json.load(sys.stdin)\n"
    "for pattern in patterns:\n  for name in names: re.match(pattern, name)"
)


_NAMES = Field("a list of names", lambda value: are(value, str))
_PATTERN_OR_NAMES = Field(
    "a list of names, or one pattern", lambda value: type(value) is str or are(value, str)
)
_FIELDS = {
    "r": whole_from(1, 65536),
    "lora_alpha": number_from(-1e6, 1e6),
    "lora_dropout": Field("a number from 0 to below 1", lambda value: is_number(value, 0, 1) and value < 1),
    "bias": Field("none, all or lora_only", lambda value: value in ("none", "all", "lora_only")),
    **dict.fromkeys(
        ("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias", "ensure_weight_tying", "inference_mode", "use_qalora"),
        BOOLEAN,
    ),
    "target_modules": _PATTERN_OR_NAMES,
    "exclude_modules": _PATTERN_OR_NAMES,
    "layers_pattern": _PATTERN_OR_NAMES,
    "modules_to_save": _NAMES,
    "target_parameters": _NAMES,
    "layers_to_transform": Field(
        "a layer's number, or a list of them", lambda value: is_whole(value) or each(value, is_whole)
    ),
    "rank_pattern": Field(
        "patterns with whole numbers above 0",
        lambda value: isinstance(value, dict) and all(is_whole(rank, 1, 65536) for rank in value.values()),
    ),
    "alpha_pattern": Field(
        "patterns with numbers",
        lambda value: isinstance(value, dict) and all(is_number(alpha, -1e6, 1e6) for alpha in value.values()),
    ),
    "trainable_token_indices": Field(
        "a list of token ids, or such a list for each table",
        lambda value: each(value, is_whole)
        or (isinstance(value, dict) and all(each(ids, is_whole) for ids in value.values())),
    ),
    "layer_replication": Field(
        "a list of pairs of layers", lambda value: each(value, lambda pair: each(pair, is_whole) and len(pair) == 2)
    ),
    # its second half is a module to import
    "megatron_config": Field("null: oribi does not run Megatron's layers", lambda value: False),
    "revision": Field("a branch, tag or commit", lambda value: type(value) is str),
    "task_type": Field(f"one of {', '.join(TaskType)}", lambda value: type(value) is str and value in list(TaskType)),
}  # fmt: skip


def read_adapter_settings(location: Location) -> dict[str, Any]:
    """The contents of an adapter_config.json.

    Args:
        location: of kind "adapter".

    Raises:
        ModelError: naming the file, and every field that no adapter can have.
    """
    file = location.directory / "adapter_config.json"
    settings = read_json(file)
    kind = settings.get("peft_type")
    if type(kind) is not str or kind not in list(PeftType):
        near = nearest(kind, [known.value for known in PeftType])
        raise ModelError(
            f"{file}: peft_type = {shown(kind)}: PEFT knows no such adapter"
            + (f"; did you mean {near}?" if near else "")
        )
    fields = (
        _FIELDS if kind == PeftType.LORA else {"base_model_name_or_path": _FIELDS["base_model_name_or_path"]}
    )
    problems = field_problems(settings, fields)
    for _, pattern in _patterns(settings) if not problems else ():
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            problems.append(f"{shown(pattern)} is not a regular expression: {error}")
    if problems:
        raise ModelError(f"{file}: " + "; ".join(problems))
    return settings


def read_adapter_config(location: Location) -> PeftConfig:
    """An adapter's settings as PEFT's config.

    Raises:
        ModelError: naming the file, and what PEFT refuses.
    """
    read_adapter_settings(location)
    try:
        return PeftConfig.from_pretrained(str(location.directory))
    except Exception as error:  # values of rarer fields may end anywhere in PEFT
        reason = " ".join(str(error).split())[:600]
        raise ModelError(
            f"{location.directory / 'adapter_config.json'}: PEFT refuses it: {reason}"
        ) from error


def check_against_base(location: Location, names: Iterable[str], vocab_size: int) -> None:
    """Compares an adapter's settings with its base: token ids, and how long its patterns take on the modules' names.

    Args:
        location: of kind "adapter".
        names: of the base's modules.
        vocab_size: rows of the base's embeddings.

    Raises:
        ModelError: a token has no row, or a pattern does not come to an end.
    """
    file = location.directory / "adapter_config.json"
    settings = read_adapter_settings(location)
    indices = settings.get("trainable_token_indices") or []
    ids = [i for table in (indices.values() if isinstance(indices, dict) else [indices]) for i in table]
    if ids and max(ids) >= vocab_size:
        raise ModelError(
            f"{file}: trainable_token_indices name token {max(ids)}, and the base has {vocab_size} rows; its tokenizer or base "
            "is another one"
        )
    patterns = [
        whole
        for part, whole in _patterns(settings)
        if re.search(r"[*+?{]", part)  # without repetition, none is long
    ]
    if patterns:
        _refuse_endless(file, patterns, list(names))


def _patterns(settings: dict[str, Any]) -> list[tuple[str, str]]:
    """The regular expressions of an adapter_config.json, each alone and as PEFT uses it."""
    whole = [s for key in ("target_modules", "exclude_modules") if isinstance(s := settings.get(key), str)]
    layers = settings.get("layers_pattern") or []
    keys = [*(settings.get("rank_pattern") or {}), *(settings.get("alpha_pattern") or {})]
    return [
        *((one, one) for one in whole),
        *(
            (one, rf"(?:^|.*?\.){one}\.(?P<idx>\d+)\.")
            for one in ([layers] if isinstance(layers, str) else layers)
        ),
        *((one, rf"(.*\.)?({one})$") for one in keys),
        *((one, rf"(^|.*\.){one}($|\..*)") for one in settings.get("modules_to_save") or []),
    ]


def _refuse_endless(file: Path, patterns: list[str], names: list[str]) -> None:
    """Matches in a process of its own: Python cannot end a match that has begun."""
    try:
        subprocess.run(
            [sys.executable, "-I", "-c", _MATCH], input=json.dumps([patterns, names]), text=True, timeout=_SECONDS,
            capture_output=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ModelError(
            f"{file}: its patterns ({', '.join(map(shown, patterns))}) are not matched within {_SECONDS:.0f} seconds; "
            "repetitions within repetitions take forever, so write the modules' names"
        ) from error
