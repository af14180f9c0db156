"""Prompts of rows for trainers that generate: those that are too long, and the columns that a chat template reads."""

from collections.abc import Mapping
from typing import Any

from oribi.chat.template import render_chat
from oribi.errors import ConfigError
from oribi.text import say_notes

# variables of chat templates that scripts give as a column of the rows
_VARIABLES = ("reasoning_effort", "enable_thinking", "thinking", "reasoning_strength", "model_identity")


def short_prompts(rows: Any, tokenizer: Any, limit: int, what: str) -> Any:
    """The rows whose prompt has at most `limit` tokens; TRL cuts prompts no more, and half a prompt asks something else.

    Args:
        rows: a data set with a column `prompt`, or several by name.
        tokenizer: None takes every row.
        limit: in tokens.
        what: how a message names the rows.

    Raises:
        ConfigError: no row is short enough.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if tokenizer is None:
        return rows
    if isinstance(rows, Mapping):
        return {k: short_prompts(v, tokenizer, limit, f"{what} {k}") for k, v in rows.items()}

    def is_short(row: Mapping[str, Any]) -> bool:
        prompt = row.get("prompt")
        if prompt is None:
            return True
        if not isinstance(prompt, str):
            prompt = render_chat(tokenizer, prompt, add_generation_prompt=True)
        return len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) <= limit

    kept = rows.filter(is_short)
    if hasattr(rows, "__len__") and len(kept) < len(rows):
        left_out = (
            f"{len(rows) - len(kept)} of {len(rows)} rows have a prompt above max_prompt_length = {limit}"
        )
        if not len(kept):
            raise ConfigError(f"{what}: {left_out}; raise it, or shorten the prompts")
        say_notes([f"{what}: {left_out} and are left out"])
    return kept


def template_columns(rows: Any, tokenizer: Any, what: str) -> dict[str, Any] | None:
    """Columns that the tokenizer's chat template reads as variables, such as reasoning_effort, with their one value.

    TRL renders the prompts of all rows with the same variables.

    Args:
        rows: a data set, or None.
        tokenizer: whose chat template counts.
        what: how a message names the trainer.

    Raises:
        ConfigError: the rows differ in such a column.
    """
    template = getattr(tokenizer, "chat_template", None)
    columns = getattr(rows, "column_names", None) or []
    found: dict[str, Any] = {}
    for name in _VARIABLES:
        if name not in columns or not isinstance(template, str) or name not in template:
            continue
        values = list(rows.unique(name)) if hasattr(rows, "unique") else [next(iter(rows))[name]]
        if len(values) > 1:
            raise ConfigError(
                f"{what}: the rows differ in {name} ({', '.join(map(repr, values[:3]))}), but TRL renders all prompts with one "
                "value: train on the rows of one value at a time"
            )
        if values and values[0] is not None:
            found[name] = values[0]
    if found:
        say_notes(
            [f"{what}: prompts are rendered with {', '.join(f'{k} = {v!r}' for k, v in found.items())}"]
        )
    return found or None
