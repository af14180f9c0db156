"""How much of what was trained answers: files that llama.cpp serves, compared with the model that was trained.

    python benchmarks/shipped.py train /tmp/shipped
    python benchmarks/shipped.py answer /tmp/shipped

A model (SmolLM2-135M, or --model) learns the demo's task on different frozen weights, and ships as q4_k_m: merged, or a base file
with an adapter beside it. `train` writes the adapters and, computed in float32 on the frozen codes, the trained model's greedy answers to the
held-out requests. `answer` writes the files that are served, asks llama.cpp, and prints per way the score of both (an answer is
right if its expression means what was asked for) and how many answers are the same, token for token. The two may run on
different machines if FOLDER has the same path on both; only FOLDER/trained needs to be copied. Writes
results/<device of training>_shipped.json, or _shipped_<model>.json.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
METHOD = "q4_k_m"
GIVEN = "base.gguf"  # as it came: SmolLM2's is Q4_1
CODES = f"base.{METHOD.upper()}.gguf"
# way -> base, how it is loaded, how it is trained, whether base and adapter ship apart
WAYS: dict[str, tuple[str, dict[str, Any], dict[str, Any], bool]] = {
    "nf4, merged": ("checkpoint", {"load_in_4bit": True}, {}, False),
    "given file, apart": (GIVEN, {}, {}, True),
    f"{METHOD} file, apart": (CODES, {}, {}, True),
    f"train_for {METHOD}, apart": ("checkpoint", {"train_for": METHOD}, {}, True),
    f"train_for {METHOD}, merged at the end": ("checkpoint", {"train_for": METHOD}, {}, False),
    f"train_for {METHOD}, merged": ("checkpoint", {"train_for": METHOD}, {"merges_codes": True}, False),
}
# of thousands of requests; the demo's own larger rate is for fewer
LESSON = {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "adam_beta2": 0.999}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("train", "answer"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, help="GGUF file (default: the demo's, from its package)")
    parser.add_argument("--way", action="append", choices=WAYS, help="only this one; may be repeated")
    parser.add_argument(
        "--seed", type=int, action="append", help="of adapter and batches; may be repeated (default: 0)"
    )
    parser.add_argument("--requests", type=int, nargs=2, default=(4000, 200), metavar=("TRAINED", "HELD_OUT"))
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.way, args.seed = args.way or list(WAYS), args.seed or [0]
    if args.one:
        train(args.folder, args.way[0], args.seed[0], *args.requests)
        return
    write_bases(args.folder, args.model)
    (train_all if args.part == "train" else answer_all)(args)


def runs(args: argparse.Namespace) -> list[tuple[str, int]]:
    """Ways and seeds."""
    return [(way, seed) for seed in args.seed for way in args.way]


def trained_folder(folder: Path, way: str, seed: int) -> Path:
    """Of an adapter, which ways that differ in shipping alone share."""
    base, settings, changes, _ = WAYS[way]
    return folder / "trained" / "-".join([base, *settings, *changes, str(seed)])


def write_bases(folder: Path, file: Path | None) -> None:
    """The base in each form: the GGUF file, a 16-bit checkpoint of its values, and that checkpoint's q4_k_m file."""
    from oribi import FastLanguageModel, save_gguf, save_merged
    from oribi.demo.lesson import model_file

    done = folder / "bases.txt"
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file or model_file(), folder / GIVEN)
    loading = {"load_in_4bit": False, "dtype": "float32", "device_map": "cpu"}
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder / GIVEN), **loading)
    save_merged(model, folder / "checkpoint", tokenizer, dtype="bfloat16", verify=False)
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder / "checkpoint"), **loading)
    save_gguf(model, folder, tokenizer, METHOD, name="base", verify=False)
    done.write_text("written\n")


def train_all(args: argparse.Namespace) -> None:
    """Trains each way in a process of its own: all at once on a GPU, which one of them hardly uses."""
    import torch

    waiting = {trained_folder(args.folder, way, seed): (way, seed) for way, seed in runs(args)}
    processes: list[subprocess.Popen] = []
    for way, seed in waiting.values():
        command = [
            sys.executable,
            __file__,
            "train",
            str(args.folder),
            "--one",
            "--way",
            way,
            "--seed",
            str(seed),
        ]
        processes.append(subprocess.Popen([*command, "--requests", *map(str, args.requests)]))
        if not torch.cuda.is_available():
            processes[-1].wait()
    codes = [process.wait() for process in processes]
    if any(codes):
        sys.exit("a way was not trained")


def train(folder: Path, way: str, seed: int, train_size: int, held_out_size: int) -> None:
    """Trains one adapter, and lets the trained model answer in float32."""
    from oribi import FastLanguageModel
    from oribi.demo.lesson import answer_requests, teach
    from oribi.demo.requests import make_split
    from oribi.environment import detect

    base, settings, changes, _ = WAYS[way]
    target = trained_folder(folder, way, seed)
    requests, held_out = make_split(train_size, held_out_size)
    loading = {"max_seq_length": 512, **settings}
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder / base), **loading)
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, target_modules="all-linear", random_state=seed
    )
    started = time.monotonic()
    changes = {**LESSON, **changes, "seed": seed, "report_to": "none"}
    trainer = teach(model, tokenizer, requests, folder / "runs" / target.name, **changes)
    record = {
        "seconds": time.monotonic() - started,
        "steps": trainer.state.global_step,
        "device": detect().device_name,
    }
    model.save_pretrained(str(target))
    dtypes = {str(model.dtype).removeprefix("torch."): answer_requests(model, tokenizer, held_out)}
    del trainer, model
    model, tokenizer = FastLanguageModel.from_pretrained(str(target), **loading, dtype="float32")
    dtypes["float32"] = answer_requests(model, tokenizer, held_out)
    record["answers"] = {dtype: [answer.ids for answer in answers] for dtype, answers in dtypes.items()}
    (target / "answers.json").write_text(json.dumps(record))


def answer_all(args: argparse.Namespace) -> None:
    rows = []
    for way, seed in runs(args):
        rows.append(answer(args.folder, way, seed, *args.requests))
        print(line(rows[-1]), flush=True)
    for way in args.way if len(args.seed) > 1 else ():
        print(line(together([row for row in rows if row["way"] == way])))
    device = rows[0]["trained_on"].split()
    name = device[1].lower() if device[0] == "NVIDIA" else "cpu"
    args.output.mkdir(parents=True, exist_ok=True)
    model = f"_{args.model.stem}" if args.model else ""
    (args.output / f"{name}_shipped{model}.json").write_text(json.dumps(rows, indent=1) + "\n")


def answer(folder: Path, way: str, seed: int, train_size: int, held_out_size: int) -> dict[str, Any]:
    """Ships one way, asks llama.cpp, and compares."""
    from oribi import FastLanguageModel, save_gguf
    from oribi.demo.lesson import answer_in_llama_cpp, answer_requests, scored
    from oribi.demo.requests import make_split
    from oribi.gguf.llama_cpp import LlamaCpp
    from oribi.save import save_gguf_adapter

    base, settings, _, apart = WAYS[way]
    source = trained_folder(folder, way, seed)
    held_out = make_split(train_size, held_out_size)[1]
    record = json.loads((source / "answers.json").read_text())
    model, tokenizer = FastLanguageModel.from_pretrained(str(source), dtype="float32", **settings)
    target = folder / "shipped" / f"{source.name}-{'apart' if apart else 'merged'}"
    if apart:
        adapter = save_gguf_adapter(model, target, "f16", tokenizer=tokenizer, verify=False)["gguf_files"][0]
        file = next((path for path in target.glob("*.gguf") if "-lora." not in path.name), folder / base)
        read_back = None
    else:
        file = save_gguf(model, target, tokenizer, METHOD, name="merged", verify=False)["gguf_files"][0]
        adapter = None
        read_back = FastLanguageModel.from_pretrained(str(file), load_in_4bit=False, dtype="float32")[0]
    answers = {
        dtype: [scored(*pair, tokenizer) for pair in zip(held_out, ids)]
        for dtype, ids in record["answers"].items()
    }
    trained = answers["float32"]
    with LlamaCpp(file, adapter=adapter) as peer:
        shipped = answer_in_llama_cpp(peer, tokenizer, held_out)
    sizes = [Path(path).stat().st_size for path in (file, adapter) if path]
    row = {
        "way": way, "seed": seed, "trained_on": record["device"], "steps": record["steps"], "seconds": record["seconds"],
        "requests": held_out_size, "bytes": sum(sizes), **compare(trained, shipped),
        "same_by_training_dtype": {dtype: same(trained, found) for dtype, found in answers.items()},
        "gaps_of_different": [gap(model, tokenizer, a, b.ids) for a, b in zip(trained, shipped) if a.ids != b.ids],
    }  # fmt: skip
    if read_back is not None:
        row["file_read_by_oribi"] = compare(trained, answer_requests(read_back, tokenizer, held_out))
    return row


def compare(trained: list, shipped: list) -> dict[str, Any]:
    """Scores, answers that became wrong or right, and answers that are the same."""
    return {
        "trained_right": sum(answer.right for answer in trained),
        "shipped_right": sum(answer.right for answer in shipped),
        "became_wrong": sum(a.right and not b.right for a, b in zip(trained, shipped)),
        "became_right": sum(b.right and not a.right for a, b in zip(trained, shipped)),
        "same_answers": same(trained, shipped),
    }


def same(some: list, others: list) -> int:
    return sum(a.ids == b.ids for a, b in zip(some, others))


def gap(model: Any, tokenizer: Any, trained: Any, other: list[int]) -> float:
    """By how much, in log-probability, the trained model prefers its own token where another answer leaves it."""
    import torch

    from oribi.demo.lesson import ids_of_request

    pair = [[*ids, tokenizer.eos_token_id] for ids in (trained.ids, other)]
    at = next((i for i, (a, b) in enumerate(zip(*pair)) if a != b), None)
    if at is None:  # one was cut at the limit of tokens
        return 0.0
    ids = [*ids_of_request(tokenizer, trained.request), *trained.ids[:at]]
    with torch.no_grad():
        last = model(torch.tensor([ids], device=model.device)).logits[0, -1].float().log_softmax(-1)
    return float(last[pair[0][at]] - last[pair[1][at]])


def together(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows of one way as one."""
    counts = ("requests", "trained_right", "shipped_right", "became_wrong", "became_right", "same_answers")
    return {**rows[0], "seed": "all", **{key: sum(row[key] for row in rows) for key in counts}}


def line(row: dict[str, Any]) -> str:
    n = row["requests"]
    low, high = wilson(row["same_answers"], n)
    lost, spread = row["became_wrong"] - row["became_right"], row["became_wrong"] + row["became_right"]
    half = 1.96 * math.sqrt(spread - lost**2 / n) / n  # of a difference between paired shares
    return (
        f"{row['way']:38} seed {row['seed']!s:4} {row['bytes'] / 1e6:5.0f} MB  trained {row['trained_right'] / n:6.1%}  "
        f"shipped {row['shipped_right'] / n:6.1%}  lost {lost / n:+6.1%} ± {half:.1%}  "
        f"same answers {row['same_answers'] / n:6.1%} ({low:.1%} to {high:.1%})"
    )


def wilson(count: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share. Source: Wilson 1927."""
    share, weight = count / n, z * z / n
    middle, half = share + weight / 2, z * math.sqrt(share * (1 - share) / n + weight / n / 4)
    return (middle - half) / (1 + weight), (middle + half) / (1 + weight)


if __name__ == "__main__":
    main()
