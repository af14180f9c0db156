"""Tokens per second, time to the first token and memory of `generate`: oribi and installed peers.

    python benchmarks/generate.py --limit 1500
    python benchmarks/generate.py --model llama-3.2-1b --grpo 8x512

By default: every model of MODELS, every stack that is installed, batches of 1, 16 and 64, prompts of 128 and 2,048 tokens,
256 new tokens. Every stack loads the same 4-bit checkpoint of random weights (see random_model.py) with the same LoRA (r 16,
seven projections, the same values in every LoRA matrix), and continues the same prompts. No token ends an answer.

One process loads a model once for one stack and measures all sizes; processes of different stacks alternate. The first call of
a size, which may compile and record, is reported as first_call_s. Then the first token is the median of three calls for one
token, and the decode speed is that of the whole call without its first token, the better of two where a call takes less than
SLOW seconds; memory is counted in those. Results are written after each size, to benchmarks/results/<gpu>_generate.json, and
replace earlier ones of the same size. --limit bounds the whole; each process gets an equal share of what is left, and ends
before a size that would not fit. With --grpo, steps of TRL's GRPOTrainer on one prompt are timed instead, into
<gpu>_grpo.json. Without a GPU, everything runs on the CPU (`--model tiny` tries it in a minute), into cpu_*.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from train_step import HERE, gpu_name, load, same_factors, versions

MODELS = ("llama-3.2-1b", "llama-3.1-8b", "gemma-2-2b")
STACKS = {"oribi": "oribi", "hf": "bitsandbytes", "unsloth": "unsloth"}  # and what each needs
SAMPLING = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0},
}
SLOW = 6.0
FEW_TOKENS = 16  # of a peer's first call, which compiles; oribi's first call records a step for all tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", help="of random_model.py; default: " + ", ".join(MODELS))
    parser.add_argument("--stack", action="append", choices=STACKS, help="default: those installed")
    parser.add_argument("--batch", action="append", type=int)
    parser.add_argument("--prompt", action="append", type=int, help="tokens")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--choice", action="append", choices=SAMPLING, help="default: greedy")
    parser.add_argument("--grpo", metavar="COMPLETIONSxTOKENS", help="time GRPO steps instead")
    parser.add_argument("--pairs", type=int, default=1, help="how often each stack runs")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--models", type=Path, default=Path("/tmp/oribi-models"))
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--limit", type=float, default=3600, help="seconds of the whole")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        measure = run_grpo if args.grpo else run_generate
        for row in measure(*args.one.split("|"), args):
            print("RESULT " + json.dumps(row), flush=True)
        return
    end = time.time() + args.limit
    stacks = args.stack or [name for name, package in STACKS.items() if find_spec(package)]
    runs = [(m, s) for m in args.model or MODELS for _ in range(args.pairs) for s in stacks]
    path = None
    for index, (model, stack) in enumerate(runs):
        if not (args.models / model / "tokenizer_config.json").exists():
            subprocess.run([sys.executable, HERE / "random_model.py", model, args.models / model], check=True)
        share = (end - time.time()) / (len(runs) - index)
        for row in run_process(model, stack, share, args):
            print(summary(row), flush=True)
            path = write(row, args) or path
    print(f"\n{path}")


def write(row: dict[str, Any], args: argparse.Namespace) -> Path | None:
    """Adds a row to its GPU's file of results, in place of an earlier one of the same size; where it was written."""
    if "error" in row:
        return None
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"{row['gpu']}_{'grpo' if args.grpo else 'generate'}.json"
    kept = json.loads(path.read_text()) if path.exists() else []
    kept = [other for other in kept if key(other) != key(row)]
    path.write_text(json.dumps([*kept, row], indent=1) + "\n")
    return path


def key(row: dict[str, Any]) -> tuple:
    """What a row of results is about."""
    return tuple(row.get(name) for name in ("stack", "model", "batch", "prompt", "new_tokens", "choice"))


def run_process(model: str, stack: str, share: float, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of one stack and model as they are measured, and one that says why if the process does not end well.

    Args:
        model, stack: of the process. share: seconds that it may take. args: of this program.
    """
    until = time.time() + share
    command = [sys.executable, __file__, *sys.argv[1:], "--one", f"{model}|{stack}", "--until", str(until)]
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    timer = threading.Timer(max(share, 1), process.kill)
    timer.start()
    last: deque[str] = deque(maxlen=25)
    for line in process.stdout:
        if line.startswith("RESULT "):
            yield json.loads(line.removeprefix("RESULT "))
        else:
            last.append(line.rstrip())
    timer.cancel()
    if process.wait() != 0:
        late = time.time() >= until
        reason = f"stopped after its share of {share:.0f} s" if late else "\n".join(last)
        yield {"stack": stack, "model": model, "error": reason}


def loaded(model_name: str, stack: str, args: argparse.Namespace, length: int) -> tuple[Any, Any]:
    """The stack's model for inference, with LoRA of the same values, and its tokenizer."""
    mode = "auto" if stack == "oribi" else "default"
    model, tokenizer, *_ = load(stack, mode, args.models / model_name, length, args.rank)
    same_factors(model)
    return model, tokenizer


def run_generate(model_name: str, stack: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
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
    longest = 0.0
    for prompt in prompts:
        for batch in batches:
            ids = torch.randint(3, model.config.vocab_size, (batch, prompt), generator=generator)
            for choice in args.choice or ["greedy"]:
                if time.time() + longest > args.until:
                    print(f"no time for batch {batch}, prompt {prompt}")
                    sys.exit(1)
                started = time.time()
                row = {
                    "stack": stack, "model": model_name, "batch": batch, "prompt": prompt,
                    "new_tokens": args.new_tokens, "choice": choice,
                }  # fmt: skip
                few = args.new_tokens if stack == "oribi" else min(FEW_TOKENS, args.new_tokens)
                try:
                    row |= measured(model, ids.to(model.device), args.new_tokens, few, SAMPLING[choice])
                except torch.OutOfMemoryError:
                    row["error"] = "out of memory"
                    torch.cuda.empty_cache()
                longest = max(longest, time.time() - started)
                yield {**row, "gpu": device_name(), "versions": versions(stack)}


def measured(
    model: Any, ids: Any, new_tokens: int, first_tokens: int, settings: dict[str, Any]
) -> dict[str, float]:
    """Figures of one size.

    Args:
        model: for inference. ids: [batch, prompt]. new_tokens: of every row. first_tokens: of the first call.
        settings: of `generate`.
    """
    import torch

    def seconds(tokens: int) -> float:
        synchronize()
        started = time.perf_counter()
        with torch.no_grad():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=None,
                pad_token_id=2, use_cache=True, **settings,
            )  # fmt: skip
        synchronize()
        assert out.shape[1] == ids.shape[1] + tokens, out.shape
        return time.perf_counter() - started

    first_call = seconds(first_tokens)
    seconds(1)
    first = statistics.median(seconds(1) for _ in range(3))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    whole = seconds(new_tokens)
    if whole < SLOW:
        whole = min(whole, seconds(new_tokens))
    return {
        "tokens_per_s": len(ids) * (new_tokens - 1) / max(whole - first, 1e-9), "first_token_s": first,
        "whole_s": whole, "first_call_s": first_call, "peak_gib": peak_gib(),
    }  # fmt: skip


def synchronize() -> None:
    """Waits for the GPU, where there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_gib() -> float:
    """GiB that were allocated at most on the GPU since the count began; 0 without one."""
    import torch

    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def device_name() -> str:
    """As files of results are named."""
    import torch

    return gpu_name() if torch.cuda.is_available() else "cpu"


def run_grpo(model_name: str, stack: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
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
            synchronize()
            self.started = time.perf_counter()

        def on_step_end(self, *_, **kwargs):
            synchronize()
            self.times.append(time.perf_counter() - self.started)

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(sum(ids) % 7) for ids in completion_ids]

    on_gpu = torch.cuda.is_available()
    config = GRPOConfig(
        output_dir="/tmp/oribi-bench", per_device_train_batch_size=completions, num_generations=completions,
        max_completion_length=tokens, max_steps=4, learning_rate=1e-6, beta=0.0, bf16=on_gpu, use_cpu=not on_gpu,
        report_to="none", save_strategy="no", logging_steps=1, gradient_checkpointing=stack != "oribi",
        optim="adamw_8bit" if on_gpu else "adamw_torch", generation_kwargs={"min_new_tokens": tokens},
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": "What is the sum of one and two, and why?"}] * 8)
    trainer = GRPOTrainer(
        model=model, reward_funcs=reward, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()]
    )  # fmt: skip
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    step = statistics.median(Clock.times[1:])
    yield {
        "stack": stack, "model": model_name, "batch": completions, "new_tokens": tokens, "choice": "sampled",
        "tokens_per_s": completions * tokens / step, "step_s": step, "first_step_s": Clock.times[0],
        "peak_gib": peak_gib(), "gpu": device_name(), "versions": versions(stack),
    }  # fmt: skip


def summary(row: dict[str, Any]) -> str:
    head = f"{row['model']:14s} {row['stack']:8s}"
    if "batch" in row:
        head += f" {row['choice']:8s} batch {row['batch']:3d} prompt {row.get('prompt', 'GRPO')!s:>5s} + {row['new_tokens']}"
    if "error" in row:
        return f"{head} {row['error']}"
    first = f"step {row['step_s']:.2f} s" if "step_s" in row else f"first token {row['first_token_s']:.3f} s"
    return f"{head} {row['tokens_per_s']:9.1f} tokens/s  {first}  peak {row['peak_gib']:.2f} GiB"


if __name__ == "__main__":
    main()
