"""Speed of a QLoRA step on several GPUs of one machine, beside one of them: oribi with whole or sharded weights, and peers.

    python benchmarks/many_gpus.py --gpus 1,2 --workload llama-3.1-8b:2x2048 --mode ddp --mode fsdp
    python benchmarks/many_gpus.py --gpus 1,2 --workload llama-3.2-1b:2xchat --stack oribi:auto --stack hf:default
    python benchmarks/many_gpus.py --gpus 1,2 --workload llama-3.1-8b:1x131072 --mode context --accumulation 1 --steps 5 --warmup 2
    python benchmarks/many_gpus.py --gpus 1,2 --workload tiny:2x64 --steps 4 --warmup 1     on a CPU

Each GPU gets the same number of rows, so that `scaling`, the tokens/s of all by those of one, is 2 at best for two GPUs. Milliseconds are
medians of synchronised steps after warm-up, of the slowest process; `peak_gib` is the largest of all. TOKENS may be "chat": rows of
uneven length, the same for all: milliseconds are means there, of steps below three times the median, because one that compiles a
kernel takes seconds; its warm-up must be long enough for the shapes to come by. Modes: ddp has whole weights on each GPU, fsdp shards them (oribi only). In mode context (oribi only) all GPUs
share each row, so that the same rows take less time. One process also takes the rows of all GPUs by accumulation, and
`gradient_difference` is the relative distance between the gradients of the first step; not with --speed-only.
Results go to benchmarks/results/<gpu>_many_gpus.json, and as a table to the terminal.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

from train_step import HERE, TRAINING, gpu_name, load, result_in, same_factors, trained, versions

from oribi.launch import free_port, rank_variables

COMPARED_STEP = 0  # later ones differ by what Adam makes of rounding
LONGEST_CHAT = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--workload", action="append", required=True, help="MODEL:ROWSxTOKENS, or MODEL:ROWSxchat"
    )
    parser.add_argument("--gpus", default="1,2", help="numbers of processes, with commas")
    parser.add_argument(
        "--mode", action="append", choices=("ddp", "fsdp", "context"), help="ddp if not given"
    )
    parser.add_argument(
        "--stack", action="append", help="STACK:MODE of train_step.py; oribi:auto if not given"
    )
    parser.add_argument("--accumulation", default="1,4", help="micro-batches per step, with commas")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--models", type=Path, default=Path("/tmp/oribi-models"))
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--timeout", type=int, default=400, help="seconds per run")
    parser.add_argument("--speed-only", action="store_true", help="gradients are not compared")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("RESULT " + json.dumps(run_one(args, **json.loads(args.one))), flush=True)
        return
    for model in {workload.split(":")[0] for workload in args.workload}:
        if not (args.models / model / "tokenizer_config.json").exists():
            subprocess.run([sys.executable, HERE / "random_model.py", model, args.models / model], check=True)
    counts = [int(count) for count in args.gpus.split(",")]
    args.output.mkdir(parents=True, exist_ok=True)
    rows, path = [], args.output
    shapes = product(
        args.workload,
        args.stack or ["oribi:auto"],
        map(int, args.accumulation.split(",")),
        args.mode or ["ddp"],
    )
    with tempfile.TemporaryDirectory() as folder:
        for workload, stack, accumulation, mode in shapes:
            rows += compare(args, Path(folder), counts, workload, stack, mode, accumulation)
            name = next((row["gpu"] for row in rows if "gpu" in row), "cpu")
            path = args.output / f"{name}_many_gpus.json"
            path.write_text(json.dumps(rows, indent=1) + "\n")  # what is measured stays, whatever comes next
    print("\n" + table(rows) + f"\n{path}")


def compare(
    args: argparse.Namespace,
    folder: Path,
    counts: list[int],
    workload: str,
    stack: str,
    mode: str,
    accumulation: int,
) -> list[dict]:
    """A stack in one mode on each number of GPUs, with the scaling from one and the distance of its gradients."""
    rows = []
    for count in counts:
        shape = {"workload": workload, "stack": stack, "mode": mode, "accumulation": accumulation}
        found = together(args, count, gradients=str(folder / "several.pt"), **shape)
        one = next((row for row in rows if row["gpus"] == 1 and "ms" in row), None)
        readers = readers_of(mode, count)
        if "ms" in found and one is not None and count > 1:
            found["scaling"] = found["tokens_per_s"] / one["tokens_per_s"]
        if "ms" in found and count > 1 and not args.speed_only:
            shape["accumulation"] *= readers
            alone = together(
                args,
                1,
                gradients=str(folder / "one.pt"),
                max_steps=COMPARED_STEP + 1,
                processes=count,
                **shape,
            )
            if "ms" in alone:
                found["gradient_difference"] = distance(folder / "one.pt", folder / "several.pt")
                found["losses_of_one"] = alone["losses"][: COMPARED_STEP + 1]
        rows.append(found)
        print(line(found), flush=True)
    return rows


def readers_of(mode: str, count: int) -> int:
    """Processes that read different rows."""
    return 1 if mode == "context" else count


def together(args: argparse.Namespace, count: int, **run: object) -> dict:
    """One run in so many processes: what the slowest of them measured."""
    failed = {"gpus": count, **{name: run[name] for name in ("workload", "stack", "mode", "accumulation")}}
    command = [
        sys.executable, __file__, "--workload", str(run["workload"]), "--one", json.dumps({"count": count, **run}),
        "--steps", str(args.steps), "--warmup", str(args.warmup), "--rank", str(args.rank), "--models", str(args.models),
    ]  # fmt: skip
    port = free_port()
    common = {
        **os.environ, "HF_HUB_OFFLINE": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "UNSLOTH_DISABLE_STATISTICS": "1", "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // count, 1)),
    }  # fmt: skip
    started = [
        subprocess.Popen(
            command, env=common | (rank_variables(rank, count, port) if count > 1 else {}), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(count)
    ]  # fmt: skip
    deadline = time.monotonic() + args.timeout
    try:
        outputs = [p.communicate(timeout=max(deadline - time.monotonic(), 1))[0] for p in started]
    except subprocess.TimeoutExpired:
        return {**failed, "error": f"longer than {args.timeout} s"}
    finally:
        for process in started:
            process.kill()
    found = [result_in(output) for output in outputs]
    if not all(found):
        worst = next(output for output, result in zip(outputs, found) if not result)
        return {**failed, "error": "\n".join(worst.strip().splitlines()[-25:])}
    slowest = max(found, key=lambda row: row["ms"])
    tokens = sum(row["tokens_per_step"] for row in found)
    return {
        **slowest,
        "gpus": count,
        "tokens_per_s": tokens / slowest["ms"] * 1e3,
        "peak_gib": max(row["peak_gib"] for row in found),
        "losses": found[0]["losses"],
    }


def run_one(
    args: argparse.Namespace,
    workload: str,
    stack: str,
    mode: str,
    accumulation: int,
    count: int,
    gradients: str,
    max_steps: int = 0,
    processes: int = 0,
) -> dict:
    """One process of a run. `processes`: for how many the rows were drawn, where one process takes all of them."""
    name, policy = stack.split(":")
    model_name, shape = workload.split(":")
    rows, length = shape.split("x")
    rows, longest = int(rows), LONGEST_CHAT if length == "chat" else int(length)
    steps = max_steps or args.steps + args.warmup
    if name == "unsloth":
        import unsloth  # noqa: F401  it must come first
    import torch
    from transformers import TrainerCallback

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    model, tokenizer, trainer_class, config_class, extra = load(
        name, policy, args.models / model_name, longest, args.rank
    )
    same_factors(model)
    micro_batches = (args.steps + args.warmup) * accumulation * (1 if processes else readers_of(mode, count))
    data = dataset(model.config.vocab_size, rows * micro_batches, length)
    settings = {**TRAINING, **extra, "gradient_accumulation_steps": accumulation}
    if mode == "fsdp":
        settings["fsdp"] = True
    if mode == "context":
        settings["context_parallel"] = count
    if not cuda:
        settings["bf16"] = False

    class Clock(TrainerCallback):
        times: list[float] = []

        def on_step_begin(self, _, state, control, **kwargs):
            if cuda:
                if state.global_step == 0:
                    torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            self.started = time.perf_counter()

        def on_pre_optimizer_step(self, _, state, control, **kwargs):
            if state.global_step == COMPARED_STEP and int(os.environ.get("RANK", "0")) == 0:
                torch.save([p.grad.float().cpu().clone() for p in trained(model)], gradients)

        def on_step_end(self, _, state, control, **kwargs):
            if cuda:
                torch.cuda.synchronize()
            self.times.append((time.perf_counter() - self.started) * 1e3)

    clock = Clock()
    config = config_class(
        per_device_train_batch_size=rows, max_steps=steps, max_length=longest, weight_decay=0.01,
        train_sampling_strategy="sequential", **settings,
    )  # fmt: skip
    trainer = trainer_class(
        model=model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[clock]
    )
    trainer.train()
    first = min(args.warmup, len(clock.times) - 1)
    limit = 3 * statistics.median(clock.times[first:])
    counted = [step for step in range(first, len(clock.times)) if clock.times[step] <= limit]
    times = [clock.times[step] for step in counted]
    step_rows = len(data) // (args.steps + args.warmup)
    lengths = [
        len(data[row]["input_ids"])
        for step in counted
        for row in range(step * step_rows, (step + 1) * step_rows)
    ]
    result = {
        "stack": stack, "model": model_name, "workload": workload, "mode": mode, "accumulation": accumulation,
        "rows": rows, "seq": length, "rank": args.rank, "gpu": gpu_name() if cuda else "cpu",
        "ms": (statistics.mean if length == "chat" else statistics.median)(times), "ms_p90": sorted(times)[len(times) * 9 // 10],
        "tokens_per_step": sum(lengths) / len(times) / count,
        "peak_gib": (torch.cuda.max_memory_allocated() + beside(model)) / 2**30 if cuda else 0.0,
        "losses": [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry],
        "versions": versions(name),
    }  # fmt: skip
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return result


def beside(model) -> int:
    """Bytes of a process's part of sharded weights that PyTorch's allocator does not count, because others read them."""
    from oribi.models.unwrap import base_model

    shards = getattr(getattr(base_model(model), "model", None), "shards", None)
    return 0 if shards is None or shards.lockstep else shards.own_bytes


def dataset(vocab_size: int, count: int, length: str):
    """Rows of random ids, every token trained; those of a chat have the lengths of one, 365 tokens in the middle."""
    from datasets import Dataset

    draw = random.Random(0)
    found = []
    for _ in range(count):
        tokens = int(draw.lognormvariate(5.9, 0.8)) if length == "chat" else int(length)
        ids = [
            draw.randrange(3, vocab_size)
            for _ in range(min(max(tokens, 16), LONGEST_CHAT) if length == "chat" else tokens)
        ]
        found.append({"input_ids": ids, "labels": ids})
    return Dataset.from_list(found)


def distance(one: Path, several: Path) -> float:
    """Of two lists of gradients, relative to the first."""
    import torch

    a, b = torch.load(one), torch.load(several)
    squares = sum(float((x - y).square().sum()) for x, y in zip(a, b, strict=True))
    return (squares / sum(float(x.square().sum()) for x in a)) ** 0.5


def line(row: dict) -> str:
    head = f"{row['workload']:22s} {row['stack']:14s} {row['mode']:5s} {row['gpus']} GPUs  accumulation {row['accumulation']}"
    if "error" in row:
        return f"{head}  {row['error']}"
    return (
        f"{head}  {row['ms']:8.1f} ms {row['tokens_per_s']:9.0f} tok/s {row['peak_gib']:6.2f} GiB  "
        f"scaling {row.get('scaling', 1.0):.2f}  gradients {row.get('gradient_difference', 0.0):.1e}"
    )


def table(rows: list[dict]) -> str:
    lines = [
        "| workload | stack | mode | GPUs | accumulation | ms/step | tokens/s | scaling | peak GiB | gradients |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        head = f"| {r['workload']} | {r['stack']} | {r['mode']} | {r['gpus']} | {r['accumulation']} |"
        if "error" in r:
            lines.append(f"{head} {r['error'].splitlines()[-1][:60]} | | | | |")
        else:
            lines.append(
                f"{head} {r['ms']:.1f} | {r['tokens_per_s']:.0f} | {r.get('scaling', 1.0):.2f} | {r['peak_gib']:.2f} | "
                f"{r.get('gradient_difference', 0.0):.1e} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
