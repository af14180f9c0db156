"""prepare_preferences: from a source to rows that TRL's trainers of preferences and rewards take, and a report on them."""

from __future__ import annotations

import os
from itertools import islice
from typing import Any

from oribi.data.preference_rows import stage_of_row
from oribi.data.prepare import PreparedData, make_preparation, prepared
from oribi.data.rows import readable_rows
from oribi.data.sources import open_source
from oribi.errors import DataError
from oribi.text import printable

LOOKED_AT = 50  # rows that may be null or broken before the first that shows a stage


def prepare_preferences(
    source: Any,
    tokenizer: Any,
    *,
    stage: str,
    max_seq_length: int,
    overlong: str | None = None,
    num_proc: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    use_cache: bool = True,
    progress: bool = True,
    **row_settings: Any,
) -> PreparedData:
    """Turn a source into prompts and answers for a stage of training after supervised fine-tuning.

    The tokens are those of supervised fine-tuning on the same conversations: the generation prompt ends the prompt, the token
    that ends a turn closes each answer once, and BOS stands at the beginning once.

    Args:
        source, tokenizer: as for prepare_dataset.
        stage: "dpo", "orpo", "reward" (a better and a worse answer), "kto" (an answer and its label) or "grpo" (a prompt).
        max_seq_length: longest prompt with an answer, in tokens; of grpo the longest prompt.
        overlong: what to do with rows above max_seq_length: "error", "drop", or "truncate", which cuts the ends of answers and
            leaves out rows of which no answer is left. None is "truncate", but "drop" for reward, whose scores are of whole answers.
            A prompt is never cut.
        num_proc, cache_dir, use_cache, progress: as for prepare_dataset.
        row_settings: as for prepare_dataset: split, malformed, columns, role_aliases, chat_template_kwargs, max_rows, announce;
            text_field, the column whose text is the prompt as it is, without a chat template; train_on and turns, which have no effect.

    Returns:
        PreparedData. Its columns are
            dpo, orpo: prompt, chosen, rejected (texts), prompt_ids, chosen_ids, rejected_ids (int32 lists, to be joined);
            reward: prompt, chosen, rejected, chosen_ids, rejected_ids (with the prompt's), margin where rows have it;
            kto: prompt, completion, prompt_ids, completion_ids, label (bool; pairs become two rows);
            grpo: prompt (messages, or text), prompt_ids, and every other column of the rows as it is;
        and origin, the row that each was, as file:line.

    Raises:
        DataError: a row or file cannot be used (it names file and line), or the rows are made for another stage.
        ConfigError: a setting is out of range.
    """
    preparation = make_preparation(
        source, tokenizer, stage=stage, max_seq_length=max_seq_length, overlong=overlong, **row_settings
    )
    made = prepared(preparation, cache_dir, use_cache, progress)
    said = [f"{what}: {', '.join(names)}" for what, names in made.report.unused().items() if names]
    for line in (*said, *made.report.notes):
        preparation.announce(printable(f"{made.report.source}: {line}"))
    return made


def stage_of_source(source: Any, *, split: str = "train", **settings: Any) -> str:
    """The stage that a source's rows are made for, by the first row that shows it: sft, dpo, kto or grpo.

    Args:
        source, split: as for prepare_dataset.
        settings: columns, role_aliases, text_field.

    Raises:
        DataError: the source cannot be opened, or its first rows fit no stage.
    """
    problem = DataError("no rows.")
    for part in open_source(source, split=split):
        for origin, row in islice(readable_rows(part), LOOKED_AT):
            try:
                if isinstance(row, DataError):
                    raise row
                return stage_of_row(row, **settings)
            except DataError as error:
                problem = DataError(f"{origin}: {error}")
    raise problem
