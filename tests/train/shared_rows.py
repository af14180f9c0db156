"""What processes that share rows do together, for test_context.py: `python -m tests.train.shared_rows FOLDER MODEL ...`.

Each process writes what it found into FOLDER/RANK.json, and gradients into FOLDER/NAME-RANK.pt.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from oribi.kernels import context_attention
from oribi.kernels.attention import Visibility, attention
from oribi.kernels.context_attention import ContextGroup, own_chunks
from oribi.selftest.subject import Subject
from tests.train.several_processes import first_gradients
from tests.trust.runs import trainer_in

RANK = int(os.environ.get("RANK", "0"))
# of one process; groups that read different rows divide the accumulation
USUAL = {
    "max_steps": 3, "save_strategy": "no", "neftune_noise_alpha": None, "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2, "optim": "paged_adamw_32bit", "adam_epsilon": 1e-3, "evaluates": 5,
    "eval_strategy": "steps", "eval_steps": 3,
}  # fmt: skip
# beside plain rows
TRAININGS: dict[str, dict[str, Any]] = {
    "rows": {},
    "packs": {"packs": True, "gradient_accumulation_steps": 4},
    "sharded": {"fsdp": True},
}
WIDTH, SCALE = 16, 0.3
# offsets of a row's documents, in chunks: one, several, some of which end with a chunk, many small ones
ROWS = {
    "one": [0, 4],
    "across": [0, 0.4, 0.6, 2.5, 3.9, 4],
    "with chunks": [0, 1, 2, 3, 4],
    "two": [0, 1.1, 4],
}


def trained(subject: Subject, folder: Path, **settings: Any) -> dict[str, Any]:
    """Gradients of a training's first step, its losses, and the loss of its evaluation."""
    trainer = trainer_in(subject, folder, **{**USUAL, **settings})
    gradients, losses = first_gradients(trainer)
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return {"gradients": gradients, "losses": losses, "eval_losses": evaluated}


def attention_differs(group: ContextGroup, chunk: int) -> dict[str, float]:
    """Largest difference of out, dq, dk and dv in a shared row from the whole one, in float64."""
    found = {}
    own = torch.cat(
        [torch.arange(i * chunk, (i + 1) * chunk) for i in own_chunks(group.rank, group.processes)]
    )
    tokens = 2 * group.processes * chunk
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, tokens, n, WIDTH, dtype=torch.float64).requires_grad_() for n in (4, 2, 2))
    dout = torch.randn_like(q)
    for name, places in ROWS.items():
        bounds = torch.tensor([round(place * tokens / 4) for place in places], dtype=torch.int32)
        longest = int(bounds.diff().max())
        for window, softcap in ((None, None), (5, None), (None, 3.0)):
            out = attention(
                q, k, v, Visibility(1, tokens, cu_seqlens=bounds, max_length=longest), SCALE, window, softcap
            )
            expected = [x[:, own] for x in (out, *torch.autograd.grad(out, (q, k, v), dout))]
            for portions in (1, 2):
                context_attention.GATHERED_BYTES = (
                    q.nbytes // portions
                )  # of keys and values, as many bytes as of q
                parts = [x.detach()[:, own].requires_grad_() for x in (q, k, v)]
                out = attention(*parts, group.part(bounds, chunk, longest), SCALE, window, softcap)
                actual = out, *torch.autograd.grad(out, parts, dout[:, own])
                case = f"{name}, window {window}, softcap {softcap}, {portions} portions"
                found[case] = max(float((a - b).abs().max()) for a, b in zip(actual, expected))
    return found


def main(folder: str, *models: str) -> None:
    out, found = Path(folder), {}
    context_attention.CHUNK_MULTIPLE = 4  # so that rows of a few tokens reach over all processes
    world = int(os.environ["WORLD_SIZE"])
    for path in models:
        subject, name = Subject(path, "cpu"), Path(path).name
        for kind, settings in TRAININGS.items():
            accumulation = settings.get("gradient_accumulation_steps", USUAL["gradient_accumulation_steps"])
            settings = settings | {
                "context_parallel": 2,
                "gradient_accumulation_steps": accumulation * 2 // world,
            }
            ran = trained(subject, out / f"{name}-{kind}", use_cpu=True, **settings)
            torch.save(ran.pop("gradients"), out / f"{name}-{kind}-{RANK}.pt")
            found[f"{name}-{kind}"] = ran
    found["attention"] = attention_differs(ContextGroup(world, 60), 8)
    (out / f"{RANK}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
