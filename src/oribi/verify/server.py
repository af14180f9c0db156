"""A server of the OpenAI protocol: llama.cpp's, vLLM, SGLang, Ollama and others, asked for completions and chat completions.

What a server adds to the protocol is used where it is there: prompts of token ids, /tokenize, /apply-template, and Ollama's own
/api/generate, because its /v1/completions puts the template around every prompt.
"""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from oribi.chat.template import render
from oribi.errors import ChatTemplateError, ConfigError, TemplateLimitError
from oribi.save.probe_file import Messages, Place, Probe, ProbeFile, Said
from oribi.text import one_of
from oribi.verify.peers import ChatAnswer, PeerError, TokensByText, along_answer, shared_places

_SECONDS = 120
_TOP = 10  # log-probabilities of a place that are asked for
_BIAS = 100.0  # the protocol's largest
_BEYOND = 16  # tokens behind an expected answer
# forms of a prompt -> what is asked with it beyond the protocol
_FORMS: dict[str, dict[str, Any]] = {
    "ids, shown as ids": {"return_tokens_as_token_ids": True},
    "ids": {},
    "text": {},
}
_LOCAL = ("localhost", "127.0.0.1", "::1")


class Server:
    """A model of a server.

    Args:
        address: with /v1, as OpenAI's clients take it.
        model: its name there; None takes the only one.
        probes: knows tokens by their texts.
        api_key: sent as bearer.

    Raises:
        ConfigError: nothing answers there, or it has no model of that name.
    """

    def __init__(
        self, address: str, model: str | None, probes: ProbeFile, api_key: str | None = None
    ) -> None:
        self.address = address.rstrip("/")
        self._root = self.address.removesuffix("/v1")
        self._key, self._probes, self._tokens = api_key, probes, TokensByText(probes)
        local = urlsplit(address).hostname in _LOCAL
        self._opener = urllib.request.build_opener(*[urllib.request.ProxyHandler({})] * local)
        self.model, self.vocabulary = self._find_model(model)
        self._is_ollama = self._has("/api/version")
        self.name = f"{self.model} at {self.address}"
        self.by_text = self._takes_ids = False
        self._forms = ["text"] if self._is_ollama else list(_FORMS)

    def _find_model(self, asked: str | None) -> tuple[str, int | None]:
        try:
            listed = self._get(f"{self.address}/models")
        except PeerError as error:
            raise ConfigError(
                f"{self.address}: no server of the OpenAI protocol answers there ({error}); give its address with /v1, as in "
                "http://localhost:8000/v1"
            ) from error
        models = listed.get("data") if isinstance(listed, dict) else None
        found = {str(one.get("id")): one for one in models or () if isinstance(one, dict)}
        names = list(found)
        if asked is None and len(names) == 1:
            asked = names[0]
        if asked is None:
            raise ConfigError(
                f"{self.address} has {len(names)} models; give one with --model: {', '.join(names[:20])}"
            )
        chosen = next((name for name in (asked, f"{asked}:latest") if name in found), None)
        if chosen is None and names:
            raise ConfigError(f"--model {asked}: {self.address} has no such model; {one_of(asked, names)}")
        meta = found.get(chosen, {}).get("meta")
        count = meta.get("n_vocab") if isinstance(meta, dict) else None
        return chosen or asked, count if isinstance(count, int) else None

    def said(self, probes: Sequence[Probe]) -> Said | None:
        found = [along_answer(self._continue, probe, self._probes.texts) for probe in probes]
        return found if any(place for places in found for place in places) else None

    def _continue(self, ids: list[int], tokens: int) -> list[tuple[int, Place]]:
        if self._is_ollama:
            return self._continue_in_ollama(ids, tokens)
        answer = self._complete(ids, max_tokens=tokens, logprobs=_TOP)
        return self._read_places(_choice(answer).get("logprobs"))

    def _complete(self, ids: list[int], **options: Any) -> dict[str, Any]:
        """Completions of a prompt, in the first form that the server takes: ids with what vLLM adds to the protocol, ids, text."""
        first: PeerError | None = None
        for form in self._forms:
            prompt = self._text(ids) if form == "text" else ids
            if prompt is None:
                continue
            body = {"model": self.model, "temperature": 0, "prompt": prompt, **options}
            try:
                found = self._post(f"{self.address}/completions", {**body, **_FORMS[form]})
            except PeerError as error:
                first = first or error
                continue
            self._forms = self._forms[self._forms.index(form) :]
            self._takes_ids = self._takes_ids or form != "text"
            return found
        raise first or PeerError("it takes no prompts of token ids")

    def _text(self, ids: list[int]) -> str | None:
        """A prompt as text, without the BOS that servers put before texts; None where its text is not known."""
        for probe in self._probes.probes:
            if probe.messages is not None and ids[: len(probe.ids)] == probe.ids:
                behind = [self._probes.texts.get(id) for id in ids[len(probe.ids) :]]
                if None in behind:
                    return None
                text = rendered_text(self._probes, probe.messages)
                bos = self._probes.template_values.get("bos_token")
                return None if text is None else text.removeprefix(bos or "") + "".join(behind)
        return None

    def _continue_in_ollama(self, ids: list[int], tokens: int) -> list[tuple[int, Place]]:
        text = self._text(ids)
        if text is None:
            return []
        body = {
            "model": self.model, "prompt": text, "raw": True, "stream": False, "logprobs": True, "top_logprobs": _TOP,
            "options": {"temperature": 0, "num_predict": tokens},
        }  # fmt: skip
        answer = self._post(f"{self._root}/api/generate", body)
        return self._read_places({"content": answer.get("logprobs")})

    def _read_places(self, given: Any) -> list[tuple[int, Place]]:
        """Tokens and places of either form of log-probabilities, of completions and of chat completions."""
        if not isinstance(given, dict):
            return []
        if given.get("content"):
            return [self._read_token(entry) for entry in given["content"]]
        tokens, tops = given.get("tokens") or [], given.get("top_logprobs") or []
        self.by_text = self.by_text or any(not token.startswith("token_id:") for token in tokens)
        return [
            (self._tokens.id_of(token), self._tokens.place(top or {})) for token, top in zip(tokens, tops)
        ]

    def _read_token(self, entry: dict[str, Any]) -> tuple[int, Place]:
        tops = entry.get("top_logprobs") or []
        if isinstance(entry.get("id"), int):  # llama.cpp
            return entry["id"], {one["id"]: one["logprob"] for one in tops}
        self.by_text = True
        named = {str(one.get("token", "")): one["logprob"] for one in tops}
        return self._tokens.id_of(str(entry.get("token", ""))), self._tokens.place(named)

    def prompt_ids(self, messages: Messages) -> list[int] | None:
        """By llama.cpp's /apply-template and /tokenize, or by vLLM's /tokenize."""
        rendered = self._try("/apply-template", {"messages": messages})
        if isinstance(rendered, dict) and isinstance(rendered.get("prompt"), str):
            text, dates = rendered["prompt"], {}
            if not self._same_text(text, messages):
                dates = {"date_string": time.strftime("%d %b %Y"), "datetime": time.strftime("%b %d %Y")}
                if self._same_text(
                    text, messages, **dates
                ):  # llama.cpp puts today's date in place of the template's own
                    text = rendered_text(self._probes, messages) or text
            body = {"content": text, "add_special": True, "parse_special": True}
            found = self._try("/tokenize", body)
            return found.get("tokens") if isinstance(found, dict) else None
        found = self._try(
            "/tokenize", {"model": self.model, "messages": messages, "add_generation_prompt": True}
        )
        ids = found.get("tokens") if isinstance(found, dict) else None
        return ids if isinstance(ids, list) and ids and all(isinstance(id, int) for id in ids) else None

    def _same_text(self, text: str, messages: Messages, **dates: str) -> bool:
        bos = self._probes.template_values.get("bos_token") or ""
        return (rendered_text(self._probes, messages, **dates) or "").removeprefix(bos) == text.removeprefix(
            bos
        )

    def chat(self, probe: Probe) -> ChatAnswer | None:
        body: dict[str, Any] = {
            "model": self.model, "messages": probe.messages, "temperature": 0, "max_tokens": len(probe.answer) + _BEYOND,
        }  # fmt: skip
        try:
            answer = self._post(
                f"{self.address}/chat/completions", {**body, "logprobs": True, "top_logprobs": _TOP}
            )
        except PeerError:
            answer = self._post(f"{self.address}/chat/completions", body)
        choice = _choice(answer)
        message = choice.get("message") or {}
        text = (message.get("reasoning_content") or "") + (message.get("content") or "")
        places = shared_places(self._read_places(choice.get("logprobs")), probe.answer, self._probes.texts)
        counted = (answer.get("usage") or {}).get("prompt_tokens")
        return ChatAnswer(
            text, places, counted if isinstance(counted, int) else None, choice.get("finish_reason") == "stop"
        )

    def ends(self, token: int, prompt: list[int]) -> bool | None:
        if self._is_ollama:  # it takes no bias, but shows what it stops at
            shown = self._try("/api/show", {"model": self.model})
            stops = str(shown.get("parameters", "")) if isinstance(shown, dict) else ""
            return self._probes.text(token) in stops if stops else None
        answer = self._complete(prompt, max_tokens=3, logit_bias={str(token): _BIAS})
        choice = _choice(answer)
        text = choice.get("text") or ""
        repeated = self._probes.text(token) * 2 in text
        return False if repeated else choice.get("finish_reason") == "stop"

    def takes(self, token: int) -> bool:
        if not self._takes_ids:
            return False
        self._complete([token], max_tokens=1)
        return True

    def close(self) -> None:
        pass  # every request is one of its own

    def _has(self, path: str) -> bool:
        try:
            return "version" in self._get(self._root + path) and self._try("/api/tags", None) is not None
        except (PeerError, TypeError):
            return False

    def _try(self, path: str, body: dict[str, Any] | None) -> Any:
        """What a path answers that not every server has; None where it has it not."""
        try:
            return self._get(self._root + path) if body is None else self._post(self._root + path, body)
        except PeerError:
            return None

    def _get(self, address: str) -> Any:
        return self._open(urllib.request.Request(address))

    def _post(self, address: str, body: dict[str, Any]) -> Any:
        data = json.dumps(body).encode()
        return self._open(urllib.request.Request(address, data, {"Content-Type": "application/json"}))

    def _open(self, request: urllib.request.Request) -> Any:
        if self._key:
            request.add_header("Authorization", f"Bearer {self._key}")
        try:
            with self._opener.open(request, timeout=_SECONDS) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            words = " ".join(error.read(2000).decode(errors="replace").split())
            raise PeerError(f"HTTP {error.code}: {words[:300]}") from error
        except (OSError, ValueError) as error:  # no connection, a time-out, or no JSON
            raise PeerError(str(getattr(error, "reason", error)) or type(error).__name__) from error


def _choice(answer: Any) -> dict[str, Any]:
    try:
        choice = answer["choices"][0]
    except (TypeError, KeyError, IndexError) as error:
        raise PeerError(f"it answers in an unknown form: {str(answer)[:200]}") from error
    if not isinstance(choice, dict):
        raise PeerError(f"it answers in an unknown form: {str(answer)[:200]}")
    return choice


def rendered_text(probes: ProbeFile, messages: Messages, **values: str) -> str | None:
    """A conversation by the trained chat template, with the start of the answer; None where it takes no such conversation."""
    if probes.template is None:
        return None
    try:
        return render(
            probes.template, messages, name="the chat template", add_generation_prompt=True, **{**probes.template_values, **values},
        )  # fmt: skip
    except (ChatTemplateError, TemplateLimitError):
        return None
