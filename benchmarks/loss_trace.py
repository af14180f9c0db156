"""Whether a stack trains as the reference does: its losses and transformers' on the same steps.

    python benchmarks/loss_trace.py --workload llama-3.1-8b:2x2048 --stack hf:default --stack oribi:memory

Model, LoRA matrices and trainers are those of train_step.py, but every step trains on the same tokens, so that the loss falls
and a wrong gradient shows. Every stack keeps its LoRA matrices in float32 (TRL would round them to bfloat16) and uses PyTorch's
AdamW, so only the gradients differ. The reference is transformers with PEFT and bitsandbytes in float32 on the same NF4
weights; the distance of transformers in bfloat16 from it shows how much rounding to expect.
Writes results/<gpu>_loss_trace.json.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from train_step import HERE, TRAINING, gpu_name, load, moved, result_in, same_factors, trained, versions

REFERENCE = "hf:float32"
OPTIMIZER = "adamw_torch"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", required=True, help="MODEL:ROWSxTOKENS of random_model.py")
    parser.add_argument("--stack", action="append", required=True, help="STACK:MODE of train_step.py")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--models", type=Path, default=Path("/tmp/oribi-models"))
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("RESULT " + json.dumps(trace(args.stack[0], args)), flush=True)
        return
    rows = []
    for stack in [REFERENCE, *args.stack]:
        command = [
            sys.executable, __file__, "--workload", args.workload, "--stack", stack, "--one",
            "--steps", str(args.steps), "--models", str(args.models),
        ]  # fmt: skip
        output = subprocess.run(command, capture_output=True, text=True)
        row = result_in(output.stdout)
        if row is None:
            sys.exit(f"{stack}: {output.stderr[-2000:]}")
        rows.append(row)
        row["largest_difference"] = max(
            abs(a - b) for a, b in zip(row["losses"], rows[0]["losses"], strict=True)
        )
        losses = row["losses"]
        print(
            f"{args.workload} {stack:16s} loss {losses[0]:.4f} .. {losses[-1]:.4f}, "
            f"largest difference {row['largest_difference']:.4f}, {row['unmoved']} factors without gradient",
            flush=True,
        )
    path = args.output / f"{rows[0]['gpu']}_loss_trace.json"
    args.output.mkdir(parents=True, exist_ok=True)
    others = json.loads(path.read_text()) if path.exists() else []
    others = [row for row in others if row["workload"] != args.workload]
    path.write_text(json.dumps([*others, *rows], indent=1) + "\n")


def trace(stack: str, args: argparse.Namespace) -> dict:
    """The losses of one stack's steps, in this process."""
    name, mode = stack.split(":")
    model_name, shape = args.workload.split(":")
    batch, length = (int(n) for n in shape.split("x"))
    if name == "unsloth":
        import unsloth  # noqa: F401  it must come first
    import torch
    from datasets import Dataset

    model, tokenizer, trainer_class, config_class, extra = load(
        name, mode, args.models / model_name, length, 16
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (batch, length), generator=generator).tolist()
    data = Dataset.from_dict({"input_ids": ids * args.steps, "labels": ids * args.steps})
    config = config_class(
        per_device_train_batch_size=batch, max_steps=args.steps, max_length=length,
        train_sampling_strategy="sequential", **{**TRAINING, **extra, "optim": OPTIMIZER},
    )  # fmt: skip
    trainer = trainer_class(model=model, args=config, train_dataset=data, processing_class=tokenizer)
    for parameter in trained(model):
        parameter.data = parameter.data.float()
    same_factors(model)
    trainer.train()
    return {
        "stack": name, "mode": mode, "workload": args.workload, "optim": OPTIMIZER,
        "gpu": gpu_name(),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "unmoved": moved(model).count(False),
        "versions": versions(name),
    }  # fmt: skip


if __name__ == "__main__":
    main()
