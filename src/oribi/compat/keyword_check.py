"""Keywords in a script's calls that oribi would ignore or refuse when the script runs: `oribi convert` says so before."""

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import fields
from importlib.util import find_spec
from typing import Any

from oribi.compat.imports import Bindings, Change
from oribi.compat.names import IGNORED_KEYWORDS, QUIET_DEFAULTS, REFUSED_KEYWORDS
from oribi.compat.trl_keywords import REFUSED, fate_of
from oribi.text import did_you_mean

_LIBRARIES = ("unsloth", "unsloth_zoo", "trl")
_OF_TRANSFORMERS = ("transformers.TrainingArguments", "transformers.Trainer")
# what the script writes is no constant
_UNSEEN = object()
# keywords of `get_peft_model` for parts that are not there
_PARTS = ("finetune_vision_layers", "finetune_language_layers", "finetune_attention_modules", "finetune_mlp_modules",
          "finetune_audio_layers", "task_type")  # fmt: skip


class KeywordCheck:
    """What becomes of the keywords of calls.

    Args:
        bindings: what the script's names stand for.
    """

    def __init__(self, bindings: Bindings) -> None:
        self._bindings = bindings

    def of_call(self, node: ast.Call) -> Iterator[Change]:
        """What is said of a call: of loading, of LoRA, of a config, or of a trainer."""
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if name in ("from_pretrained", "get_peft_model") and isinstance(node.func, ast.Attribute):
            if re.search(r"\bFast\w*Model$", self._class_of(node.func.value)):
                yield from self._loading(node) if name == "from_pretrained" else self._lora(node)
            return
        if name in ("save_pretrained_merged", "push_to_hub_merged"):
            yield from _merging(node)
            return
        place = self._bindings.origin(node.func)
        if place.partition(".")[0] in _LIBRARIES or place in _OF_TRANSFORMERS:
            called = place.rpartition(".")[2]
            called = {"UnslothTrainer": "SFTTrainer", "UnslothTrainingArguments": "SFTConfig"}.get(
                called, called
            )
            if re.search(r"(Config|Trainer|TrainingArguments)$", called):
                yield from _training(node, called)

    def _class_of(self, node: ast.expr) -> str:
        return self._bindings.origin(node) or ast.unparse(node)

    def _loading(self, node: ast.Call) -> Iterator[Change]:
        from oribi.compat.language_model import loading_keywords

        known = loading_keywords()
        for keyword, value in _given(node):
            seen = _constant(value)
            on = seen not in (None, False, QUIET_DEFAULTS.get(keyword))
            if keyword in REFUSED_KEYWORDS and on:
                yield "refused", value, f"{keyword}: {REFUSED_KEYWORDS[keyword]}"
            elif keyword in IGNORED_KEYWORDS and on:
                yield "ignored", value, f"{keyword}: {IGNORED_KEYWORDS[keyword]}"
            elif keyword not in {*known, *REFUSED_KEYWORDS, *IGNORED_KEYWORDS}:
                yield "refused", value, _unknown("from_pretrained", keyword, {*known, *IGNORED_KEYWORDS})

    def _lora(self, node: ast.Call) -> Iterator[Change]:
        from peft import LoraConfig

        from oribi.compat.language_model import FastLanguageModel

        known = {*inspect.signature(FastLanguageModel.get_peft_model).parameters, *_PARTS}
        known |= set(inspect.signature(LoraConfig.__init__).parameters)
        for keyword, value in _given(node):
            if keyword == "qat_scheme" and _constant(value) is not None:
                yield "refused", value, f"{keyword}: {REFUSED_KEYWORDS[keyword]}"
            elif keyword not in known:
                yield "refused", value, _unknown("get_peft_model", keyword, known)


def _merging(node: ast.Call) -> Iterator[Change]:
    from oribi.save.merged import METHODS

    for keyword, value in _given(node):
        seen = _constant(value)
        if keyword == "save_method" and isinstance(seen, str) and seen not in METHODS:
            others = f"oribi writes {', '.join(METHODS)}; save_pretrained_gguf writes other quantised files"
            yield "refused", value, f"save_method={seen!r}: {others}"


def _training(node: ast.Call, called: str) -> Iterator[Change]:
    """What becomes of the keywords of a config or a trainer, as `oribi.trl` reads them."""
    taken, known = _signature(called)
    if known is None:
        return
    for keyword, value in _given(node):
        if keyword in taken or keyword == "tokenizer":
            continue
        fate, seen = fate_of(keyword, known), _constant(value)
        if fate.kind == "unknown" or (fate.kind == "refused" and seen not in (_UNSEEN, REFUSED[keyword][0])):
            yield "refused", value, f"{called}: {keyword}: {fate.why}"
        elif fate.kind == "retired" and seen not in (None, False):
            yield "ignored", value, f"{called}: {keyword}: {fate.why}"


def _signature(called: str) -> tuple[set[str], set[str] | None]:
    """Keywords of a trainer, and the fields of its config; None where that is not known here."""
    own = called.startswith("SFT") or called in ("Trainer", "TrainingArguments")
    if not own and find_spec("trl") is None:
        return set(), None
    from oribi.compat.trl import trainer_keywords, trl_name

    try:
        found: Any = trl_name(called)
        if not called.endswith("Trainer"):
            return {"output_dir"}, {f.name for f in fields(found)}
        config = "TrainingArguments" if called == "Trainer" else called.removesuffix("Trainer") + "Config"
        return set(trainer_keywords(called)), {f.name for f in fields(trl_name(config))}
    except (AttributeError, ImportError, TypeError):  # an import says so
        return set(), None


def _given(node: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    return ((keyword.arg, keyword.value) for keyword in node.keywords if keyword.arg is not None)


def _constant(value: ast.expr) -> Any:
    """The value that an expression writes out, or `_UNSEEN`."""
    try:
        return ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError, RecursionError):
        return _UNSEEN


def _unknown(call: str, keyword: str, known: set[str]) -> str:
    return f"{call}: unknown keyword {keyword}{did_you_mean(keyword, known)}"
