"""Tokens per second, time to the first token and memory of `generate`: oribi and installed peers.

    python benchmarks/generate.py --model llama-3.1-8b --stack oribi --stack hf --batch 1 --batch 16 --prompt 128
    python benchmarks/generate.py --model llama-3.2-1b --stack oribi --stack hf --grpo 8x512

Every stack loads the same 4-bit checkpoint of random weights (see random_model.py) with the same LoRA (r 16, seven
projections, the same values in every LoRA matrix), and continues the same prompts. No token ends an answer. A process runs
all sizes of one stack and model; processes of different stacks alternate. A size's first call, which may compile and record,
is reported as first_call_s. Then the first token is the median of three calls for one token, and the decode speed comes of
the best of two whole calls without their first token; memory is counted in those. With --grpo, steps of TRL's GRPOTrainer
on one prompt are timed instead. Results go to benchmarks/results/<gpu>_generate.json and, as a table, to the terminal.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from train_step import HERE, gpu_name, load, result_in, same_factors, versions

SAMPLING = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", required=True, help="of random_model.py")
    parser.add_argument("--stack", action="append", required=True, help="oribi, hf or unsloth")
    parser.add_argument("--batch", action="append", type=int)
    parser.add_argument("--prompt", action="append", type=int, help="tokens")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--choice", action="append", choices=SAMPLING, help="default: greedy")
    parser.add_argument("--grpo", metavar="COMPLETIONSxTOKENS", help="time GRPO steps instead")
    parser.add_argument("--pairs", type=int, default=1, help="how often each stack runs")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--models", type=Path, default=Path("/tmp/oribi-models"))
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--timeout", type=int, default=500, help="seconds per process")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        run = run_grpo if args.grpo else run_generate
        print("RESULT " + json.dumps(run(*args.one.split("|"), args)), flush=True)
        return
    rows: list[dict[str, Any]] = []
    for model in args.model:
        if not (args.models / model / "tokenizer_config.json").exists():
            subprocess.run([sys.executable, HERE / "random_model.py", model, args.models / model], check=True)
        for stack in args.stack * args.pairs:
            found = run_process(model, stack, args)
            for row in found:
                print(summary(row), flush=True)
            rows += found
    gpu = next((row["gpu"] for row in rows if "gpu" in row), "cpu")
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"{gpu}_generate.json"
    kept = json.loads(path.read_text()) if path.exists() else []
    measured = {key(row) for row in rows if "error" not in row}
    kept = [row for row in kept if key(row) not in measured]
    path.write_text(json.dumps(kept + [row for row in rows if "error" not in row], indent=1) + "\n")
    print(f"\n{path}")


def key(row: dict[str, Any]) -> tuple:
    """What a row of results is about; a later measurement replaces an earlier one."""
    return tuple(row.get(name) for name in ("stack", "model", "batch", "prompt", "new_tokens", "choice"))


def run_process(model: str, stack: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one stack and model, or one row that says why there is none."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", f"{model}|{stack}"]
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    failed = {"stack": stack, "model": model}
    try:
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=args.timeout
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return [{**failed, "error": f"longer than {args.timeout} s"}]
    found = result_in(done.stdout)
    return found or [{**failed, "error": "\n".join(done.stdout.strip().splitlines()[-25:])}]


def loaded(model_name: str, stack: str, args: argparse.Namespace, length: int) -> tuple[Any, Any]:
    """The stack's model for inference, with LoRA of the same values, and its tokenizer."""
    mode = "auto" if stack == "oribi" else "default"
    model, tokenizer, *_ = load(stack, mode, args.models / model_name, length, args.rank)
    same_factors(model)
    return model, tokenizer


def run_generate(model_name: str, stack: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All sizes of one stack and model, in this process."""
    if stack == "unsloth":
        import unsloth  # noqa: F401  it must come first
    import torch

    batches, prompts = args.batch or [1, 16, 64], args.prompt or [128, 2048]
    model, _ = loaded(model_name, stack, args, max(prompts) + args.new_tokens)
    if stack == "unsloth":
        unsloth.FastLanguageModel.for_inference(model)
    model.eval()
    model.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(0)
    rows = []
    for prompt in prompts:
        for batch in batches:
            ids = torch.randint(3, model.config.vocab_size, (batch, prompt), generator=generator)
            for choice in args.choice or ["greedy"]:
                row = {
                    "stack": stack, "model": model_name, "batch": batch, "prompt": prompt, "new_tokens": args.new_tokens,
                    "choice": choice,
                }  # fmt: skip
                try:
                    row |= measured(model, ids.to(model.device), args.new_tokens, SAMPLING[choice])
                except torch.OutOfMemoryError:
                    row["error"] = "out of memory"
                    torch.cuda.empty_cache()
                rows.append({**row, "gpu": gpu_name(), "versions": versions(stack)})
    return rows


def measured(model: Any, ids: Any, new_tokens: int, settings: dict[str, Any]) -> dict[str, float]:
    """Figures of one size.

    Args:
        model: for inference. ids: [batch, prompt]. new_tokens: of every row. settings: of `generate`.
    """
    import torch

    def seconds(tokens: int) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        with torch.no_grad():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=None,
                pad_token_id=2, **settings,
            )  # fmt: skip
        torch.cuda.synchronize()
        assert out.shape[1] == ids.shape[1] + tokens, out.shape
        return time.perf_counter() - started

    first_call = seconds(new_tokens)
    seconds(1)
    first = statistics.median(seconds(1) for _ in range(3))
    torch.cuda.reset_peak_memory_stats()
    whole = min(seconds(new_tokens) for _ in range(2))
    return {
        "tokens_per_s": len(ids) * (new_tokens - 1) / max(whole - first, 1e-9), "first_token_s": first,
        "whole_s": whole, "first_call_s": first_call, "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }  # fmt: skip


def run_grpo(model_name: str, stack: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds per step of TRL's GRPOTrainer, in this process."""
    if stack == "unsloth":
        import unsloth  # noqa: F401  it must come first
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    completions, tokens = (int(n) for n in args.grpo.split("x"))
    model, tokenizer = loaded(model_name, stack, args, 64 + tokens)
    if stack == "oribi":
        from oribi.trl import GRPOConfig, GRPOTrainer
    else:
        from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):
        times: list[float] = []

        def on_step_begin(self, *_, **kwargs):
            torch.cuda.synchronize()
            self.started = time.perf_counter()

        def on_step_end(self, *_, **kwargs):
            torch.cuda.synchronize()
            self.times.append(time.perf_counter() - self.started)

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(sum(ids) % 7) for ids in completion_ids]

    config = GRPOConfig(
        output_dir="/tmp/oribi-bench", per_device_train_batch_size=completions, num_generations=completions,
        max_completion_length=tokens, max_steps=4, learning_rate=1e-6, beta=0.0, bf16=True, report_to="none",
        save_strategy="no", logging_steps=1, gradient_checkpointing=stack != "oribi", optim="adamw_8bit",
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": "What is the sum of one and two, and why?"}] * 8)
    trainer = GRPOTrainer(
        model=model, reward_funcs=reward, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()]
    )  # fmt: skip
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    step = statistics.median(Clock.times[1:])
    return [{
        "stack": stack, "model": model_name, "batch": completions, "prompt": "GRPO", "new_tokens": tokens,
        "choice": "sampled", "tokens_per_s": completions * tokens / step, "step_s": step,
        "first_step_s": Clock.times[0], "peak_gib": torch.cuda.max_memory_allocated() / 2**30, "gpu": gpu_name(),
        "versions": versions(stack),
    }]  # fmt: skip


def summary(row: dict[str, Any]) -> str:
    head = f"{row['model']:14s} {row['stack']:8s}"
    if "batch" in row:
        head += (
            f" {row['choice']:8s} batch {row['batch']:3d} prompt {row['prompt']!s:>5s} + {row['new_tokens']}"
        )
    if "error" in row:
        return f"{head} {row['error']}"
    first = f"step {row['step_s']:.2f} s" if "step_s" in row else f"first token {row['first_token_s']:.3f} s"
    return f"{head} {row['tokens_per_s']:9.1f} tokens/s  {first}  peak {row['peak_gib']:.2f} GiB"


if __name__ == "__main__":
    main()
