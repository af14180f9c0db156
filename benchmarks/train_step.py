"""Time and memory of a QLoRA training step: oribi and installed peers, each through its own SFTTrainer.

    python benchmarks/train_step.py --workload llama-3.1-8b:2x2048 --stack oribi:memory --stack unsloth:default --pairs 2

Every stack loads the same checkpoint (see random_model.py; 4-bit codes, unless its name ends with "16bit": then each quantises
what it can), attaches the same LoRA (r 16, alpha 16, seven
projections, the same values in every LoRA matrix), and sees the same token ids with the same 8-bit AdamW. Each run is one
process, and runs of different stacks alternate. Milliseconds are medians of synchronised steps after warm-up; memory is counted
from the first step on. With --overlap all processes import at once and then take turns on the GPU, which saves minutes but makes
the seconds to the first step incomparable. Results go to benchmarks/results/<gpu>_train_step.json and, as a table, to the terminal.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

STARTED = time.time()
HERE = Path(__file__).parent
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# the other linear layers of a family's layers, which oribi trains with these and other stacks have to be asked for
FURTHER_TARGETS = {
    "qwen3_5_text": ["in_proj_qkv", "in_proj_z", "out_proj"],
    "gemma4_text": ["per_layer_input_gate", "per_layer_projection"],
    "lfm2": ["in_proj", "out_proj", "w1", "w2", "w3"],
}
# stacks of experts [E, N, K], which PEFT trains as parameters of their module
EXPERTS = {"qwen3_moe", "gpt_oss"}
# arguments of every stack's trainer
TRAINING = {
    "output_dir": f"/tmp/oribi-bench-{os.getppid()}",  # of all processes of a run, and of no other benchmark
    "gradient_accumulation_steps": 1, "learning_rate": 2e-4, "warmup_steps": 0,
    "lr_scheduler_type": "constant", "optim": "adamw_8bit", "logging_steps": 1, "report_to": "none",
    "save_strategy": "no", "seed": 0, "bf16": True, "packing": False,
    "router_aux_loss_coef": 0.0,  # TRL's own default adds a loss that evens out the experts' use
    "dataset_kwargs": {"skip_prepare_dataset": True},
}  # fmt: skip
# oribi's modes are its recompute policies, and "fp8" (auto with approximate products); peers' modes are the forms of
# checkpointing that they offer, and "float32" (the same weights, computed in float32)
MODES = {
    "oribi": ("auto", "memory", "balanced", "speed", "fp8"),
    "unsloth": ("default", "off"),
    "hf": ("default", "off", "float32"),
    "liger": ("default", "off"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--workload", action="append", required=True, help="MODEL:ROWSxTOKENS of random_model.py"
    )
    parser.add_argument("--stack", action="append", required=True, help="STACK:MODE")
    parser.add_argument("--pairs", type=int, default=2, help="how often each stack runs")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--masked", type=float, default=0.0, help="share of each 256 tokens, its first, that is not trained"
    )
    parser.add_argument("--models", type=Path, default=Path("/tmp/oribi-models"))
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--timeout", type=int, default=400, help="seconds per run")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--overlap", action="store_true", help="import in parallel, then take turns")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--turn", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("RESULT " + json.dumps(run_one(*args.one.split("|"), args)), flush=True)
        return
    for model in {workload.split(":")[0] for workload in args.workload}:
        if not (args.models / model / "tokenizer_config.json").exists():
            subprocess.run([sys.executable, HERE / "random_model.py", model, args.models / model], check=True)
    runs = [(w, s) for w in args.workload for _ in range(args.pairs) for s in args.stack]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        turns = [Path(folder) / str(i) for i in range(len(runs))]
        waiting = [start(*run, turn, args) for run, turn in zip(runs, turns)] if args.overlap else []
        for i, (run, turn) in enumerate(zip(runs, turns)):
            process = waiting[i] if args.overlap else start(*run, turn, args)
            turn.touch()
            rows.append(finish(process, *run, args.timeout))
            print(summary(rows[-1]), flush=True)
    merged = merge(rows)
    gpu = merged[0].get("gpu", "cpu") if merged else "cpu"
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"{gpu}_train_step.json"
    path.write_text(json.dumps(merged, indent=1) + "\n")
    print("\n" + table(merged) + f"\n{path}")


def start(workload: str, stack: str, turn: Path, args: argparse.Namespace) -> subprocess.Popen:
    """A process for one run, which imports and then waits for its turn's file to exist."""
    command = [
        sys.executable, __file__, "--workload", workload, "--stack", stack, "--one", f"{workload}|{stack}",
        "--steps", str(args.steps), "--warmup", str(args.warmup), "--rank", str(args.rank),
        "--masked", str(args.masked), "--models", str(args.models), "--turn", str(turn),
    ]  # fmt: skip
    return launch(command)


def launch(command: list[str]) -> subprocess.Popen:
    """A process for one run, in an environment that is the same for all stacks."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen, workload: str, stack: str, timeout: int) -> dict:
    """The run's row, or a row that says why there is none."""
    name, mode = stack.split(":")
    failed = {"stack": name, "mode": mode, "workload": workload}
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        return {**failed, "error": f"longer than {timeout} s"}
    return result_in(output) or {**failed, "error": "\n".join(output.strip().splitlines()[-25:])}


def result_in(output: str) -> dict | None:
    """The row that a process printed for the one that started it."""
    lines = [line for line in output.splitlines() if line.startswith("RESULT ")]
    return json.loads(lines[0].removeprefix("RESULT ")) if lines else None


def run_one(workload: str, stack: str, args: argparse.Namespace) -> dict:
    """One stack on one workload, in this process."""
    name, mode = stack.split(":")
    model_name, shape = workload.split(":")
    rows, length = (int(n) for n in shape.split("x"))
    steps = args.steps
    if name == "unsloth":
        import unsloth  # noqa: F401  it must come first
    import torch
    import trl  # noqa: F401  the slow imports come before the turn
    from datasets import Dataset
    from transformers import TrainerCallback

    while not args.turn.exists():
        time.sleep(0.05)
    model, tokenizer, trainer_class, config_class, extra = load(
        name, mode, args.models / model_name, length, args.rank
    )
    loaded = time.time()
    same_factors(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(
        3, model.config.vocab_size, (rows * (steps + args.warmup), length), generator=generator
    )
    is_shown = torch.arange(length) % 256 < args.masked * 256
    labels = ids.masked_fill(is_shown, -100)
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})

    class Clock(TrainerCallback):
        times: list[float] = []
        first = 0.0

        def on_step_begin(self, _, state, control, **kwargs):
            if state.global_step == 0:
                torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            self.started = time.perf_counter()

        def on_step_end(self, _, state, control, **kwargs):
            torch.cuda.synchronize()
            self.times.append((time.perf_counter() - self.started) * 1e3)
            self.first = self.first or time.time()

    clock = Clock()
    config = config_class(
        per_device_train_batch_size=rows, max_steps=steps + args.warmup, max_length=length, weight_decay=0.01,
        **{**TRAINING, **extra},
    )  # fmt: skip
    trainer = trainer_class(
        model=model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[clock]
    )
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    times = clock.times[args.warmup :]
    return {
        "stack": name, "mode": mode, "model": model_name, "batch": rows, "seq": length, "rank": args.rank, "masked": args.masked,
        "workload": workload, "gpu": gpu_name(),
        "ms": statistics.median(times), "ms_p10": sorted(times)[len(times) // 10],
        "ms_p90": sorted(times)[len(times) * 9 // 10],
        "tokens_per_s": rows * length / statistics.median(times) * 1e3,
        "peak_alloc_gib": torch.cuda.max_memory_allocated() / 2**30,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        "losses": [round(entry["loss"], 4) for entry in history],
        "grad_norm": history[-1].get("grad_norm"),
        "every_factor_moved": all(moved(model)),
        "load_s": loaded - STARTED, "first_step_s": clock.first - STARTED,
        "versions": versions(name),
    }  # fmt: skip


def load(name: str, mode: str, path: Path, length: int, rank: int) -> tuple:
    """Model with LoRA, tokenizer, trainer class, config class, and the stack's own arguments."""
    fields = json.loads((path / "config.json").read_text())
    model_type = fields["model_type"]
    targets = TARGETS + FURTHER_TARGETS.get(model_type, [])
    if name == "oribi":
        from oribi import FastLanguageModel, SFTConfig, SFTTrainer

        file = path / "model.gguf"
        model, tokenizer = FastLanguageModel.from_pretrained(
            str(file if file.exists() else path), max_seq_length=length
        )
        extra, policy = ({"fp8": True}, "auto") if mode == "fp8" else ({}, mode)
        model = FastLanguageModel.get_peft_model(
            model, r=rank, lora_alpha=16, target_modules=targets, use_gradient_checkpointing=policy
        )
        return model, tokenizer, SFTTrainer, SFTConfig, extra
    if name == "unsloth":
        import unsloth  # noqa: F401  it must come first
        from trl import SFTConfig, SFTTrainer
        from unsloth import FastLanguageModel

        checkpointing = "unsloth" if mode == "default" else False
        model, tokenizer = FastLanguageModel.from_pretrained(
            str(path), max_seq_length=length, load_in_4bit=True, use_gradient_checkpointing=checkpointing
        )
        model = FastLanguageModel.get_peft_model(
            model, r=rank, lora_alpha=16, target_modules=targets, use_gradient_checkpointing=checkpointing
        )
        extra = {} if checkpointing else {"gradient_checkpointing": False}
        return model, tokenizer, SFTTrainer, SFTConfig, extra
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Mxfp4Config
    from trl import SFTConfig, SFTTrainer

    exact = mode == "float32"
    dtype = torch.float32 if exact else torch.bfloat16
    device = 0 if torch.cuda.is_available() else "cpu"
    codes: dict[str, object] = {}
    if "quantization_config" not in fields:  # as random_model.QUANTIZATION; experts stay in 16 bits
        codes["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )  # fmt: skip
    elif fields["quantization_config"]["quant_method"] == "mxfp4":  # which it cannot train
        codes["quantization_config"] = Mxfp4Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype, device_map={"": device}, **codes)
    for module in model.modules() if exact else ():
        if hasattr(module, "compute_dtype"):  # of a 4-bit layer, as its checkpoint says
            module.compute_dtype = dtype
    experts = {}
    if model_type in EXPERTS:
        experts["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        targets = [name for name in targets if name not in ("gate_proj", "up_proj", "down_proj")]
    config = LoraConfig(r=rank, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM", **experts)
    model = get_peft_model(model, config)
    extra = {
        "gradient_checkpointing": mode != "off", "use_liger_kernel": name == "liger", "bf16": not exact,
    }  # fmt: skip
    return model, AutoTokenizer.from_pretrained(str(path)), SFTTrainer, SFTConfig, extra


def trained(model) -> list:
    """Parameters that are trained, in an order that all stacks share."""
    return [
        p for _, p in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad and "lora_" in n)
    ]


def same_factors(model) -> None:
    """Gives every LoRA factor the same random value in every stack; no B is zero, so that every gradient is real."""
    import torch

    same_factors.values = []
    for seed, parameter in enumerate(trained(model)):
        generator = torch.Generator().manual_seed(seed)
        value = torch.randn(parameter.shape, generator=generator) * 0.01
        parameter.data.copy_(value)
        same_factors.values.append(parameter.detach().to("cpu", copy=True))  # apart from what is measured


def moved(model) -> list[bool]:
    """Of each LoRA factor, in the order of `trained`, whether it has left the value that `same_factors` gave it."""
    return [bool(p.cpu().ne(q).any()) for p, q in zip(trained(model), same_factors.values)]


def gpu_name() -> str:
    """As files of results are named: "h100"."""
    import torch

    return torch.cuda.get_device_name().split()[1].lower()


def versions(stack: str) -> dict[str, str]:
    found = {}
    for package in (
        "torch",
        "transformers",
        "trl",
        "peft",
        "bitsandbytes",
        "unsloth",
        "liger-kernel",
        "oribi",
    ):
        if package in ("unsloth", "liger-kernel", "oribi") and not package.startswith(stack):
            continue
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "source"
    return found


def merge(rows: list[dict]) -> list[dict]:
    """One row a stack, mode and workload: the median run, with every run's milliseconds beside it."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["workload"], row["stack"], row["mode"]), []).append(row)
    merged = []
    for runs in groups.values():
        good = sorted((r for r in runs if "error" not in r), key=lambda r: r["ms"])
        if good:
            merged.append(
                {**good[(len(good) - 1) // 2], "runs_ms": [round(r["ms"], 1) for r in runs if "ms" in r]}
            )
        else:
            merged.append(runs[0])
    return merged


def summary(row: dict) -> str:
    head = f"{row['workload']:22s} {row['stack']}:{row['mode']:9s}"
    if "error" in row:
        return f"{head} {row['error']}"
    losses = row["losses"]
    return (
        f"{head} {row['ms']:8.1f} ms {row['tokens_per_s']:9.0f} tok/s {row['peak_alloc_gib']:6.2f} GiB allocated "
        f"{row['peak_reserved_gib']:6.2f} reserved  loss {losses[0]:.4f} .. {losses[-1]:.4f}  "
        f"norm {float(row['grad_norm'] or 0):.3f}  moved {row['every_factor_moved']}  first step {row['first_step_s']:.0f} s"
    )


def table(rows: list[dict]) -> str:
    lines = [
        "| workload | stack | mode | ms/step | tokens/s | peak allocated GiB | reserved GiB | first step s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if "error" in r:
            lines.append(
                f"| {r['workload']} | {r['stack']} | {r['mode']} | {r['error'].splitlines()[-1][:60]} | | | | |"
            )
        else:
            lines.append(
                f"| {r['workload']} | {r['stack']} | {r['mode']} | {r['ms']:.1f} | {r['tokens_per_s']:.0f} | "
                f"{r['peak_alloc_gib']:.2f} | {r['peak_reserved_gib']:.2f} | {r['first_step_s']:.0f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
