"""The process in which llama.cpp runs: one JSON request per line on standard input, one JSON answer per line back.

A crash of llama.cpp ends this process and not the one that trained. The server of xllamacpp listens on a random port of
the loopback interface and takes requests with a random key only; it ends with this process, which ends when its standard
input does. Run as a script: it imports nothing of oribi, and finds packages where the process that started it does.
"""

import json
import os
import secrets
import socket
import sys
import urllib.request
from collections.abc import Callable
from typing import Any

TIMEOUT = 600  # seconds for one answer


def start(path: str, context: int, threads: int, adapter: str | None) -> Callable[[str, dict], Any]:
    """Load a GGUF file; returns what posts a request to the server.

    Raises:
        RuntimeError: llama.cpp does not load the file.
    """
    import xllamacpp

    key = secrets.token_urlsafe(24)
    params = xllamacpp.CommonParams()
    params.hostnames, params.port, params.api_keys = ["127.0.0.1"], 0, [key]
    params.model.path = path
    params.n_ctx = context
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = threads
    # its defaults of float16 in the cache and in attention would be differences of llama.cpp's, not of the file's
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.warmup = False
    params.verbosity = 1  # errors alone
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
    server = xllamacpp.Server(params)
    # a proxy of the environment must not see the requests
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def post(path: str, body: dict) -> Any:
        request = urllib.request.Request(
            server.listening_address + path,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
        )
        with opener.open(request, timeout=TIMEOUT) as answer:
            return json.loads(answer.read())

    return post


def reason(error: BaseException) -> str:
    """An error in one line."""
    detail = error.read().decode(errors="replace") if hasattr(error, "read") else str(error)
    return " ".join(f"{type(error).__name__}: {detail}".split())[:500]


def main() -> None:
    """Serve requests until standard input ends. The first line is `start`'s arguments."""
    # answers have a channel of their own: what llama.cpp prints goes to standard error
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**values: Any) -> None:
        print(json.dumps(values), file=channel, flush=True)

    arguments = json.loads(sys.stdin.readline())
    sys.path[:] = arguments.pop("search_path")
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            import xllamacpp  # noqa: F401
    except Exception as error:  # importing a foreign library may raise anything
        say(unavailable=reason(error))
        return
    try:
        post = start(**arguments)
    except RuntimeError as error:
        say(refused=reason(error))
        return
    except Exception as error:  # another version of xllamacpp
        say(unavailable=reason(error))
        return
    say(ready=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            say(answer=post(request["path"], request["body"]))
        except Exception as error:  # sockets, HTTP, JSON: the caller decides what to do
            say(unavailable=reason(error))


if __name__ == "__main__":
    main()
