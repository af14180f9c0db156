"""Whether an exported model says what the trained one says: probabilities, tokens, and where it stops.

Every export is read back from its file and compared with the trained model on the same rows: the mean KL divergence of
the next token's distribution in nats, the share of places with the same likeliest token, and both losses.
S tokens, V vocabulary.
"""

import copy
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from oribi.errors import ExportError
from oribi.models.checkpoint import SafetensorsSource, TensorSource
from oribi.models.decoder import DecoderForCausalLM
from oribi.models.gguf_source import GGUFSource
from oribi.models.gguf_tokenizer import rebuild_tokenizer
from oribi.save.llama_cpp import Answer, LlamaCpp
from oribi.save.nf4_checkpoint import Nf4Source
from oribi.save.probes import CONVERSATIONS, Rows, pack, rendered_ids
from oribi.save.stopping import stop_ids
from oribi.save.stream import streamed_logits

# mean KL in nats against the trained model, by what was written; four bits of a 135M model measured 0.02 to 0.4
KL_TOLERANCE = {
    "float32": 0.002, "float16": 0.005, "bfloat16": 0.02, "4-bit": 0.3,
    "f32": 0.002, "f16": 0.005, "bf16": 0.02, "q8_0": 0.03, "q6_k": 0.06,
    "q5_k_m": 0.15, "q5_k_s": 0.15, "q5_1": 0.15, "q5_0": 0.2,
    "q4_k_m": 0.4, "q4_k_s": 0.4, "q4_1": 0.4, "q4_0": 0.5,
    "q3_k_l": 1.0, "q3_k_m": 1.0, "q3_k_s": 1.5, "q2_k": 2.0,
}  # fmt: skip
SIXTEEN_BIT = 0.01  # added where the trained model itself computes in 16 bit
_WORSE = 1.05  # a base other than the trained one may have a loss so many times as high, and 0.05 more
_IN_LLAMA_CPP = 0.03  # it rounds activations to 8 bits where weights are quantised
_ANSWER_TOKENS = 48
# figures in the printed line; the loss is the whole texts', prompts included
_WORDS = {"kl_tolerance": "at most", "same_top_token": "same likeliest token", "loss": "loss of all tokens",
          "loss_of_trained": "the trained model's", "went_on_after_end_token": "went on after the end",
          "same_as_trained": "same as trained"}  # fmt: skip


@dataclass
class Check:
    """One comparison: what, its figures, whether they are within tolerance, and if not what to do."""

    name: str
    passed: bool
    figures: dict[str, Any] = field(default_factory=dict)
    advice: str = ""

    def shown(self) -> str:
        """The figures in words."""
        values = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in self.figures.items()}
        return ", ".join(f"{_WORDS.get(key, key)} {value}" for key, value in values.items())

    def line(self) -> str:
        """The check in one line."""
        if self.passed:
            return f"ok   {self.name}: {self.shown()}"
        return f"FAIL {self.name}: {self.shown()}. {self.advice}"

    def to_json(self) -> dict[str, Any]:
        said = asdict(replace(self, advice="") if self.passed else self)
        return {key: value for key, value in said.items() if value != ""}


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
        self.logprobs = self.evaluate(rows).log_softmax(-1)
        self.loss = _loss(self.logprobs, rows)
        self.other_base = False

    def evaluate(self, rows: Rows) -> torch.Tensor:
        """The model's logits [S, V] float32 on rows."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                if not isinstance(self.inner, DecoderForCausalLM):
                    return logits_by_document(self.model, rows)
                ids, positions = rows.ids.to(self.device), rows.positions.to(self.device)
                return self.model(input_ids=ids, position_ids=positions, use_cache=False).logits[0].float()
        finally:
            self.model.train(training)

    def on_base(self, merged: TensorSource) -> "Trained":
        """The same adapter on another base: what a file merged into that base must say.

        Its loss may not be much worse than that of the model as trained, whose `loss` is kept for comparison.
        """
        moved = copy.copy(self)
        logits = streamed_logits(self.config, merged, self.ids, self.positions, self.dtype)
        moved.logprobs = logits.log_softmax(-1)
        moved.other_base = True
        return moved


def check_weights(name: str, trained: Trained, logits: torch.Tensor, tolerance: float) -> Check:
    """Compare an export's logits [S, V] with the trained model's."""
    ours = logits.float().log_softmax(-1)
    kl = max(F.kl_div(ours, trained.logprobs, log_target=True, reduction="batchmean").item(), 0.0)
    agreeing = (trained.logprobs.argmax(-1) == ours.argmax(-1)).float().mean().item()
    figures = {
        "kl": kl,
        "kl_tolerance": tolerance,
        "same_top_token": agreeing,
        "loss": _loss(ours, trained.rows),
        "loss_of_trained": trained.loss,
    }
    passed, advice = (
        math.isfinite(kl) and kl <= tolerance,
        "the written weights are not those that were trained",
    )
    if tolerance >= 0.1:
        advice = "this format loses too much of this model; choose one with more bits"
    if passed and trained.other_base and figures["loss"] > _WORSE * trained.loss + 0.05:
        passed, advice = False, "this base does not suit the adapter; take base='dequantized'"
    return Check(name, passed, figures, advice)


def check_source(name: str, trained: Trained, source: TensorSource, tolerance: float) -> Check:
    """Compare a written checkpoint or GGUF file, streamed from the disk, with the trained model."""
    logits = streamed_logits(trained.config, source, trained.ids, trained.positions, trained.dtype)
    return check_weights(name, trained, logits, tolerance)


def check_folder(name: str, trained: Trained, folder: Path, tolerance: float) -> Check:
    """Compare a written checkpoint with the trained model: streamed, or outside the family table loaded whole."""
    files = sorted(folder.glob("model*.safetensors"))
    if isinstance(trained.inner, DecoderForCausalLM):
        return check_source(name, trained, Nf4Source(SafetensorsSource(files)), tolerance)
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


def check_tokenizer(tokenizer: Any, saved: Any, name: str, *, special: bool) -> Check:
    """Compare the ids of texts and rendered conversations by a tokenizer and by what was saved of it.

    Args:
        special: whether the ids that are put around every text are compared too.
    """
    expected, found = _tokenized(tokenizer, special), _tokenized(saved, special)
    return _same_ids(name, len(expected), [text for text in expected if expected[text] != found.get(text)])


def _tokenized(tokenizer: Any, special: bool) -> dict[str, list[int]]:
    found = {}
    for messages in CONVERSATIONS:
        text = messages[0]["content"]
        found[text] = list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
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
    saved = AutoTokenizer.from_pretrained(folder)
    return check_tokenizer(tokenizer, saved, "tokenizer read by transformers", special=True)


def check_gguf_tokenizer(tokenizer: Any, path: Path) -> Check:
    """Compare the tokenizer with the one rebuilt from a GGUF file's metadata."""
    source = GGUFSource(path)
    saved = rebuild_tokenizer(source.value, str(path))
    saved.chat_template = source.value("tokenizer.chat_template")
    # a file whose template has no BOS says that none is added, see gguf.tokenizer
    return check_tokenizer(tokenizer, saved, "tokenizer rebuilt from the file", special=False)


def check_in_llama_cpp(trained: Trained, tokenizer: Any, path: Path) -> list[Check]:
    """What llama.cpp makes of a file: token ids, probabilities along its greedy answers, and where it stops."""
    try:
        peer = LlamaCpp(path, context=1024)
    except ExportError:
        return [
            Check("loads in llama.cpp", False, {"loaded": 0, "of": 1}, "llama.cpp's own message stands above")
        ]
    different, total = [], 0
    prompts: list[list[int]] = []
    for messages in CONVERSATIONS:
        text = messages[0]["content"]
        total += 1
        if peer.tokenize(text) != list(tokenizer(text, add_special_tokens=False)["input_ids"]):
            different.append(text)
        if not tokenizer.chat_template:
            prompts.append(list(tokenizer(text)["input_ids"]))
            continue
        prompts.append(rendered_ids(tokenizer, messages[:1], prompt=True))
        total += 1
        if peer.tokenize(peer.render(messages[:1]), add_special=True) != prompts[-1]:
            different.append(f"prompt about {text!r}")
    answers = [(prompt, peer.generate(prompt, _ANSWER_TOKENS, top=64)) for prompt in prompts[:3]]
    rows = pack([prompt + answer.tokens[:-1] for prompt, answer in answers], "llama.cpp's answers")
    return [
        _same_ids("tokenizer in llama.cpp", total, different),
        _check_answers(trained, GGUFSource(path), rows, answers),
        _check_stops(trained, tokenizer, rows, answers),
    ]


def _check_answers(
    trained: Trained, source: TensorSource, rows: Rows, answers: list[tuple[list[int], Answer]]
) -> Check:
    """KL of llama.cpp from our own reading of the file, over its 64 likeliest tokens and the rest as one."""
    ids, positions = rows.ids.to(trained.device), rows.positions.to(trained.device)
    logits = streamed_logits(trained.config, source, ids, positions, trained.dtype)
    divergences, agreeing = [], []
    for places, (_, answer) in zip(_answer_places(logits.log_softmax(-1), rows, answers), answers):
        for place, found in zip(places, answer.logprobs):
            if found is not None:
                divergences.append(_divergence(place, found))
                agreeing.append(float(place.argmax().item() == max(found, key=found.get)))
    kl = max(sum(divergences) / max(len(divergences), 1), 0.0)
    figures = {
        "kl": kl,
        "kl_tolerance": _IN_LLAMA_CPP,
        "same_top_token": sum(agreeing) / max(len(agreeing), 1),
    }
    return Check(
        "probabilities in llama.cpp",
        kl <= _IN_LLAMA_CPP,
        figures,
        "llama.cpp computes another model from this file",
    )


def _answer_places(
    values: torch.Tensor, rows: Rows, answers: list[tuple[list[int], Answer]]
) -> list[torch.Tensor]:
    """Of values [S, ...] on packed rows, those at the places that predict each answer's tokens."""
    documents = values.split([len(row) for row in rows.documents])
    return [document[len(prompt) - 1 :] for document, (prompt, _) in zip(documents, answers)]


def _divergence(place: torch.Tensor, found: dict[int, float]) -> float:
    p = place[torch.tensor(list(found), device=place.device)].cpu()
    q = torch.tensor(list(found.values()))
    rest = [torch.log1p(-x.exp().sum().clamp(max=1 - 1e-7)) for x in (p, q)]
    return ((p.exp() * (p - q)).sum() + rest[0].exp() * (rest[0] - rest[1])).item()


def _check_stops(
    trained: Trained, tokenizer: Any, rows: Rows, answers: list[tuple[list[int], Answer]]
) -> Check:
    """Whether llama.cpp ends an answer at the token that ends answers, and says what the trained model says."""
    stops = set(stop_ids(tokenizer, trained.config.eos_token_id))
    likeliest = _answer_places(trained.evaluate(rows).argmax(-1), rows, answers)
    tokens = [answer.tokens for _, answer in answers]
    passed_by = sum(bool(stops & set(answer[:-1])) for answer in tokens)
    figures = {
        "stopped": sum(answer[-1] in stops for answer in tokens),
        "went_on_after_end_token": passed_by,
        "of": len(answers),
        "same_as_trained": sum(mine.tolist() == answer for mine, answer in zip(likeliest, tokens)),
    }
    advice = "the file does not mark the token that the model was trained to stop with as an end token"
    return Check("greedy answers stop in llama.cpp", passed_by == 0, figures, advice)
