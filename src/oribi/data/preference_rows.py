"""Rows of preferences, of judged answers and of prompts alone become one example: the conversations of one prompt.

Which columns a row needs depends on the stage that it is for:
    dpo, orpo, reward   a prompt, a better answer and a worse one
    kto                 a prompt, an answer, and whether that is good
    grpo                a prompt; all other columns are kept for the functions that score answers
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from oribi.data import columns as known
from oribi.data.columns import Columns, is_label
from oribi.data.conversations import choose_format, known_roles, own_names, recognise_format
from oribi.data.messages import is_messages
from oribi.data.preference_readers import (
    Preference,
    Reading,
    from_judged,
    from_pair_of_answers,
    from_prompt_alone,
)
from oribi.data.preference_turns import PROMPTS, is_transcript
from oribi.errors import DataError

PAIR_STAGES = ("dpo", "orpo", "reward")
STAGES = (*PAIR_STAGES, "kto", "grpo")
Row = Mapping[str, Any]

NEEDS = {
    **dict.fromkeys(PAIR_STAGES, "a prompt with 'chosen' and 'rejected' answers"),
    "kto": "an answer with a 'label', true or false",
    "grpo": "a 'prompt', or a 'question'",
}


@dataclass(frozen=True)
class PreferenceFormat:
    """How the rows of one source are read.

    Args:
        name: for people.
        read: makes an example of a row.
        is_pair: the prompt is one question, for which a template can be chosen where the tokenizer has none.
        names: name of ours -> name in the rows.
        has_margin: rows say by how much the better answer is to win.
    """

    name: str
    read: Callable[[Columns], Preference]
    is_pair: bool = False
    names: Mapping[str, str] | None = None
    has_margin: bool = False

    def convert(self, row: Row) -> Preference:
        """The example of a row.

        Raises:
            DataError: the row cannot be read in this format.
        """
        columns = Columns(row, self.names)
        example = self.read(columns)
        example.unused += columns.unused()
        example.notes += columns.notes
        return example


def recognise_preference(
    row: Row,
    stage: str,
    *,
    is_rendered: Callable[[str], bool],
    has_template: bool,
    text_field: str | None = None,
    columns: Mapping[str, str] | None = None,
    role_aliases: Mapping[str, str] | None = None,
) -> PreferenceFormat:
    """The format of a source, from one of its first rows.

    Args:
        row: the row.
        stage: one of STAGES.
        is_rendered, has_template, text_field: see `Reading`.
        columns, role_aliases: as for `recognise_format`.

    Raises:
        DataError: no format of the stage fits; the message names the stage whose format does.
        ConfigError: columns or role_aliases name what oribi does not know.
    """
    names = own_names(row, columns or {}, text_field)
    reading = Reading(stage, known_roles(role_aliases), is_rendered, has_template, text_field)
    given = Columns(row, names)
    choose = {"kto": _choose_judged, "grpo": _choose_prompt}.get(stage, _choose_pair)
    found = choose(given, reading)
    if found is None:
        _refuse_nulls(given, stage)
        _refuse_other_stage(row, stage, columns=columns, role_aliases=role_aliases)
        raise DataError(
            f"row has keys {list(row)}; stage {stage} needs {NEEDS[stage]}. Name the columns in the run file: columns: "
            f"{{{'prompt: <your column>' if stage == 'grpo' else 'label: <your column>' if stage == 'kto' else 'chosen: <your column>, rejected: <your column>'}}}."
        )
    return replace(found, names=names)


def stage_of_row(row: Row, **settings: Any) -> str:
    """The stage that a row's columns are made for: sft, dpo, kto or grpo.

    Args:
        row: the row.
        settings: columns, role_aliases and text_field, as for `recognise_format`.

    Raises:
        DataError: for none.
    """
    names = own_names(row, settings.get("columns") or {}, settings.get("text_field"))
    given = Columns(row, names)
    if _pair_names(given):
        return "dpo"
    if any(is_label(given.peek(name)) for name in known.LABELS) and "input_ids" not in given:
        return "kto"
    try:
        recognise_format(row, **settings)
    except DataError:
        if _prompt_column(given) and not _lacks_answer(given):
            return "grpo"
        raise
    return "sft"


def _lacks_answer(row: Columns) -> bool:
    """Whether a question's answer is null: the row has a column for it, so it is no prompt alone."""
    asked = [("prompt", "completion"), *known.PAIRS]
    asked += [("instruction", answer) for answer in known.ANSWERS_TO_INSTRUCTION]
    return any(question in row and answer not in row and row.own([answer]) for question, answer in asked)


def _refuse_nulls(row: Columns, stage: str) -> None:
    """Name the null that keeps a row from being recognised.

    Raises:
        DataError: a column that the stage needs is there, and empty.
    """
    groups = {"kto": [(name,) for name in known.LABELS], "grpo": [(name,) for name in PROMPTS]}
    for names in groups.get(stage, known.PREFERENCES):
        if len(row.own(names)) == len(names):
            for name in names:
                row.need(name)


def _refuse_other_stage(row: Row, stage: str, **settings: Any) -> None:
    """Say which stage a row is made for, where that is another one.

    Raises:
        DataError: it is.
    """
    try:
        other = stage_of_row(row, **settings)
    except DataError:
        return
    if other != stage and not (other == "dpo" and stage in PAIR_STAGES):
        what = {
            "sft": "one answer to each prompt, as supervised fine-tuning takes",
            "dpo": "'chosen' and 'rejected' answers",
            "kto": "answers with a label",
            "grpo": "prompts without an answer",
        }[other]
        more = " (or orpo, kto, reward)" if other == "dpo" else ""
        raise DataError(
            f"the rows have {what}, but stage {stage} needs {NEEDS[stage]}: write stage: {other}{more}."
        )


def _pair_names(row: Columns) -> tuple[str, str] | None:
    """The names of the better and the worse answer."""
    found = next(((good, bad) for good, bad in known.PREFERENCES if good in row and bad in row), None)
    if found is None and row.first(known.MESSAGES) and "rejected_response" in row:
        return "", "rejected_response"  # ms-swift: the messages end with the better answer
    return found


def _prompt_column(row: Columns) -> str | None:
    """The column that holds the prompt."""
    for name in known.MESSAGES:
        if name in row and not isinstance(row.peek(name), str) or is_messages(row.peek(name)):
            return name
    return row.first(PROMPTS)


def _choose_pair(row: Columns, reading: Reading) -> PreferenceFormat | None:
    names = _pair_names(row)
    if names is None:
        return None
    prompt = _prompt_column(row)
    values = [row.peek(name) for name in names if name]
    whole = [is_transcript(value) for value in values]
    shape = (
        "dialogues as text (Human/Assistant)"
        if all(whole)
        else "messages"
        if not isinstance(values[0], str)
        else "texts"
    )
    name = f"preferences: {' + '.join(filter(None, [prompt, *names]))} ({shape})"
    margin = reading.stage == "reward" and isinstance(row.peek("margin"), int | float)
    read = partial(from_pair_of_answers, names=names, prompt=prompt, margin=margin, reading=reading)
    is_pair = prompt is not None and isinstance(row.peek(prompt), str) and not any(whole)
    return PreferenceFormat(name, read, is_pair, has_margin=margin)


def _choose_judged(row: Columns, reading: Reading) -> PreferenceFormat | None:
    """Answers with a label, or pairs, which become two such rows each."""
    pair = _choose_pair(row, reading)
    label = next((name for name in known.LABELS if name in row), None)
    if pair is not None or label is None:
        return pair
    row.hide(known.LABELS)
    plain = "prompt" in row and "completion" in row and not is_messages(row.peek("prompt"))
    answered = choose_format(row, None, reading.roles)
    read = partial(from_judged, label=label, answered=answered, reading=reading)
    return PreferenceFormat(f"judged answers: {answered.name} + {label}", read, plain or answered.is_pair)


def _choose_prompt(row: Columns, reading: Reading) -> PreferenceFormat | None:
    """Prompts to which the model's own answers are scored."""
    prompt = _prompt_column(row)
    if prompt is None:
        return None
    return PreferenceFormat(f"prompts: {prompt}", partial(from_prompt_alone, prompt=prompt, reading=reading))
