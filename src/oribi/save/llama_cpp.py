"""llama.cpp itself, where the package xllamacpp is installed: what it generates and how it tokenises.

It is the judge of a GGUF file, never needed to write one.
"""

import json
import os
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.error import HTTPError

from oribi.errors import ExportError


@dataclass(frozen=True)
class Answer:
    """A greedy continuation: its tokens, and the log-probabilities of the likeliest tokens at each place.

    A place is None where llama.cpp withholds it: a token that ends inside a character.
    """

    tokens: list[int]
    logprobs: list[dict[int, float] | None]


def is_installed() -> bool:
    """Whether llama.cpp can be asked on this machine."""
    return find_spec("xllamacpp") is not None


class LlamaCpp:
    """A GGUF file loaded by llama.cpp on the CPU.

    Args:
        path: the file.
        context: tokens of prompt and answer together.
        adapter: LoRA adapter as GGUF, applied at full strength.

    Raises:
        ExportError: llama.cpp does not load the file; it prints why.
    """

    def __init__(self, path: str | Path, context: int = 512, adapter: str | Path | None = None) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = context
        params.n_parallel = 1
        params.n_gpu_layers = 0
        # a small model's layers are shorter than the wait of one thread for another
        small = Path(path).stat().st_size < 512 << 20
        params.cpuparams.n_threads = 1 if small else min(os.cpu_count() or 1, 8)
        # its defaults of float16 in the cache and in attention would be differences of llama.cpp's, not of the file's
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.warmup = False
        params.verbosity = 1  # errors alone
        if adapter is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise ExportError(f"llama.cpp does not load {path}: {error}") from error

    def generate(self, ids: Sequence[int], tokens: int, top: int = 1) -> Answer:
        """Greedy continuation of a prompt.

        Args:
            ids: the prompt's token ids.
            tokens: at most so many new tokens; it ends earlier after an end token, which is included.
            top: how many log-probabilities each place has.
        """
        body = {"prompt": list(ids), "n_predict": tokens, "temperature": 0.0, "n_probs": top}
        answer = self._post("/completion", {**body, "return_tokens": True, "cache_prompt": False})
        given = iter([*answer["completion_probabilities"], None])
        place = next(given)
        logprobs: list[dict[int, float] | None] = []
        for token in answer["tokens"]:
            if place is None or place["id"] != token:
                logprobs.append(None)
                continue
            logprobs.append({other["id"]: other["logprob"] for other in place["top_logprobs"]})
            place = next(given)
        return Answer(answer["tokens"], logprobs)

    def tokenize(self, text: str, *, special: bool = True, add_special: bool = False) -> list[int]:
        """Token ids of a text; `special` reads control tokens in it, `add_special` adds BOS and EOS as set in the file."""
        body = {"content": text, "add_special": add_special, "parse_special": special}
        return self._post("/tokenize", body)["tokens"]

    def render(self, messages: list[dict[str, str]]) -> str:
        """A conversation as the file's own chat template renders it, with the start of the answer."""
        return self._post("/apply-template", {"messages": messages})["prompt"]

    def _post(self, path: str, body: dict) -> dict:
        request = urllib.request.Request(
            self._server.listening_address + path,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        # the server is in this process: a proxy of the environment must not see it
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=600) as answer:
                return json.loads(answer.read())
        except HTTPError as error:
            raise ExportError(f"llama.cpp refuses {path}: {error.read().decode()}") from error
