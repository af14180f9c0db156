"""Whether an exported model says what the trained one says: probabilities, tokens, and where it stops.

Every export is read back from its file and compared with the trained model on the same rows: the mean KL divergence of
the next token's distribution in nats, the share of places with the same likeliest token, and both losses.
S tokens, V vocabulary.
"""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from oribi.models.checkpoint import SafetensorsSource, TensorSource
from oribi.models.decoder import DecoderForCausalLM
from oribi.models.gguf_source import GGUFSource
from oribi.models.gguf_tokenizer import rebuild_tokenizer
from oribi.save.llama_cpp import LlamaCpp
from oribi.save.probes import CONVERSATIONS, Rows, rendered_ids
from oribi.save.stream import streamed_logits

# mean KL in nats against the trained model, by what was written; four bits of a 135M model measured 0.02 to 0.4
KL_TOLERANCE = {
    "float32": 0.002, "float16": 0.005, "bfloat16": 0.02, "4-bit": 0.3,
    "f32": 0.002, "f16": 0.005, "bf16": 0.02, "q8_0": 0.03, "q6_k": 0.06,
    "q5_k_m": 0.15, "q5_k_s": 0.15, "q5_1": 0.15, "q5_0": 0.2,
    "q4_k_m": 0.4, "q4_k_s": 0.4, "q4_1": 0.4, "q4_0": 0.5,
    "q3_k_l": 1.0, "q3_k_m": 1.0, "q3_k_s": 1.5, "q2_k": 2.0,
}  # fmt: skip
OTHER_BASE = 0.25  # added where the base is not the one the adapter was trained on
SIXTEEN_BIT = 0.01  # added where the trained model itself computes in 16 bit
_STOP_TOKENS = 48


@dataclass
class Check:
    """One comparison: what, its figures, whether they are within tolerance, and if not what to do."""

    name: str
    passed: bool
    figures: dict[str, Any] = field(default_factory=dict)
    advice: str = ""

    def line(self) -> str:
        """The check in one line."""
        shown = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in self.figures.items()
        )
        return f"{'ok  ' if self.passed else 'FAIL'} {self.name}: {shown}" + (
            "" if self.passed else f". {self.advice}"
        )

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value != ""}


class Trained:
    """The trained model's answers on the rows, computed once.

    Args:
        model: PEFT's or plain; it is put into evaluation mode and back.
        rows: what is compared on.
    """

    def __init__(self, model: nn.Module, rows: Rows) -> None:
        self.model, self.rows = model, rows
        self.inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.config = self.inner.config
        self.device = next(self.inner.parameters()).device
        floats = [p.dtype for p in self.inner.parameters() if p.is_floating_point()]
        self.dtype = next((d for d in (torch.bfloat16, torch.float16) if d in floats), torch.float32)
        self.ids, self.positions = rows.ids.to(self.device), rows.positions.to(self.device)
        self.logprobs = self._evaluate().log_softmax(-1)
        self.loss = _loss(self.logprobs, rows)

    def _evaluate(self) -> torch.Tensor:
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                if isinstance(self.inner, DecoderForCausalLM):
                    answer = self.model(input_ids=self.ids, position_ids=self.positions, use_cache=False)
                    return answer.logits[0].float()
                return logits_by_document(self.model, self.rows)
        finally:
            self.model.train(training)

    def greedy(self, prompt: list[int], tokens: int) -> list[int]:
        """The model's own greedy continuation of a prompt."""
        training = self.model.training
        self.model.eval()
        try:
            ids = torch.tensor([prompt], device=self.device)
            answer = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
            )
            return answer[0, len(prompt) :].tolist()
        finally:
            self.model.train(training)


def check_weights(name: str, trained: Trained, logits: torch.Tensor, tolerance: float) -> Check:
    """Compare an export's logits [S, V] with the trained model's."""
    ours = logits.float().log_softmax(-1)
    kl = (trained.logprobs.exp() * (trained.logprobs - ours)).sum(-1).mean().item()
    agreeing = (trained.logprobs.argmax(-1) == ours.argmax(-1)).float().mean().item()
    figures = {
        "kl": kl,
        "kl_tolerance": tolerance,
        "same_top_token": agreeing,
        "loss": _loss(ours, trained.rows),
        "loss_of_trained": trained.loss,
    }
    passed = math.isfinite(kl) and kl <= tolerance
    return Check(
        name,
        passed,
        figures,
        "the written weights are not those that were trained"
        if tolerance < 0.1
        else "this format loses too much of this model; choose one with more bits, or base='dequantized'",
    )


def check_source(name: str, trained: Trained, source: TensorSource, tolerance: float) -> Check:
    """Compare a written checkpoint or GGUF file, streamed from the disk, with the trained model."""
    logits = streamed_logits(trained.config, source, trained.ids, trained.positions, trained.dtype)
    return check_weights(name, trained, logits, tolerance)


def check_folder(name: str, trained: Trained, folder: Path, tolerance: float) -> Check:
    """Compare a written checkpoint with the trained model: streamed, or outside the family table loaded whole."""
    files = sorted(folder.glob("model*.safetensors"))
    if isinstance(trained.inner, DecoderForCausalLM):
        return check_source(name, trained, SafetensorsSource(files), tolerance)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=trained.dtype).to(trained.device).eval()
    return check_weights(name, trained, logits_by_document(loaded, trained.rows), tolerance)


def logits_by_document(model: nn.Module, rows: Rows) -> torch.Tensor:
    """Logits [S, V] float32 of a model that takes no packs."""
    device = next(model.parameters()).device
    with torch.no_grad():
        return torch.cat(
            [model(input_ids=torch.tensor([row], device=device)).logits[0].float() for row in rows.documents]
        )


def _loss(logprobs: torch.Tensor, rows: Rows) -> float:
    return F.nll_loss(logprobs, rows.targets().to(logprobs.device), ignore_index=-100).item()


def check_tokenizer(tokenizer: Any, saved: Any, name: str) -> Check:
    """Compare the ids of rendered conversations and of texts, before and after saving."""
    different = [
        text for text in _tokenized(tokenizer) if _tokenized(tokenizer)[text] != _tokenized(saved)[text]
    ]
    return _same_ids(name, len(_tokenized(tokenizer)), different)


def _tokenized(tokenizer: Any) -> dict[str, list[int]]:
    found = {}
    for messages in CONVERSATIONS:
        text = messages[0]["content"]
        found[text] = list(tokenizer(text)["input_ids"])
        if tokenizer.chat_template:
            found[f"conversation about {text!r}"] = rendered_ids(tokenizer, messages)
            found[f"prompt about {text!r}"] = rendered_ids(tokenizer, messages[:1], prompt=True)
    return found


def _same_ids(name: str, total: int, different: list[str]) -> Check:
    return Check(
        name,
        not different,
        {
            "same": total - len(different),
            "of": total,
            **({"first_difference": different[0]} if different else {}),
        },
        "the exported tokenizer or chat template differs from the one trained with",
    )


def check_saved_tokenizer(tokenizer: Any, folder: Path) -> Check:
    """Compare the tokenizer with the one that plain transformers loads from the folder."""
    return check_tokenizer(tokenizer, AutoTokenizer.from_pretrained(folder), "tokenizer read by transformers")


def check_gguf_tokenizer(tokenizer: Any, path: Path) -> Check:
    """Compare the tokenizer with the one rebuilt from a GGUF file's metadata."""
    source = GGUFSource(path)
    saved = rebuild_tokenizer(source.value, str(path))
    saved.chat_template = source.value("tokenizer.chat_template")
    return check_tokenizer(tokenizer, saved, "tokenizer rebuilt from the file")


def check_in_llama_cpp(trained: Trained, tokenizer: Any, path: Path, tolerance: float) -> list[Check]:
    """What llama.cpp makes of a file: token ids, probabilities along its greedy answers, and where it stops."""
    peer = LlamaCpp(path, context=1024)
    different, total = [], 0
    prompts: list[list[int]] = []
    for messages in CONVERSATIONS:
        text = messages[0]["content"]
        expected = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        total += 1
        if peer.tokenize(text) != expected:
            different.append(text)
        if tokenizer.chat_template:
            prompts.append(rendered_ids(tokenizer, messages[:1], prompt=True))
            total += 1
            if peer.tokenize(peer.render(messages[:1]), add_special=True) != prompts[-1]:
                different.append(f"prompt about {text!r}")
        else:
            prompts.append(list(tokenizer(text)["input_ids"]))
    checks = [_same_ids("tokenizer in llama.cpp", total, different)]
    answers = [(prompt, peer.generate(prompt, _STOP_TOKENS, top=64)) for prompt in prompts[:3]]
    checks.append(_check_answers(trained, answers, tolerance))
    ends = {trained.config.eos_token_id} if isinstance(trained.config.eos_token_id, int) else set()
    ends |= {tokenizer.eos_token_id}
    mine = [trained.greedy(prompt, _STOP_TOKENS) for prompt, _ in answers]
    stopped = sum(len(tokens) < _STOP_TOKENS or tokens[-1] in ends for tokens in mine)
    theirs = sum(len(answer.tokens) < _STOP_TOKENS for _, answer in answers)
    checks.append(
        Check(
            "greedy answers stop in llama.cpp",
            stopped == 0 or theirs > 0,
            {
                "stopped": theirs,
                "trained_stopped": stopped,
                "of": len(answers),
                "same_answers": sum(a == b.tokens[: len(a)] for a, (_, b) in zip(mine, answers)),
            },
            "the file's end token is not the one the model was trained to stop with",
        )
    )
    return checks


def _check_answers(trained: Trained, answers: list, tolerance: float) -> Check:
    """KL over llama.cpp's 64 likeliest tokens and the rest together, along its own answers."""
    divergences, agreeing = [], []
    for prompt, answer in answers:
        ids = torch.tensor([prompt + answer.tokens[:-1]], device=trained.device)
        with torch.no_grad():
            training = trained.model.training
            trained.model.eval()
            logits = trained.model(input_ids=ids).logits[0, len(prompt) - 1 :].float()
            trained.model.train(training)
        for place, found in zip(logits.log_softmax(-1), answer.logprobs):
            if found is None:
                continue
            tokens = torch.tensor(list(found), device=place.device)
            p = place[tokens]
            q = torch.tensor(list(found.values()), device=place.device)
            rest = [torch.log1p(-x.exp().sum().clamp(max=1 - 1e-7)) for x in (p, q)]
            kl = (p.exp() * (p - q)).sum() + rest[0].exp() * (rest[0] - rest[1])
            divergences.append(kl.item())
            agreeing.append(float(place.argmax().item() == max(found, key=found.get)))
    kl = sum(divergences) / len(divergences)
    return Check(
        "probabilities in llama.cpp",
        kl <= tolerance,
        {"kl": kl, "kl_tolerance": tolerance, "same_top_token": sum(agreeing) / len(agreeing)},
        "llama.cpp computes another model from this file",
    )
