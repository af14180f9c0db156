"""Answers to the same prompts at every evaluation of a run, beside those of the base: on the terminal, in samples.jsonl, in trackers.

Answers are greedy: nothing random is drawn, so a training takes the same steps as without them, and two answers differ only
where the model does.
"""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import time
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from oribi.config import RunConfig
from oribi.data.preferences import prepare_preferences, stage_of_source
from oribi.data.prepare import prepare_dataset
from oribi.data.sources import local_path
from oribi.errors import DataError
from oribi.memory.estimate import HELD_OUT_PROMPTS
from oribi.models.decoder import DecoderForCausalLM
from oribi.models.unwrap import base_model
from oribi.run_record import SAMPLES_FILE, json_lines
from oribi.text import printable, say, write_whole
from oribi.train.evaluate import Prompt, Sample, answer_prompts, prompts_of_rows, samples_of, without_adapter
from oribi.train.stage_measures import prompts_of_stage
from oribi.train.trackers import log_table

logger = logging.getLogger(__name__)

HELD_OUT = "held_out"  # the value of sample_prompts that takes rows of the evaluation set
MOST_PROMPTS = 32
_SHOWN = 200  # characters of an answer on the terminal


def require_prompts(config: RunConfig, tokenizer: Any) -> None:
    """Reads what `sample_prompts` names, before a model is loaded.

    Args:
        config: of the run. tokenizer: of the model, with the run's chat template.

    Raises:
        DataError: it cannot be read.
    """
    if config.sample_prompts not in (None, HELD_OUT):
        _prompts_of_file(config, tokenizer)


def sample_prompts(config: RunConfig, tokenizer: Any, held_out: Any) -> list[Prompt]:
    """The prompts that a run's `sample_prompts` names.

    Args:
        config: of the run. tokenizer: of the model, with the run's chat template.
        held_out: prepared evaluation rows; None where there are none.

    Raises:
        DataError: there are none, or a row cannot be used.
    """
    if config.sample_prompts is None:
        return []
    if config.sample_prompts != HELD_OUT:
        return _prompts_of_file(config, tokenizer)
    found = _prompts_in(config.stage, tokenizer, held_out, HELD_OUT_PROMPTS)
    if not found:
        raise DataError(
            "sample_prompts: the held-out rows are plain text and hold no prompts; name a file of prompts"
        )
    return found


def _prompts_in(stage: str, tokenizer: Any, rows: Any, count: int) -> list[Prompt]:
    if stage == "sft":
        return prompts_of_rows(tokenizer, rows, count)
    return [prompt for _, prompt in prompts_of_stage(stage, tokenizer, rows, count)]


def _prompts_of_file(config: RunConfig, tokenizer: Any) -> list[Prompt]:
    """The first prompts of the file or data set that `sample_prompts` names: a text file has a question on each line.

    Rows are read as training data is. Rows with answers show them beside the model's; answers to pairs are the better ones.

    Args:
        config: of the run. tokenizer: of the model, with the run's chat template.

    Raises:
        DataError: it cannot be read.
    """
    source: Any = config.sample_prompts
    naming = {"columns": config.columns, "role_aliases": config.role_aliases}
    template = {"chat_template_kwargs": config.chat_template_kwargs}
    path = local_path(source)
    if path is not None and path.suffix == ".txt":
        source = [{"question": line.strip()} for line in _lines(path) if line.strip()][:MOST_PROMPTS]
        if not source:
            raise DataError(f"sample_prompts: {path} is empty; write one question on each line")
        naming, stage = {}, "grpo"
    else:
        stage = stage_of_source(source, split=config.split, **naming)
    settings = {
        "max_seq_length": config.max_seq_length, "split": config.split, "max_rows": MOST_PROMPTS, "overlong": "error",
        "announce": None, "progress": False, "use_cache": False, **naming, **template,
    }  # fmt: skip
    if stage == "sft":
        rows = prepare_dataset(source, tokenizer, **settings).dataset
    else:
        rows = prepare_preferences(source, tokenizer, stage=stage, **settings).dataset
    found = _prompts_in(stage, tokenizer, rows, MOST_PROMPTS)
    if not found:
        raise DataError(f"sample_prompts: {config.sample_prompts} is plain text and holds no prompts")
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        what = (
            "is not UTF-8" if isinstance(error, UnicodeDecodeError) else f"cannot be read: {error.strerror}"
        )
        raise DataError(f"sample_prompts: {path} {what}") from error


@dataclass(frozen=True)
class Answered:
    """What one model said.

    Args:
        step: optimizer steps that it has been trained; 0 is the base, without its adapter where it has one.
        samples: an answer to each prompt.
    """

    step: int
    samples: list[Sample]


class SampleAnswers(TrainerCallback):
    """Answers prompts at every evaluation; where a run has none, at every `eval_steps`, or at the end of each epoch.

    The main process answers; the others wait at their next exchange of gradients. A resumed run drops the answers after its
    checkpoint, as it drops log lines.

    Args:
        trainer: whose model answers, and whose trackers get the answers.
        tokenizer: of the model. prompts: to answer. max_new_tokens: the longest answer.
        eval_steps: steps between two answers in a run without evaluations; None answers at the end of each epoch.
    """

    def __init__(
        self,
        trainer: Trainer,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        eval_steps: int | None = None,
    ) -> None:
        self.trainer, self.tokenizer, self.prompts = trainer, tokenizer, list(prompts)
        self.max_new_tokens, self.eval_steps = max_new_tokens, eval_steps
        self.base: Answered | None = None
        self._last = 0  # the step that was answered last
        self._failed = False

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        kept = [one for one in read_samples(args.output_dir) if one.step <= state.global_step]
        kept = kept if state.global_step else []
        asked, model = [prompt.text for prompt in self.prompts], self.trainer.model
        self.base = kept[0] if kept and [sample.prompt for sample in kept[0].samples] == asked else None
        if self.base is None and (hasattr(model, "disable_adapter") or not state.global_step):
            say(f"oribi: answering {len(asked)} sample prompts with the base model")
            with without_adapter(model):
                self.base = self._answer(0)
            kept = [self.base, *(one for one in kept if one.step)]
        self._last = max((one.step for one in kept), default=0)
        with self._writing(args) as path:
            write_whole(path, "".join(map(_as_line, kept)))

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        self._answer_once(args, state)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if args.eval_strategy == "no" and self.eval_steps and state.global_step % self.eval_steps == 0:
            self._answer_once(args, state)

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        if args.eval_strategy == "no" and not self.eval_steps:
            self._answer_once(args, state)

    def _answer_once(self, args: TrainingArguments, state: TrainerState) -> None:
        # evaluate() may be called by hand, outside a training
        if not state.is_world_process_zero or state.global_step <= self._last:
            return
        self._last = state.global_step
        tuned = self._answer(state.global_step)
        with self._writing(args) as path, path.open("a", encoding="utf-8") as file:
            file.write(_as_line(tuned))
        rows = side_by_side(self.base, tuned)
        for line in _told(tuned, rows):
            say(line)
        log_table(self.trainer, "samples", rows, state.global_step)

    def _answer(self, step: int) -> Answered:
        model = self.trainer.model
        said = answer_prompts(model, self.tokenizer, self.prompts, self.max_new_tokens)
        base = base_model(model)
        if isinstance(base, DecoderForCausalLM):
            base.model.sessions.clear()  # what generation keeps for its next call is memory that training wants
        return Answered(step, samples_of(self.prompts, said))

    @contextmanager
    def _writing(self, args: TrainingArguments) -> Iterator[Path]:
        path = Path(args.output_dir) / SAMPLES_FILE
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield path
        except OSError as error:  # an answer is not worth a training
            if not self._failed:
                logger.warning(
                    "%s cannot be written: %s; training continues without it", path, error.strerror
                )
            self._failed = True


def side_by_side(base: Answered | None, tuned: Answered) -> list[dict[str, Any]]:
    """A row per prompt: prompt, expected (where the data has an answer), base, tuned and stopped."""
    expects = any(sample.expected for sample in tuned.samples)
    return [
        {
            "prompt": sample.prompt,
            **({"expected": sample.expected} if expects else {}),
            **({} if base is None else {"base": base.samples[i].said}),
            "tuned": sample.said,
            "stopped": sample.stopped,
        }
        for i, sample in enumerate(tuned.samples)
    ]


def _told(tuned: Answered, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The rows as lines of a terminal, each text cut to one line; of a prompt the last turn, which differs."""
    ended = sum(sample.stopped for sample in tuned.samples)
    yield f"oribi: answers at step {tuned.step:,} ({ended} of {len(rows)} ended by themselves)"
    for row, sample in zip(rows, tuned.samples):
        asked = next((text for _, text in reversed(sample.turns or []) if text.strip()), sample.prompt)
        row = {**row, "prompt": asked}
        for name in ("prompt", "expected", "base", "tuned"):
            if name in row:
                text = " ".join(printable(row[name]).split())
                yield f"  {name + ':':9} {text if len(text) <= _SHOWN else text[: _SHOWN - 3] + '...'}"


def _as_line(answered: Answered) -> str:
    entry = {"step": answered.step, "time": time(), "samples": [asdict(one) for one in answered.samples]}
    return json.dumps(entry, ensure_ascii=False) + "\n"


def read_samples(folder: str | os.PathLike) -> list[Answered]:
    """The answers in a run's folder by step, the base's first; none where there are none."""
    entries = json_lines(Path(folder) / SAMPLES_FILE)
    found = [Answered(entry["step"], [Sample(**one) for one in entry["samples"]]) for entry in entries]
    return sorted(found, key=lambda one: one.step)
