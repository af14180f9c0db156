"""Training on texts of uneven length, through each stack's own data preparation: what users of real data get.

    python benchmarks/uneven_rows.py --model llama-3.2-1b --stack oribi:auto --stack unsloth:default
    python benchmarks/uneven_rows.py --model llama-3.2-1b --stack oribi:auto --packing off --masked 0.6
    python benchmarks/uneven_rows.py --model tiny --stack oribi:auto --steps 4 --warmup 2          on a CPU

Texts of random letters, a token each, lognormal in length: 300 tokens in the middle, 410 on average, 2,040 at most, the same for all. With --masked,
rows are a prompt and a completion, and the prompt has that share of the tokens. Each step has micro-batches of --batch rows, or of
packs of --length tokens. Models and factors are those of train_step.py; each run is a process of its own with a time limit.

`ms` is the median of a step's own time, from its begin to its end as the GPU sees them. `tokens_per_s` are tokens of the rows over
all of these, padding not counted. `wall_tokens_per_s` are those of the whole window after warm-up, with batches, logs and waiting.
Nothing is synchronised for either. Results go to benchmarks/results/<gpu>_uneven_rows.json, and as a table to the terminal.
"""

import argparse
import json
import random
import statistics
import string
import subprocess
import sys
import time
from pathlib import Path

from train_step import HERE, MODES, TRAINING, gpu_name, launch, load, result_in, same_factors, versions

MEDIAN, SPREAD = 300, 0.79  # tokens, and of their logarithm
LONGEST = 2040


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", required=True, help="of random_model.py")
    parser.add_argument("--stack", action="append", required=True, help="STACK:MODE of train_step.py")
    parser.add_argument("--packing", action="append", choices=("off", "on"), help="both if not given")
    parser.add_argument("--masked", type=float, default=0.0, help="share of the tokens that is not trained")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row or pack")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=20, help="at least 1")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--models", type=Path, default=Path("/tmp/oribi-models"))
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--timeout", type=int, default=300, help="seconds per run")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("RESULT " + json.dumps(run_one(args, *args.one.split("|"))), flush=True)
        return
    unknown = [one for one in args.stack if one.partition(":")[2] not in MODES.get(one.partition(":")[0], ())]
    if unknown:
        parser.error(
            f"--stack {', '.join(unknown)}: there are {', '.join(f'{s}:{m}' for s in MODES for m in MODES[s])}"
        )
    for model in args.model:
        if not (args.models / model / "tokenizer_config.json").exists():
            subprocess.run([sys.executable, HERE / "random_model.py", model, args.models / model], check=True)
    args.output.mkdir(parents=True, exist_ok=True)
    rows, path = [], args.output
    for model in args.model:
        for packing in args.packing or ("off", "on"):
            for stack in args.stack:
                rows.append(one_run(args, model, stack, packing))
                print(line(rows[-1]), flush=True)
                gpu = next((row["gpu"] for row in rows if "gpu" in row), "cpu")
                path = args.output / f"{gpu}_uneven_rows.json"
                path.write_text(
                    json.dumps(rows, indent=1) + "\n"
                )  # what is measured stays, whatever comes next
    print("\n" + table(rows) + f"\n{path}")


def one_run(args: argparse.Namespace, model: str, stack: str, packing: str) -> dict:
    """What a run in a process of its own measured, or why it measured nothing."""
    failed = {"stack": stack, "model": model, "packing": packing == "on"}
    passed = ("masked", "batch", "accumulation", "length", "steps", "warmup", "rank", "models")
    settings = [text for name in passed for text in (f"--{name}", str(getattr(args, name)))]
    process = launch(
        [
            sys.executable,
            __file__,
            "--model",
            model,
            "--stack",
            stack,
            "--one",
            f"{model}|{stack}|{packing}",
            *settings,
        ]
    )
    try:
        output, _ = process.communicate(timeout=args.timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {**failed, "error": f"longer than {args.timeout} s"}
    return result_in(output) or {**failed, "error": "\n".join(output.strip().splitlines()[-25:])}


def run_one(args: argparse.Namespace, model_name: str, stack: str, packing: str) -> dict:
    """One stack on one model, in this process."""
    name, mode = stack.split(":")
    if name == "unsloth":
        import unsloth  # noqa: F401  it must come first
    import torch

    cuda = torch.cuda.is_available()
    model, tokenizer, trainer_class, config_class, extra = load(
        name, mode, args.models / model_name, args.length, args.rank
    )
    same_factors(model)
    settings = {
        **TRAINING,
        **extra,
        "packing": packing == "on",
        "gradient_accumulation_steps": args.accumulation,
    }
    del settings["dataset_kwargs"]  # the stack prepares the rows
    if not cuda:
        settings["bf16"] = False
    if not args.masked:
        settings["dataset_text_field"] = "text"
    config = config_class(
        per_device_train_batch_size=args.batch, max_steps=args.steps + args.warmup, max_length=args.length,
        weight_decay=0.01, **settings,
    )  # fmt: skip
    clock = clock_of(args, cuda)
    trainer = trainer_class(
        model=model, args=config, train_dataset=texts(args, packing == "on"),
        processing_class=tokenizer, callbacks=[clock],
    )  # fmt: skip
    collate = trainer.data_collator

    def counting(examples):
        clock.tokens.append(sum(len(example["input_ids"]) for example in examples))
        return collate(examples)

    trainer.data_collator = counting
    trainer.train()
    first, last = args.warmup * args.accumulation, (args.warmup + args.steps) * args.accumulation
    tokens, times = sum(clock.tokens[first:last]), clock.times()
    history = trainer.state.log_history
    counts = history[-1]
    return {
        "stack": stack, "model": model_name, "packing": packing == "on", "masked": args.masked, "batch": args.batch,
        "accumulation": args.accumulation, "gpu": gpu_name() if cuda else "cpu",
        "ms": statistics.median(times), "tokens_per_s": tokens / sum(times) * 1e3,
        "wall_tokens_per_s": tokens / clock.window, "tokens_per_step": tokens / args.steps,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if cuda else 0.0,
        **{how: counts.get(f"micro_steps_{how}") for how in ("replayed", "recorded", "eager")},
        "losses": [round(entry["loss"], 4) for entry in history if "loss" in entry],
        "versions": versions(name),
    }  # fmt: skip


def clock_of(args: argparse.Namespace, cuda: bool):
    """A callback that times steps without waiting for them."""
    import torch
    from transformers import TrainerCallback

    def mark():
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.marks, self.tokens, self.window = [], [], 0.0

        def on_step_begin(self, _, state, control, **kwargs):
            if cuda and state.global_step == 0:
                torch.cuda.reset_peak_memory_stats()
            self.began = mark()

        def on_step_end(self, _, state, control, **kwargs):
            if state.global_step > args.warmup:
                self.marks.append((self.began, mark()))
            if state.global_step in (args.warmup, args.warmup + args.steps):
                if cuda:  # the two ends of the window
                    torch.cuda.synchronize()
                self.window = time.perf_counter() - self.window

        def times(self) -> list[float]:
            """Milliseconds of each step."""
            return [a.elapsed_time(b) if cuda else (b - a) * 1e3 for a, b in self.marks]

    return Clock()


def texts(args: argparse.Namespace, packing: bool):
    """Rows for all steps of a run, as a user would have them: a column of texts, or prompts and completions."""
    from datasets import Dataset

    draw = random.Random(0)
    micro_batches = (args.steps + args.warmup) * args.accumulation
    # packs take about as many tokens as they have place for
    tokens_left = micro_batches * args.batch * args.length * 1.05 if packing else float("inf")
    rows = []
    while tokens_left > 0 and (packing or len(rows) < micro_batches * args.batch):
        count = min(max(int(draw.lognormvariate(0, SPREAD) * MEDIAN), 16), min(LONGEST, args.length - 8))
        text = "".join(draw.choices(string.ascii_letters, k=count))
        tokens_left -= count
        shown = int(args.masked * count)
        if args.masked:
            rows.append({"prompt": text[:shown], "completion": text[shown:]})
        else:
            rows.append({"text": text})
    return Dataset.from_list(rows)


def line(row: dict) -> str:
    head = f"{row['model']:14s} {row['stack']:16s} packing {'on ' if row['packing'] else 'off'}"
    if "error" in row:
        return f"{head} {row['error']}"
    return (
        f"{head} {row['ms']:8.1f} ms {row['tokens_per_s']:9.0f} tok/s {row['wall_tokens_per_s']:9.0f} by the clock "
        f"{row['peak_gib']:6.2f} GiB  replayed {row['replayed']} recorded {row['recorded']} eager {row['eager']}  "
        f"loss {row['losses'][0]:.4f} .. {row['losses'][-1]:.4f}"
    )


def table(rows: list[dict]) -> str:
    lines = [
        "| model | packing | stack | ms/step | tokens/s | by the clock | peak GiB | replayed, recorded, eager |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        head = f"| {r['model']} | {'on' if r['packing'] else 'off'} | {r['stack']} |"
        if "error" in r:
            lines.append(f"{head} {r['error'].splitlines()[-1][:60]} | | | | |")
        else:
            lines.append(
                f"{head} {r['ms']:.1f} | {r['tokens_per_s']:.0f} | {r['wall_tokens_per_s']:.0f} | {r['peak_gib']:.2f} | "
                f"{r['replayed']}, {r['recorded']}, {r['eager']} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
