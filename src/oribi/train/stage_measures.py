"""How good a model of a stage is on rows that it was not trained on: which answer it prefers, and what its own answers earn."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from oribi.data.collate import PaddedCollator
from oribi.data.turns import turns_of
from oribi.errors import ConfigError
from oribi.models.generate import inference_mode_of, prompt_ids
from oribi.models.unwrap import base_model
from oribi.train.evaluate import Prompt, Sample, answer_prompts, samples_of, without_adapter
from oribi.train.rewards import RewardFunction

BATCH_TOKENS = 2048  # of one forward, whose logits are formed
# stage -> the columns of the answers whose likelihood is compared
COMPARED = {"dpo": ("chosen", "rejected"), "orpo": ("chosen", "rejected"), "kto": ("completion",)}


def preferences_of(
    stage: str, model: nn.Module, rows: Dataset, *, beta: float | None = None, limit: int | None = None
) -> dict[str, float]:
    """What a trained model prefers, on prepared rows.

    Args:
        stage: dpo, orpo, kto or reward. model: as trained, with its adapter.
        rows: as `oribi.data.preferences.prepare_preferences` makes them. beta: of the run, which rewards are scaled by.
        limit: use only the first rows, this many.

    Returns:
        accuracy: share of pairs whose chosen answer has the higher reward; of kto, of good and bad answers on their side of 0.
        margin: mean difference of the rewards. rewards_chosen, rewards_rejected: their means.

        The reward of an answer is the model's score (reward), beta times its mean log-probability per token (orpo), or beta times
        how much likelier it became than without the adapter (dpo, kto).

    Raises:
        ConfigError: the model has no adapter to compare with.
    """
    rows = rows.select(range(min(len(rows), limit or len(rows))))
    if not len(rows):
        return {}
    if stage == "reward":
        better, worse = (_scores(model, rows[f"{name}_ids"]) for name in ("chosen", "rejected"))
        return _of_pairs(better, worse)
    if stage != "orpo" and not hasattr(model, "disable_adapter"):
        raise ConfigError(
            f"stage {stage} compares the model with itself without its adapter, and this model has none"
        )
    scale = 1.0 if beta is None else beta
    rewards = [
        scale * _gains(stage, model, rows["prompt_ids"], rows[f"{name}_ids"]) for name in COMPARED[stage]
    ]
    if len(rewards) == 2:
        return _of_pairs(*rewards)
    good = torch.tensor(rows["label"], dtype=torch.bool)
    right = torch.where(good, rewards[0] > 0, rewards[0] < 0).double().mean()
    better, worse = (rewards[0][part].mean() if part.any() else torch.tensor(0.0) for part in (good, ~good))
    return _figures(right, better, worse)


def _of_pairs(better: torch.Tensor, worse: torch.Tensor) -> dict[str, float]:
    return _figures((better > worse).double().mean(), better.mean(), worse.mean())


def _figures(accuracy: torch.Tensor, better: torch.Tensor, worse: torch.Tensor) -> dict[str, float]:
    found = {
        "accuracy": accuracy,
        "margin": better - worse,
        "rewards_chosen": better,
        "rewards_rejected": worse,
    }
    return {name: float(value) for name, value in found.items()}


def _gains(stage: str, model: nn.Module, prompts: list[list[int]], said: list[list[int]]) -> torch.Tensor:
    """By how much each answer became likelier; of orpo, which has no reference, its mean log-probability per token."""
    tuned = answer_log_probs(model, prompts, said)
    if stage == "orpo":
        return tuned / torch.tensor([max(len(ids), 1) for ids in said])
    with without_adapter(model):
        return tuned - answer_log_probs(model, prompts, said)


def answer_log_probs(
    model: nn.Module, prompts: Sequence[list[int]], said: Sequence[list[int]]
) -> torch.Tensor:
    """Log-probability of each answer to its prompt, summed over its tokens, [rows] float64.

    Args:
        model: with or without adapter, in any mode. prompts, said: token ids.
    """
    collate, device, found = PaddedCollator(0), base_model(model).device, []
    whole = [
        {"input_ids": [*p, *a], "labels": [-100] * len(p) + list(a)}
        for p, a in zip(prompts, said, strict=True)
    ]
    with torch.no_grad(), inference_mode_of(model):
        for batch in _batches(whole):
            inputs = {k: v.to(device) for k, v in collate(batch).items() if torch.is_tensor(v)}
            labels = inputs.pop("labels")[:, 1:]
            logits = model(**inputs, use_cache=False).logits[:, :-1].float()
            picked = logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0] - logits.logsumexp(-1)
            found += (picked.double() * (labels != -100)).sum(-1).tolist()
    return torch.tensor(found, dtype=torch.float64)


def _scores(model: nn.Module, texts: Sequence[list[int]]) -> torch.Tensor:
    """The score of each whole conversation by a reward model, [rows] float64."""
    pad = base_model(model).config.get_text_config().pad_token_id or 0
    collate, device, found = PaddedCollator(pad), base_model(model).device, []
    with torch.no_grad(), inference_mode_of(model):
        for batch in _batches([{"input_ids": list(ids), "labels": list(ids)} for ids in texts]):
            inputs = {k: v.to(device) for k, v in collate(batch).items() if torch.is_tensor(v)}
            inputs.pop("labels")
            found += model(**inputs, use_cache=False).logits[:, 0].double().tolist()
    return torch.tensor(found, dtype=torch.float64)


def _batches(rows: list[dict[str, list[int]]]) -> list[list[dict[str, list[int]]]]:
    """Rows of about `BATCH_TOKENS`, padding counted."""
    found: list[list[dict[str, list[int]]]] = []
    longest = 0
    for row in rows:
        longest = max(longest, len(row["input_ids"]))
        if not found or longest * (len(found[-1]) + 1) > BATCH_TOKENS:
            found.append([])
            longest = len(row["input_ids"])
        found[-1].append(row)
    return found


def texts_of(stage: str, rows: Dataset) -> Dataset | None:
    """Prompts with their better answers as input_ids and labels, for what compares files on texts; None where there are none.

    Args:
        stage: of the rows. rows: as `oribi.data.preferences.prepare_preferences` makes them.
    """
    answer = COMPARED.get(stage, (None,))[0]
    if answer is None:
        return None
    if stage == "kto":
        rows = rows.filter(lambda row: row["label"], desc="Taking good answers")
    found = [
        {"input_ids": [*row["prompt_ids"], *row[f"{answer}_ids"]],
         "labels": [-100] * len(row["prompt_ids"]) + list(row[f"{answer}_ids"])}
        for row in rows
    ]  # fmt: skip
    return Dataset.from_list(found) if found else None


def prompts_of_stage(
    stage: str, tokenizer: Any, rows: Dataset, count: int
) -> list[tuple[dict[str, Any], Prompt]]:
    """The first prompts of a stage's rows that differ, each with its row.

    Args:
        stage: dpo, orpo, kto or grpo. tokenizer: of the model. rows: prepared. count: the most.
    """
    found: list[tuple[dict[str, Any], Prompt]] = []
    expected = {"dpo": "chosen_ids", "orpo": "chosen_ids", "kto": "completion_ids"}.get(stage)
    for row in rows:
        if len(found) == count:
            break
        ids = prompt_ids(tokenizer, row.get("prompt_ids") or row["prompt"])
        if all(ids != prompt.ids for _, prompt in found):
            texts = (
                tokenizer.decode(part, skip_special_tokens=True).strip()
                for part in (ids, row[expected] if expected else [])
            )
            found.append((row, Prompt(ids, *texts, turns_of(tokenizer, ids))))
    return found


def stage_samples(
    stage: str,
    model: nn.Module,
    tokenizer: Any,
    rows: Dataset,
    rewards: Sequence[RewardFunction],
    count: int,
    max_new_tokens: int,
) -> list[Sample]:
    """Greedy answers to the first prompts of a stage's rows; of grpo with their rewards.

    Args:
        stage: dpo, orpo, kto or grpo. model, tokenizer: as loaded. rows: prepared. rewards: functions that score answers.
        count: how many. max_new_tokens: the longest answer.
    """
    chosen = prompts_of_stage(stage, tokenizer, rows, count)
    prompts = [prompt for _, prompt in chosen]
    said = answer_prompts(model, tokenizer, prompts, max_new_tokens)
    samples = samples_of(prompts, said)
    if not rewards or not samples:
        return samples
    earned = score_answers(tokenizer, [row for row, _ in chosen], [one.text for one in said], rewards)
    return [replace(sample, rewards=of_one) for sample, of_one in zip(samples, earned)]


def score_answers(
    tokenizer: Any, rows: Sequence[dict[str, Any]], said: Sequence[str], rewards: Sequence[RewardFunction]
) -> list[dict[str, float | None]]:
    """What each function gives each answer, as in training.

    Args:
        tokenizer: of the model. rows: with prompt, and the columns that functions take. said: an answer to each. rewards: to call.
    """
    talks = not isinstance(rows[0]["prompt"], str)
    given = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    given |= {
        "prompts": [row["prompt"] for row in rows],
        "completions": [[{"role": "assistant", "content": text}] if talks else text for text in said],
        "completion_ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in said],
        "trainer_state": None,
        "log_extra": lambda column, values: None,
        "log_metric": lambda name, value: None,
    }
    by_function = {one.__name__: one(**given) for one in rewards}
    return [{name: values[i] for name, values in by_function.items()} for i in range(len(rows))]
