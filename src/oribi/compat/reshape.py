"""Data sets reshaped the way callers of other libraries ask for it: standardize_data_formats, to_sharegpt, apply_chat_template."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import datasets

from oribi.chat.named_templates import TEMPLATES
from oribi.chat.template import render_chat
from oribi.data.columns import MESSAGES as MESSAGE_COLUMNS
from oribi.data.columns import Columns, as_text, short
from oribi.errors import ConfigError, DataError

# under the name that scripts list the templates' names by
CHAT_TEMPLATES = TEMPLATES

AnyDataset: TypeAlias = datasets.Dataset | datasets.IterableDataset

DEFAULT_SYSTEM = "Below are some instructions that describe some tasks. Write responses that appropriately complete each request."
_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
LLAMA_3_EXAMPLE = (
    "<|begin_of_text|>"
    + _HEADER.format("system")
    + "{SYSTEM}<|eot_id|>"
    + 2 * (_HEADER.format("user") + "{INPUT}<|eot_id|>" + _HEADER.format("assistant") + "{OUTPUT}<|eot_id|>")
)

_OPTIONAL = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
_FIELD = re.compile(r"\{(\w+)\}")


def standardize_data_formats(
    dataset: AnyDataset,
    tokenizer: Any = None,
    aliases_for_system: Sequence[str] = ("system",),
    aliases_for_user: Sequence[str] = ("user", "human", "input"),
    aliases_for_assistant: Sequence[str] = ("gpt", "assistant", "output"),
    batch_size: int = 1000,
    num_proc: int | None = None,
) -> AnyDataset:
    """Give the messages of a data set the keys role and content and the roles system, user and assistant.

    Args:
        dataset: with a column `conversations` (or messages, conversation, ...) of messages that have two keys each; a data set
            without one comes back as it is.
        tokenizer: accepted for compatibility.
        aliases_for_system, aliases_for_user, aliases_for_assistant: the roles' names in the data.
        batch_size, num_proc: passed to `datasets`' map.

    Returns:
        The data set; the column keeps its name.

    Raises:
        DataError: messages without a recognisable role, or a role without an alias.
    """
    first = next(iter(dataset), None)
    column = next((c for c in MESSAGE_COLUMNS if first and isinstance(first.get(c), list) and first[c]), None)
    if column is None:
        return dataset
    roles = dict.fromkeys(aliases_for_system, "system") | dict.fromkeys(aliases_for_user, "user")
    roles |= dict.fromkeys(aliases_for_assistant, "assistant") | {"tool": "tool", "system": "system"}
    roles = {name.strip().lower(): role for name, role in roles.items()}
    role_key, content_key = _message_keys(first[column], roles)

    def convert(batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        return {
            column: [
                _standard(messages, f"row {index + 1}", role_key, content_key, roles)
                for index, messages in zip(indices, batch[column])
            ]
        }

    options: dict[str, Any] = {"batched": True, "batch_size": batch_size, "with_indices": True}
    if isinstance(dataset, datasets.Dataset):
        options |= {"num_proc": num_proc, "desc": "Standardizing messages"}
    else:
        options |= {"features": None}
    return dataset.map(convert, **options)


standardize_sharegpt = standardize_data_formats


def _message_keys(messages: Sequence[Mapping[str, Any]], roles: Mapping[str, str]) -> tuple[str, str]:
    """Which key holds the role and which the text: the usual names, or the key whose values are all known roles."""
    keys = [k for k in messages[0] if messages[0][k] is not None]
    for role_key, content_key in (("role", "content"), ("from", "value")):
        if role_key in keys and content_key in keys:
            return role_key, content_key
    matching = [
        k for k in keys if all(isinstance(m.get(k), str) and m[k].strip().lower() in roles for m in messages)
    ]
    if len(keys) != 2 or len(matching) != 1:
        raise DataError(
            f"messages have keys {keys}; cannot tell which holds the role. Use 'role' and 'content' (or 'from' and 'value'), or "
            "name the roles with aliases_for_user, aliases_for_assistant, aliases_for_system."
        )
    role_key = matching[0]
    return role_key, next(k for k in keys if k != role_key)


def _standard(
    messages: Any, where: str, role_key: str, content_key: str, roles: Mapping[str, str]
) -> list[dict[str, Any]]:
    """The messages of one row, with the keys and roles of templates first."""
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise DataError(f"{where} has {short(messages)} in the place of its messages: remove the row.")
    made = []
    for message in messages:
        given = message.get(role_key)
        role = roles.get(given.strip().lower() if isinstance(given, str) else None)
        if role is None:
            raise DataError(
                f"{where}: a message has the role {given!r}; known are {', '.join(sorted(roles))}. Name it in one of "
                "aliases_for_system, aliases_for_user, aliases_for_assistant."
            )
        others = {k: v for k, v in message.items() if k not in (role_key, content_key)}
        made.append({"role": role, "content": message.get(content_key), **others})
    return made


def to_sharegpt(
    dataset: datasets.Dataset,
    merged_prompt: str = "",
    merged_column_name: str = "instruction",
    output_column_name: str = "output",
    remove_unused_columns: bool = True,
    conversation_extension: int = 1,
    random_state: int = 3407,
) -> datasets.Dataset:
    """Make conversations of a table: a prompt put together from columns, and the column with the answer.

    Args:
        dataset: the table.
        merged_prompt: text with `{column}` placeholders; a part in `[[...]]` is left out where its first column is empty. "" takes
            the column `merged_column_name` as it is.
        merged_column_name: column of the prompt, or where the merged prompt is put.
        output_column_name: column of the answer.
        remove_unused_columns: keep only `conversations`.
        conversation_extension: how many conversations of the (shuffled) table are joined into each.
        random_state: seed of the shuffles.

    Returns:
        A data set with the column conversations: [{"from": "human", "value"}, {"from": "gpt", "value"}, ...].

    Raises:
        DataError: a column does not exist, or a row has no prompt or no answer.
        ConfigError: conversation_extension is below 1.
    """
    if not isinstance(conversation_extension, int) or conversation_extension < 1:
        raise ConfigError(
            f"to_sharegpt: conversation_extension = {conversation_extension!r} must be an integer of at least 1."
        )
    needed = set(_FIELD.findall(merged_prompt)) if merged_prompt else {merged_column_name}
    missing = sorted((needed | {output_column_name}) - set(dataset.column_names))
    if missing:
        raise DataError(f"to_sharegpt: the data set has columns {dataset.column_names}, not {missing}.")

    def convert(row: Mapping[str, Any], index: int) -> dict[str, Any]:
        where = f"to_sharegpt: row {index + 1}"
        prompt = _merge(merged_prompt, row) if merged_prompt else _filled(row, merged_column_name, where)
        answer = _filled(row, output_column_name, where)
        turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]
        return {merged_column_name: prompt, "conversations": turns}

    made = dataset.map(convert, with_indices=True, desc="Making conversations")
    if conversation_extension > 1:
        orders = [list(range(len(made)))]
        for n in range(1, conversation_extension):
            orders.append(random.Random(random_state + n).sample(orders[0], len(made)))
        turns = made["conversations"][:]
        joined = [[t for order in orders for t in turns[order[i]]] for i in range(len(made))]
        made = made.remove_columns("conversations").add_column("conversations", joined)
    return made.select_columns("conversations") if remove_unused_columns else made


def _filled(row: Mapping[str, Any], column: str, where: str) -> str:
    """A value as text; a null would become the word None and be trained."""
    value = Columns(row, {column: column}).peek(column)
    if value is None or not as_text(value, column).strip():
        raise DataError(f"{where} has an empty (null) {column!r}: fill it in, or filter such rows out.")
    return as_text(value, column)


def _merge(prompt: str, row: Mapping[str, Any]) -> str:
    def fill(text: str) -> str:
        return _FIELD.sub(
            lambda m: "" if row[m.group(1)] is None else as_text(row[m.group(1)], m.group(1)), text
        )

    def optional(block: re.Match[str]) -> str:
        fields = _FIELD.findall(block.group(1))
        empty = fields and (row[fields[0]] is None or not str(row[fields[0]]).strip())
        return "" if empty else fill(block.group(1))

    parts, at = [], 0
    for block in _OPTIONAL.finditer(
        prompt
    ):  # filled piece by piece: a value may itself hold braces or brackets
        parts += [fill(prompt[at : block.start()]), optional(block)]
        at = block.end()
    return "".join([*parts, fill(prompt[at:])])


def apply_chat_template(
    dataset: datasets.Dataset,
    tokenizer: Any = None,
    chat_template: str = LLAMA_3_EXAMPLE,
    default_system_message: str = DEFAULT_SYSTEM,
    extra_eos_tokens: Sequence[str] | None = None,
) -> datasets.Dataset:
    """Make a chat template of an example, set it on the tokenizer, and add the rendered conversations as the column `text`.

    Args:
        dataset: with a column conversations or messages.
        tokenizer: its chat_template is replaced.
        chat_template: an example of one or two turns: {INPUT} and {OUTPUT} in each, {SYSTEM} once or not at all.
        default_system_message: stands in for a missing system message.
        extra_eos_tokens: tokens that end a turn already, so that no EOS is put behind them.

    Returns:
        The data set with the column text.

    Raises:
        ConfigError: the example is not of that form, or there is no tokenizer.
        DataError: no column of messages.
    """
    if tokenizer is None:
        raise ConfigError("apply_chat_template: give the tokenizer whose chat template is to be set.")
    source = template_from_example(chat_template, tokenizer, default_system_message, extra_eos_tokens or ())
    column = next((c for c in MESSAGE_COLUMNS if c in dataset.column_names), None)
    if column is None:
        raise DataError(
            f"apply_chat_template: the data set has columns {dataset.column_names}; it needs one of {', '.join(MESSAGE_COLUMNS)} "
            "(to_sharegpt makes one)."
        )
    tokenizer.chat_template = source
    standard = standardize_data_formats(dataset.select_columns(column))

    def render(batch: Mapping[str, list[Any]]) -> dict[str, list[str]]:
        return {"text": [render_chat(tokenizer, m) for m in batch[column]]}

    texts = standard.map(render, batched=True, desc="Applying the chat template", remove_columns=column)
    return datasets.concatenate_datasets([dataset, texts], axis=1)


def template_from_example(
    example: str, tokenizer: Any, default_system_message: str, extra_eos_tokens: Sequence[str] = ()
) -> str:
    """Jinja for an example of one or two turns; see apply_chat_template."""
    counts = {name: example.count(f"{{{name}}}") for name in ("SYSTEM", "INPUT", "OUTPUT")}
    if counts["INPUT"] not in (1, 2) or counts["OUTPUT"] != counts["INPUT"] or counts["SYSTEM"] > 1:
        raise ConfigError(
            "the example of a chat template must hold {INPUT} and {OUTPUT} once or twice each and {SYSTEM} at most once; it holds "
            f"{counts}."
        )
    if counts["INPUT"] == 1:
        example = _with_second_turn(example, tokenizer.bos_token or "")
    pieces = re.split(r"\{(?:INPUT|OUTPUT)\}", example)
    opening, middle, between, middle_again, tail = pieces
    if middle != middle_again or not example.index("{INPUT}") < example.index("{OUTPUT}"):
        raise ConfigError(
            f"the two turns of the example differ between {{INPUT}} and {{OUTPUT}}: {middle!r} and {middle_again!r}."
        )
    if tail and between.startswith(tail):
        header = between[len(tail) :]
    else:
        shared = next((between[i:] for i in range(len(between)) if opening.endswith(between[i:])), "")
        tail, header = between[: len(between) - len(shared)], shared
    if not opening.endswith(header):
        raise ConfigError(f"the first turn of the example does not begin as the second, with {header!r}.")
    opening = opening[: len(opening) - len(header)]
    ends = [*extra_eos_tokens, *(t.content for t in tokenizer.added_tokens_decoder.values())]
    if not any(end and end in tail for end in ends):
        tail = (tokenizer.eos_token or "") + tail
    if opening.startswith(tokenizer.bos_token or "\0"):
        opening = opening[len(tokenizer.bos_token) :]
        start = "{{- bos_token -}}"
    else:
        start = ""
    before, found, after = opening.partition("{SYSTEM}")
    system = f"{_quote(before)} + system + {_quote(after)}" if found else _quote(opening)
    return f"""{start}
{{%- if messages and messages[0]['role'] == 'system' -%}}
    {{%- set system, turns = messages[0]['content'], messages[1:] -%}}
{{%- else -%}}
    {{%- set system, turns = {_quote(default_system_message)}, messages -%}}
{{%- endif -%}}
{{{{- {system} -}}}}
{{%- for message in turns -%}}
    {{%- if message['role'] == 'user' -%}}
        {{{{- {_quote(header)} + message['content'] + {_quote(middle)} -}}}}
    {{%- elif message['role'] == 'assistant' -%}}
        {{{{- message['content'] + {_quote(tail)} -}}}}
    {{%- else -%}}
        {{{{- raise_exception('this template has no form for the role ' + message['role']) -}}}}
    {{%- endif -%}}
{{%- endfor -%}}"""


def _with_second_turn(example: str, bos: str) -> str:
    """An example of one turn with that turn once more.

    The turn begins after what ends an answer, where that stands before the question too; else with the space that sets the
    answer's heading apart, and else behind the system message or BOS.
    """
    before, _, rest = example.partition("{INPUT}")
    if "{OUTPUT}" not in rest:
        raise ConfigError("the example of a chat template must hold {INPUT} before {OUTPUT}.")
    middle, _, tail = rest.partition("{OUTPUT}")
    opening = before.find("{SYSTEM}") + len("{SYSTEM}") if "{SYSTEM}" in before else 0
    opening = max(opening, len(bos) if before.startswith(bos) else 0)
    space = middle[: len(middle) - len(middle.lstrip())]
    ended, spaced = before.rfind(tail) if tail else -1, before.rstrip().rfind(space) if space else -1
    if ended >= opening and (tail.strip() or not space):
        opening = ended + len(tail)
    elif spaced >= opening:
        opening = spaced if tail.strip() or not tail else spaced + len(space)
    return f"{example}{before[opening:]}{{INPUT}}{middle}{{OUTPUT}}{tail}"


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
