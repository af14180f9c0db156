"""What probes.json holds, asked of the trained model: its answers, and what would be said if something were wrong.

A file or a server that is not the trained model answers most often as one of a few that can be asked here: the base without its
adapter, the adapter at another strength, or a prompt with a second BOS or without the chat template.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from oribi.chat.ends import renders
from oribi.chat.template import render_chat, slot
from oribi.errors import ChatTemplateError, TemplateLimitError
from oribi.gguf.modelfile import writes_the_date
from oribi.save.probe_file import ExportedFile, Messages, Probe, ProbeFile, Said, mean_divergence
from oribi.save.probes import CONVERSATIONS, pack_rows, rendered_ids
from oribi.save.reference import GreedyAnswer, Trained, likeliest

_PROBES, _ENDED = 6, 2  # the most telling ones, and further ones that the model ends
STRENGTHS = (0.25, 0.5, 2.0, 4.0)  # a scale of alpha, alpha / r or alpha / sqrt(r) taken for another


@dataclass(frozen=True)
class _Asked:
    """Answers behind their prompts as one pack, and where their tokens are said."""

    answers: list[GreedyAnswer]

    def logits(self, trained: Trained, prompts: Sequence[list[int]] | None = None) -> list[torch.Tensor]:
        """Log-probabilities [n, V] float32 at each answer's places, behind its own prompt or another."""
        given = [answer.prompt for answer in self.answers] if prompts is None else prompts
        rows = pack_rows([p + a.tokens[:-1] for p, a in zip(given, self.answers)], "the probes")
        places, start = [], 0
        for prompt, answer in zip(given, self.answers):
            places += range(start + len(prompt) - 1, start + len(prompt) - 1 + len(answer.tokens))
            start += len(prompt) + len(answer.tokens) - 1
        found = trained.evaluate(rows, torch.tensor(places, device=trained.device)).float().log_softmax(-1)
        return list(found.split([len(answer.tokens) for answer in self.answers]))


class Signatures:
    """The probes of an export and what they tell apart.

    Args:
        model: the trained model, PEFT's or plain.
        trained: its answers, of which the most telling become probes.
        tokenizer: None if there is none; then no prompt is a conversation.
    """

    def __init__(self, model: nn.Module, trained: Trained, tokenizer: Any) -> None:
        self.trained, self.tokenizer = trained, tokenizer
        bare = None
        if isinstance(model, PeftModel) or trained.bare is not None:
            bare = _without_adapter(model, trained)
        self.chosen = _most_telling(trained, bare)
        asked = _Asked([trained.answers[i] for i in self.chosen])
        self.messages = [prompt_messages(tokenizer, answer.prompt) for answer in asked.answers]
        self.says: dict[str, Said] = {"trained": [trained.said[i] for i in self.chosen]}
        if bare is not None:
            self.says["base"] = [bare[i] for i in self.chosen]
        if isinstance(model, PeftModel) and trained.bare is None:
            for strength in STRENGTHS:
                with _adapter_scaled(model, strength):
                    self.says[f"x{strength:g}"] = [likeliest(part) for part in asked.logits(trained)]
        for name, prompts in self._other_prompts(asked).items():
            self.says[name] = [likeliest(part) for part in asked.logits(trained, prompts)]

    def of_file(self, logits: torch.Tensor) -> Said:
        """What a file says at the places of the probes, from its logits [K, V] at those of the trained model."""
        parts = self.trained.answer_logits(logits)
        return [likeliest(parts[i]) for i in self.chosen]

    def describe(self, kind: str, base: str, config: Any, files: dict[str, ExportedFile]) -> ProbeFile:
        """The probes as they are written; arguments as for `ProbeFile`, `config` the model's."""
        text, tokenizer = config.get_text_config(), self.tokenizer
        with_template = renders(tokenizer)
        return ProbeFile(
            kind=kind,
            base=base,
            shape={
                "tokens": text.vocab_size if tokenizer is None else min(len(tokenizer), text.vocab_size),
                **{name: getattr(text, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")},
            },
            bos=getattr(tokenizer, "bos_token_id", None),
            stops=sorted(self.trained.stops),
            probes=[self._probe(i, messages) for i, messages in zip(self.chosen, self.messages)],
            says=self.says,
            files=files,
            texts=self._texts(),
            template=tokenizer.get_chat_template() if with_template else None,
            template_values=dict(tokenizer.special_tokens_map) if with_template else {},
            dated=with_template and writes_the_date(tokenizer),
            renderings=_renderings(tokenizer) if with_template else [],
        )

    def _probe(self, index: int, messages: Messages | None) -> Probe:
        answer = self.trained.answers[index]
        said = answer.tokens[:-1] if answer.stopped else answer.tokens
        text = "" if self.tokenizer is None else self.tokenizer.decode(said, skip_special_tokens=False)
        return Probe(answer.prompt, answer.tokens, text, answer.stopped, messages)

    def _other_prompts(self, asked: _Asked) -> dict[str, list[list[int]]]:
        """Prompts as faulty servers make them."""
        if not any(self.messages):
            return {}
        bos = self.tokenizer.bos_token_id
        prompts = [answer.prompt for answer in asked.answers]
        found = {}
        if bos is not None:
            found["bos twice"] = [[bos, *prompt] for prompt in prompts]
            if all(prompt[0] == bos and len(prompt) > 1 for prompt in prompts):
                found["no bos"] = [prompt[1:] for prompt in prompts]
        plain = [
            prompt
            if messages is None
            else list(self.tokenizer(messages[-1]["content"])["input_ids"]) or prompt
            for prompt, messages in zip(prompts, self.messages)
        ]
        return {**found, "no template": plain}

    def _texts(self) -> dict[int, str]:
        """Text of every token of the probes and what is said at their places."""
        if self.tokenizer is None:
            return {}
        ids = {id for said in self.says.values() for places in said for place in places for id in place}
        ids |= {id for i in self.chosen for id in self.trained.answers[i].tokens} | self.trained.stops
        # behind another token, because many tokenizers drop the space before the first
        before = list(self.tokenizer("a", add_special_tokens=False)["input_ids"])
        start = self.tokenizer.decode(before, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        found = {}
        for id in sorted(ids):
            text = self.tokenizer.decode(
                [*before, id], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            if text.startswith(start) and "\ufffd" not in text and len(text) > len(start):
                found[id] = text[len(start) :]
        return found


def _without_adapter(model: nn.Module, trained: Trained) -> Said:
    """What the base says at the places of the trained model's answers."""
    if trained.bare is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of trained biases, which stay
            with model.disable_adapter():
                return [likeliest(part) for part in _Asked(trained.answers).logits(trained)]
    logits = trained.streamed(trained.bare)
    return [likeliest(part) for part in trained.answer_logits(logits)]


def _most_telling(trained: Trained, bare: Said | None) -> list[int]:
    """Which answers become probes: those that the base differs from most, and some that end."""
    indices = list(range(len(trained.answers)))
    if bare is not None:
        apart = [mean_divergence([own], [base]) for own, base in zip(trained.said, bare)]
        indices.sort(key=lambda i: -apart[i])
    chosen = indices[:_PROBES]
    ended = [i for i in indices[_PROBES:] if trained.answers[i].stopped]
    missing = _ENDED - sum(trained.answers[i].stopped for i in chosen)
    return chosen + ended[: max(missing, 0)]


@contextmanager
def _adapter_scaled(model: nn.Module, factor: float) -> Iterator[None]:
    """The model with its LoRA updates times a factor inside the block."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    own = [dict(layer.scaling) for layer in layers]
    try:
        for layer, scaling in zip(layers, own):
            layer.scaling.update({name: scale * factor for name, scale in scaling.items()})
        yield
    finally:
        for layer, scaling in zip(layers, own):
            layer.scaling.update(scaling)


def prompt_messages(tokenizer: Any, ids: list[int]) -> Messages | None:
    """The conversation that the chat template renders to a prompt's ids: one question, or a system message and a question.

    Returns:
        The messages; None where the prompt is not what the template makes of them.
    """
    if not renders(tokenizer):
        return None
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    roles = ("system", "user")
    for count in (1, 2):
        asked = [{"role": role, "content": slot(i)} for i, role in enumerate(roles[2 - count :])]
        try:
            parts = _between(render_chat(tokenizer, asked, add_generation_prompt=True), count)
        except (ChatTemplateError, TemplateLimitError):
            continue
        contents = None if parts is None else _contents(text, parts)
        if contents is None:
            continue
        messages = [{**message, "content": content} for message, content in zip(asked, contents)]
        try:
            if rendered_ids(tokenizer, messages, prompt=True) == ids:
                return messages
        except (ChatTemplateError, TemplateLimitError):
            continue
    return None


def _between(rendered: str, count: int) -> list[str] | None:
    """What stands before, between and behind the placeholders; None where one is missing or repeated."""
    parts = []
    for i in range(count):
        before, found, rendered = rendered.partition(slot(i))
        if not found or slot(i) in rendered:
            return None
        parts.append(before)
    return [*parts, rendered]


def _contents(text: str, parts: list[str]) -> list[str] | None:
    """The texts between the parts of a rendered conversation."""
    if not (text.startswith(parts[0]) and text.endswith(parts[-1])):
        return None
    inner = text[len(parts[0]) : len(text) - len(parts[-1])]
    found = []
    for part in parts[1:-1]:
        content, mark, inner = inner.partition(part)
        if not mark:
            return None
        found.append(content)
    return [*found, inner]


def _renderings(tokenizer: Any) -> list[dict[str, Any]]:
    """Conversations and their ids: questions alone, with a system message, and with an answer between."""
    question, answer = CONVERSATIONS[0]
    again = CONVERSATIONS[3][0]
    system = {"role": "system", "content": "Answer in one sentence."}
    found = []
    for messages in ([question], [again], [system, question], [question, answer, again]):
        try:
            found.append({"messages": messages, "ids": rendered_ids(tokenizer, messages, prompt=True)})
        except (
            ChatTemplateError,
            TemplateLimitError,
        ):  # a template without system messages, or for one question
            continue
    return found
