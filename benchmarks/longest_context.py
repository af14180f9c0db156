"""The longest row that a stack can train in a given amount of GPU memory: longer and longer rows, one per step, until one fails.

    python benchmarks/longest_context.py --stack oribi:memory --gib 24 --length 65536 --length 131072

The process may use at most --gib of the device, as reserved by PyTorch's allocator. Model, adapter, optimizer and trainer are
those of train_step.py; rows of more than 131,072 tokens need `--model llama-3.1-8b-1m`. Prints one line per row and writes
results/<gpu>_longest_context.json, keeping the results of other stacks and sizes.
"""

import argparse
import json
import time
from pathlib import Path

from train_step import HERE, MODES, TRAINING, gpu_name, load, same_factors, versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stack", required=True, help="STACK:MODE of train_step.py")
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--gib", type=float, default=24.0)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--length", type=int, action="append", required=True)
    parser.add_argument("--models", type=Path, default=Path("/tmp/oribi-models"))
    parser.add_argument("--output", type=Path, default=HERE / "results")
    args = parser.parse_args()
    name, mode = args.stack.split(":")
    if mode not in MODES.get(name, ()):
        parser.error(f"--stack {args.stack!r}: expected STACK:MODE with one of {MODES}")
    rows = climb(name, mode, args)
    path = args.output / f"{gpu_name()}_longest_context.json"
    args.output.mkdir(parents=True, exist_ok=True)
    others = json.loads(path.read_text()) if path.exists() else []
    key = ("stack", "mode", "model", "gib", "rank")
    new = dict(zip(key, (name, mode, args.model, args.gib, args.rank)))
    others = [one for one in others if any(one[k] != new[k] for k in key)]
    longest = max((row["tokens"] for row in rows if "error" not in row), default=0)
    found = {**new, "longest": longest, "rows": rows, "versions": versions(name)}
    path.write_text(json.dumps([*others, found], indent=1) + "\n")


def climb(name: str, mode: str, args: argparse.Namespace) -> list[dict]:
    """One row a length: its peak memory and seconds, or the error that ended the climb."""
    if name == "unsloth":
        import unsloth  # noqa: F401  it must come first
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(args.gib * 2**30 / total, 1.0))
    lengths = sorted(args.length)
    model, tokenizer, trainer_class, config_class, extra = load(
        name, mode, args.models / args.model, lengths[-1], args.rank
    )
    same_factors(model)
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, model.config.vocab_size, (n,), generator=draw).tolist() for n in lengths]
    rows: list[dict] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, _, state, control, **kwargs):
            torch.cuda.reset_peak_memory_stats()
            self.started = time.perf_counter()

        def on_step_end(self, _, state, control, **kwargs):
            torch.cuda.synchronize()
            rows.append(
                {
                    "tokens": lengths[state.global_step - 1],
                    "s": round(time.perf_counter() - self.started, 2),
                    "peak_alloc_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
                    "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
                }
            )
            print(f"{name}:{mode} {args.gib:g} GiB {rows[-1]}", flush=True)

    config = config_class(
        per_device_train_batch_size=1, max_steps=len(lengths), max_length=lengths[-1],
        train_sampling_strategy="sequential", **{**TRAINING, **extra},
    )  # fmt: skip
    trainer = trainer_class(
        model=model, args=config, train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        processing_class=tokenizer, callbacks=[Watch()],
    )  # fmt: skip
    try:
        trainer.train()
    except Exception as error:  # each stack says in its own words that memory has run out
        tokens = lengths[len(rows)]
        rows.append(
            {"tokens": tokens, "error": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
        )
        print(f"{name}:{mode} {args.gib:g} GiB {rows[-1]}", flush=True)
    else:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        for row, loss in zip(rows, losses):
            row["loss"] = loss
    return rows


if __name__ == "__main__":
    main()
