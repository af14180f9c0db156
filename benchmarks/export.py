"""Time and host memory of each export: merging, quantising, and the comparison at the end.

    python benchmarks/random_model.py llama-3.2-1b /tmp/llama-3.2-1b
    python benchmarks/export.py /tmp/llama-3.2-1b

The model is loaded in NF4 with a LoRA adapter of random values (r 16, seven projections). Each export runs in its
own process. Memory is the largest resident set during the export minus that before it, sampled every 5 ms. Pages of mapped
files, which the system can reclaim, are counted separately. Results go to benchmarks/results/<device>_export.json.
"""

import argparse
import json
import os
import shutil
import tempfile
import threading
import time
from contextlib import contextmanager, redirect_stdout
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).parent
FORMS = ("merged_16bit", "q4_k_m", "q4_k_m,q8_0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a checkpoint, see random_model.py")
    parser.add_argument("--form", action="append", choices=FORMS, help="only this one; may be repeated")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    args = parser.parse_args()
    jobs = [(args.model, form, verify) for form in args.form or FORMS for verify in (False, True)]
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        rows = list(pool.imap(measure, jobs))
    print(f"{'export':16}{'verified':>10}{'seconds':>9}{'memory MB':>11}{'mapped MB':>11}")
    for row in rows:
        print(
            f"{row['form']:16}{row['verified']!s:>10}{row['seconds']:9.1f}{row['memory_bytes'] / 1e6:11.0f}"
            f"{row['mapped_bytes'] / 1e6:11.0f}"
        )
    args.output.mkdir(exist_ok=True)
    record = {"model": args.model.name, "device": rows[0]["device"], "cores": os.cpu_count(), "exports": rows}
    name = record["device"].split()[1].lower() if record["device"].startswith("NVIDIA") else "cpu"
    (args.output / f"{name}_export.json").write_text(json.dumps(record, indent=1) + "\n")


def measure(job: tuple[Path, str, bool]) -> dict:
    """Time and memory of one export, in a fresh process."""
    import torch

    from oribi import FastLanguageModel
    from oribi.environment import detect

    folder, form, verify = job
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder))
    model = FastLanguageModel.get_peft_model(model, r=16)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.01)
    target = Path(tempfile.mkdtemp(prefix="oribi-export-"))
    try:
        with open(os.devnull, "w") as quiet, redirect_stdout(quiet), peak() as memory:
            began = time.perf_counter()
            checks = export(model, tokenizer, form, target / "export", verify)
            seconds = time.perf_counter() - began
    finally:
        shutil.rmtree(target)
    return {
        "form": form, "verified": verify, "seconds": seconds, **memory, "device": detect().device_name,
        "checks": {check.name: check.figures for check in checks},
    }  # fmt: skip


def export(model, tokenizer, form: str, target: Path, verify: bool) -> list:
    """Write one form; returns its checks."""
    from oribi import save_gguf, save_merged

    if form == "merged_16bit":
        return save_merged(model, target, tokenizer, verify=verify).checks
    return save_gguf(model, target, tokenizer, form.split(","), verify=verify)["report"].checks


@contextmanager
def peak():
    """Fills a dictionary with the growth of this process's memory while the block ran."""
    found, done = {"memory_bytes": 0, "mapped_bytes": 0}, threading.Event()
    own, mapped = resident()

    def watch() -> None:
        while not done.wait(0.005):
            now, pages = resident()
            found["memory_bytes"] = max(found["memory_bytes"], now - own)
            found["mapped_bytes"] = max(found["mapped_bytes"], pages - mapped)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def resident() -> tuple[int, int]:
    """Bytes of this process in memory: its own, and pages of mapped files (Linux)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(fields[key].split()[0]) * 1024 for key in ("RssAnon", "RssFile"))


if __name__ == "__main__":
    main()
