"""The process in which a run's model answers for the page: what it takes of a GPU is free again when it ends.

Requests and replies are lines of JSON on standard input and output:

    {"messages": [...], "model": "base" or "tuned", ...}  ->  {"piece": text} ..., {"text": ..., "tokens": ..., "stopped": ...}
    {"rows": [{"input_ids": [...], "labels": [...]}, ...]} ->  {"losses": [{"base": ..., "tuned": ...}, ...]}

The first reply is {"ready": true, ...}, or {"error": ...} and the end. A request that fails gets {"error": ...}.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

from datasets import Dataset
from torch import OutOfMemoryError
from transformers import TextStreamer
from transformers.utils.logging import set_verbosity_error

from oribi.errors import OribiError
from oribi.models.generate import answer
from oribi.run import LoadedRun, load_run
from oribi.train.evaluate import held_out_loss, without_adapter

_FAILURES = (OribiError, OSError, OutOfMemoryError)


class Pieces(TextStreamer):
    """Hands an answer on while it is generated."""

    def __init__(self, tokenizer: Any, reply: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._reply = reply

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._reply(piece=text)


def serve(run: str, requests: Iterator[str], reply: Any) -> None:
    """Load a run's model and reply to requests until there are none.

    Args:
        run: its folder. requests: lines. reply: called with what a reply holds.
    """
    set_verbosity_error()
    try:
        loaded = load_run(run)
        if loaded.model.get_output_embeddings() is None:
            raise OribiError(f"{run} scores texts and writes none")
    except _FAILURES as error:
        reply(error=str(error))
        return
    reply(ready=True, compares=loaded.has_adapter, talks=bool(loaded.tokenizer.chat_template))
    for line in requests:
        request = json.loads(line)
        try:
            if "rows" in request:
                reply(losses=_losses(loaded, request["rows"]))
            else:
                _answer(loaded, request, reply)
        except _FAILURES as error:
            reply(error=str(error))


def _answer(loaded: LoadedRun, request: dict[str, Any], reply: Any) -> None:
    asked: Any = request["messages"]
    if not loaded.tokenizer.chat_template:
        asked = asked[-1]["content"]  # a model without turns continues the last text
    settings = {
        name: request[name] for name in ("max_new_tokens", "temperature") if request.get(name) is not None
    }
    with _model_of(loaded, request["model"]):
        said = answer(
            loaded.model, loaded.tokenizer, asked, streamer=Pieces(loaded.tokenizer, reply), **settings
        )
    reply(text=said.text, tokens=said.tokens, stopped=said.stopped, seconds=said.seconds)


def _losses(loaded: LoadedRun, rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Mean loss of each row's trained tokens, in nats."""
    found: list[dict[str, float]] = [{} for _ in rows]
    for name in ("base", "tuned") if loaded.has_adapter else ("tuned",):
        with _model_of(loaded, name):
            for row, losses in zip(rows, found):
                measured = held_out_loss(loaded.model, Dataset.from_list([row]))
                if measured.tokens:
                    losses[name] = measured.loss
    return found


def _model_of(loaded: LoadedRun, name: str) -> Any:
    return without_adapter(loaded.model) if name == "base" else nullcontext()


def main() -> None:
    """Serve the run that the command line names; whatever libraries print goes to standard error."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(**values: Any) -> None:
        replies.write(json.dumps(values) + "\n")
        replies.flush()

    serve(sys.argv[1], iter(sys.stdin.readline, ""), reply)


if __name__ == "__main__":
    main()
