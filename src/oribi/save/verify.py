"""Whether an exported model says what the trained one says: probabilities, greedy answers, ends of answers, token ids.

Every export is read back from its file and asked what the trained model was asked: the mean KL divergence of the next
token's distribution in nats, the share of places with the same likeliest token, both losses, and greedy answers token for
token. Along a trained model's greedy answer, a file whose likeliest token is the same at every place gives that answer: one
pass over the file compares all answers. S tokens, V vocabulary, K compared places.
"""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoTokenizer

from oribi.chat.ends import renders
from oribi.gguf.mixes import METHODS
from oribi.models.files import Location
from oribi.models.unfused import from_checkpoint, packed_weights, require_exact_nf4
from oribi.models.wrapper import automatic
from oribi.save.check import Check, Outcome, percent
from oribi.save.probes import CONVERSATIONS, rendered_ids
from oribi.save.reference import ANSWER_TOKENS, Trained, logits_by_document, loss_of

# mean KL in nats above which a file is not the trained model, by its format
KL_TOLERANCE = {
    "float32": 0.002, "float16": 0.005, "bfloat16": 0.02, "fp8": 0.1, "4-bit": 0.3, "w4a16": 0.3,
    **{method.name: method.kl for method in METHODS.values()},
}  # fmt: skip
_INSTEAD = {
    "4-bit": "merged_16bit, or load the merged_16bit export in 4 bits",
    "fp8": "merged_16bit",
    "w4a16": "fp8 or merged_16bit",
}
SIXTEEN_BIT = 0.01  # added where the trained model itself computes in 16 bit
_WORSE = 1.05  # a base other than the trained one may raise the loss by this factor, and by 0.05
EQUAL_KL, EQUAL_PLACES = 0.01, 0.99  # nats, and share of places with the same likeliest token
# A file gives other answers if its distributions differ, beyond near ties that are decided differently, and none of three
# answers is the same or most are not. See docs/export.md for the runs that these numbers come from.
_NEAR_TIES = 0.05  # nats
_FEWEST, _NONE_SAME_TOKENS = 3, 0.95
# 82 % of tokens: SmolLM2-135M chatting keeps its ends and its loss in q4_k_m (85 and 90 %), and no longer in q4_0 (72 %) or
# q2_k (63 %); 85 % would leave it to the choice of questions whether a q4_k_m is refused.
_SAME_ANSWERS, _SAME_TOKENS = 0.5, 0.82
# share of the trained model's ends of answers that may be lost, one always: at an end, continuing is often a near tie
_LOST_STOPS = 1 / 3


def kl_tolerance(form: str, trained: Trained) -> float:
    """Mean KL that is allowed for a format."""
    return KL_TOLERANCE[form] + (SIXTEEN_BIT if trained.dtype != torch.float32 else 0.0)


def compare(trained: Trained, logits: torch.Tensor, form: str) -> list[Check]:
    """Compare an export with the trained model.

    Args:
        trained: the reference.
        logits: the export's [K, V] at the places of `trained.keep`.
        form: a key of `KL_TOLERANCE`.
    """
    on_rows, likeliest = trained.split(logits)
    expected, places = [answer.tokens for answer in trained.answers], trained.answer_logits(logits)
    ended = [
        (tokens[-1] in trained.stops, is_near_tie(end, place[-1].cpu(), tokens[-1]))
        for answer, end, place, tokens in zip(trained.answers, trained.ends, places, likeliest)
        if answer.stopped
    ]
    ends = [kept for kept, _ in ended]
    near_ties = sum(near for kept, near in ended if not kept)
    weights = _compare_weights(trained, on_rows, form)
    return [
        weights,
        compare_answers("greedy answers", expected, likeliest, weights.figures["kl"], form),
        compare_stops("ends of answers", ends, len(expected), form, near_ties),
    ]


def _compare_weights(trained: Trained, logits: torch.Tensor, form: str) -> Check:
    tolerance = kl_tolerance(form, trained)
    ours = logits.log_softmax(-1)
    kl = mean_kl(ours, trained.logprobs)
    agreeing = (trained.logprobs.argmax(-1) == ours.argmax(-1)).float().mean().item()
    figures = {
        "kl": kl,
        "kl_tolerance": tolerance,
        "same_top_token": agreeing,
        "positions": len(ours),
        "loss": loss_of(ours, trained.rows),
        "loss_of_trained": trained.loss,
    }
    outcome, advice = Outcome.CLOSE, _advice(form)
    if not math.isfinite(kl) or kl > tolerance:
        outcome = Outcome.DIFFERENT
    elif trained.base is not None and figures["loss"] > _WORSE * trained.loss + 0.05:
        outcome, advice = (
            Outcome.DIFFERENT,
            "this base does not suit the adapter; take base='dequantized'",
        )
    elif kl <= EQUAL_KL and agreeing >= EQUAL_PLACES:
        outcome = Outcome.EQUAL
    what = "these texts" if trained.rows.answers is None or trained.rows.answers.all() else "the answers"
    says = (
        f"the likeliest token agrees on {percent(agreeing)} of {len(ours)} positions{_precision(trained)}, KL {kl:.2g} (at most "
        f"{tolerance:.2g}), loss of {what} {figures['loss']:.3f} (trained model {trained.loss:.3f})"
    )
    return Check("weights read back", outcome, says, figures, advice)


def mean_kl(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Mean KL divergence of log-probabilities [K, V] from the expected ones, in nats."""
    return max(F.kl_div(ours, expected, log_target=True, reduction="batchmean").item(), 0.0)


def compare_answers(
    name: str, expected: list[list[int]], found: list[list[int]], kl: float, form: str
) -> Check:
    """Compare greedy answers token for token.

    Args:
        name: of the check.
        expected: the trained model's answers.
        found: the likeliest tokens of the file along each.
        kl: mean KL divergence of the file's distributions from the trained model's.
        form: a key of `KL_TOLERANCE`, for the advice.
    """
    if not expected:
        return Check(name, Outcome.NOT_TESTED, "there was no prompt to answer")
    answers, total = len(expected), sum(map(len, expected))
    same = sum(a == b for a, b in zip(expected, found))
    tokens = sum(a == b for one, other in zip(expected, found) for a, b in zip(one, other))
    none_same = not same and answers >= _FEWEST and tokens < _NONE_SAME_TOKENS * total
    most_differ = same < _SAME_ANSWERS * answers and tokens < _SAME_TOKENS * total
    near_ties = kl <= _NEAR_TIES
    outcome = Outcome.EQUAL if same == answers else Outcome.CLOSE
    if (none_same or most_differ) and not near_ties:
        outcome = Outcome.DIFFERENT
    says = (
        f"{same} of {answers} greedy answers are token for token the same; the likeliest token agrees on "
        f"{percent(tokens / total)} of their {total} tokens"
    )
    if (none_same or most_differ) and near_ties:
        says += f". The distributions are almost the same (KL {kl:.2g}): near ties were decided differently"
    figures = {"same_answers": same, "of": answers, "same_tokens": tokens, "of_tokens": total, "kl": kl}
    return Check(name, outcome, says, figures, _advice(form))


def is_near_tie(expected: torch.Tensor, found: torch.Tensor, token: int) -> bool:
    """Whether a token and the trained model's likeliest are both likely, to the trained model and to a file.

    Args:
        expected: the trained model's log-probabilities or logits [V].
        found: the file's.
        token: what the file says.

    Returns:
        Whether either gives the other's token at least half the probability of its own.
    """
    gaps = expected.max() - expected[token], found[token] - found[expected.argmax()]
    return max(gap.item() for gap in gaps) <= math.log(2)


def compare_stops(name: str, kept: list[bool], answers: int, form: str, near_ties: int = 0) -> Check:
    """Compare where answers end.

    Args:
        name: of the check.
        kept: for each answer that the trained model ends, whether the file ends it at the same token.
        answers: how many there were.
        form: a key of `KL_TOLERANCE`, for the advice.
        near_ties: how many of the lost ends were near ties for the trained model itself.
    """
    if not answers:
        return Check(name, Outcome.NOT_TESTED, "there was no prompt to answer")
    if not kept:
        says = f"the trained model ended none of {answers} answers within {ANSWER_TOKENS} tokens"
        return Check(name, Outcome.NOT_TESTED, says, {"ended": 0, "of": 0})
    lost = len(kept) - sum(kept)
    clearly = lost - near_ties
    too_many = clearly == len(kept) or clearly > max(1, _LOST_STOPS * len(kept))
    outcome = Outcome.DIFFERENT if too_many else Outcome.CLOSE if lost else Outcome.EQUAL
    says = f"{sum(kept)} of {len(kept)} answers end where the trained model ends them"
    if near_ties:
        says += f" ({near_ties} of the others are near ties)"
    advice = f"it continues where the trained model ends its answer; {_advice(form)}"
    return Check(name, outcome, says, {"ended": sum(kept), "of": len(kept)}, advice)


def _precision(trained: Trained) -> str:
    name = str(trained.dtype).removeprefix("torch.")
    return "" if name == "float32" else f" (computed in {name}, which rounds)"


def _advice(form: str) -> str:
    method = METHODS.get(form)
    instead = method.instead if method is not None else _INSTEAD.get(form, "")
    if not instead:
        return "the written weights are not those that were trained"
    return f"{form} loses too much of this model; use {instead}"


def logits_of_whole(trained: Trained, folder: Path) -> torch.Tensor:
    """Logits [K, V] of a written checkpoint outside the family table, which is loaded whole, at the trained model's places."""
    config, location = AutoConfig.from_pretrained(folder), Location("checkpoint", folder, str(folder))
    packed = packed_weights(location, config)
    loaded = (
        from_checkpoint(automatic(config), location, config, trained.dtype, packed).to(trained.device).eval()
    )
    require_exact_nf4(loaded, str(folder), trained.device)
    return logits_by_document(loaded, trained.pack, trained.keep)


def check_tokenizer(tokenizer: Any, saved: Any, name: str, *, special: bool) -> Check:
    """Compare a tokenizer with the saved one by their ids of texts and rendered conversations.

    Args:
        special: whether the ids that are put around every text are compared too.
    """
    before, found = _tokenized(tokenizer, special), _tokenized(saved, special)
    after = _tokenized(tokenizer, special)  # a template that writes the time may render differently by now
    different = [text for text in before if found.get(text) not in (before[text], after[text])]
    return same_ids(name, len(before), different)


def _tokenized(tokenizer: Any, special: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with_template = renders(tokenizer)
    if special and tokenizer.chat_template and not with_template:  # GGUF files leave it out
        found["chat template, which fails on a plain conversation"] = tokenizer.chat_template
    for messages in CONVERSATIONS:
        text = messages[0]["content"]
        found[text] = list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
        if with_template:
            found[f"conversation about {text!r}"] = rendered_ids(tokenizer, messages)
            found[f"prompt about {text!r}"] = rendered_ids(tokenizer, messages[:1], prompt=True)
    return found


def same_ids(name: str, total: int, different: list[str], remark: str = "") -> Check:
    """The outcome of comparing token ids of texts, of which some are different."""
    figures: dict[str, Any] = {"same": total - len(different), "of": total}
    says = f"{total - len(different)} of {total} texts and conversations have the same token ids{remark}"
    if different:
        figures["first_difference"] = different[0]
        says += f"; other ids: {different[0]}"
    return Check(
        name,
        Outcome.DIFFERENT if different else Outcome.EQUAL,
        says,
        figures,
        "the exported tokenizer or chat template differs from the one trained with",
    )


def check_saved_tokenizer(tokenizer: Any, folder: Path) -> Check:
    """Compare the tokenizer with the one that plain transformers loads from the folder."""
    saved = AutoTokenizer.from_pretrained(folder)
    return check_tokenizer(tokenizer, saved, "tokenizer read by transformers", special=True)
