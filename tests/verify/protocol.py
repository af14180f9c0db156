"""A small server of the OpenAI protocol's shape around a tiny model, as vLLM, SGLang and Ollama answer, each leaving out other things."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from oribi.save.probes import rendered_ids


class Answering:
    """What a server answers with.

    Args:
        model, tokenizer: that it serves.
        stops: ids that end an answer.
        style: "vllm" (ids in prompts, /tokenize, tokens shown as ids), "sglang" (ids, tokens as texts), "ollama" (its own API, texts
            alone), or "bare" (chat without log-probabilities and nothing else).
        bos_twice: whether it puts a second BOS before conversations.
    """

    def __init__(
        self, model: Any, tokenizer: Any, stops: list[int], style: str, bos_twice: bool = False
    ) -> None:
        self.model, self.tokenizer, self.stops = model, tokenizer, stops
        self.style, self.bos_twice = style, bos_twice

    def reply(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and JSON of an answer."""
        if path == "/v1/models":
            return 200, {"data": [{"id": "tuned", "object": "model"}]}
        if self.style == "ollama":
            if path in ("/api/version", "/api/tags"):
                return 200, {"version": "0.13.0", "models": []}
            if path == "/api/show":
                lines = [f'stop    "{self.tokenizer.convert_ids_to_tokens(id)}"' for id in self.stops]
                return 200, {"parameters": "\n".join(lines)}
            if path == "/api/generate" and body.get("raw"):
                ids = self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
                bos = [
                    self.tokenizer.bos_token_id
                ]  # as llama.cpp puts it before every text of a file that says so
                tokens, places, _ = self.generate(bos + ids, body["options"]["num_predict"])
                return 200, {"logprobs": self.as_content(tokens, places)}
        if path == "/v1/chat/completions":
            return 200, self.chat(body)
        if path == "/v1/completions" and self.style in ("vllm", "sglang"):
            return self.complete(body)
        if path == "/tokenize" and self.style == "vllm":
            return 200, {"tokens": self.prompt(body["messages"])}
        return 404, {"error": f"{path} is unknown"}

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """A conversation's ids."""
        ids = rendered_ids(self.tokenizer, messages, prompt=True)
        return [self.tokenizer.bos_token_id] * self.bos_twice + ids

    @torch.no_grad()
    def generate(
        self, ids: list[int], count: int, bias: dict[str, float] | None = None
    ) -> tuple[list[int], list[torch.Tensor], bool]:
        """Greedy tokens, their distributions, and whether a stop ended them."""
        tokens, places, given, past = [], [], ids, None
        for _ in range(count):
            found = self.model(input_ids=torch.tensor([given]), past_key_values=past, use_cache=True)
            logits, past = found.logits[0, -1].float().clone(), found.past_key_values
            for id, value in (bias or {}).items():
                logits[int(id)] += value
            places.append(logits.log_softmax(-1))
            tokens.append(logits.argmax().item())
            given = tokens[-1:]
            if tokens[-1] in self.stops:
                return tokens, places, True
        return tokens, places, False

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        """/v1/completions with log-probabilities in their older form."""
        ids, as_ids = body["prompt"], body.get("return_tokens_as_token_ids")
        if as_ids is not None and self.style == "sglang":
            return 400, {"error": "unexpected field return_tokens_as_token_ids"}
        if max(ids) >= self.model.config.vocab_size:
            return 400, {"error": "Token id is out of vocabulary"}
        tokens, places, stopped = self.generate(ids, body["max_tokens"], body.get("logit_bias"))

        def name(id: int) -> str:
            return f"token_id:{id}" if as_ids else self.tokenizer.decode([id])

        tops = [dict(zip(map(name, p.topk(10).indices.tolist()), p.topk(10).values.tolist())) for p in places]
        logprobs = {"tokens": list(map(name, tokens)), "top_logprobs": tops}
        choice = {
            "text": self.tokenizer.decode(tokens[: len(tokens) - stopped]),
            "finish_reason": "stop" if stopped else "length",
            "logprobs": logprobs if body.get("logprobs") else None,
        }
        return 200, {"choices": [choice]}

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        """/v1/chat/completions."""
        ids = self.prompt(body["messages"])
        tokens, places, stopped = self.generate(ids, body["max_tokens"])
        choice: dict[str, Any] = {
            "message": {
                "role": "assistant",
                "content": self.tokenizer.decode(tokens[: len(tokens) - stopped]),
            },
            "finish_reason": "stop" if stopped else "length",
        }
        if body.get("logprobs") and self.style != "bare":
            choice["logprobs"] = {"content": self.as_content(tokens, places)}
        return {"choices": [choice], "usage": {"prompt_tokens": len(ids)}}

    def as_content(self, tokens: list[int], places: list[torch.Tensor]) -> list[dict[str, Any]]:
        """Log-probabilities in the form of chat completions."""
        return [
            {
                "token": self.tokenizer.decode([token]),
                "logprob": place[token].item(),
                "top_logprobs": [
                    {"token": self.tokenizer.decode([id]), "logprob": value}
                    for id, value in zip(place.topk(10).indices.tolist(), place.topk(10).values.tolist())
                ],
            }
            for token, place in zip(tokens, places)
        ]


@contextmanager
def served(answering: Answering) -> Iterator[str]:
    """The address, with /v1, at which a server answers inside the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({})

        def do_POST(self) -> None:
            self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def answer(self, body: dict[str, Any]) -> None:
            status, values = answering.reply(self.path, body)
            data = json.dumps(values).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
