"""Checks of a GGUF file beyond its weights: its tokenizer, and what llama.cpp computes from it."""

import time
from pathlib import Path
from typing import Any

import torch

from oribi.chat.ends import renders, turn_end_id
from oribi.chat.template import render_chat
from oribi.errors import ExportError
from oribi.gguf.llama_cpp import Continuation, LlamaCpp, LlamaCppUnavailable
from oribi.gguf.source import GGUFSource
from oribi.gguf.tokenizer_reading import rebuild_tokenizer
from oribi.save.check import Check, Outcome, percent
from oribi.save.probes import CONVERSATIONS, pack_rows, rendered_ids
from oribi.save.reference import ANSWER_TOKENS, GreedyAnswer, Trained
from oribi.save.stream import streamed_logits
from oribi.save.verify import (
    EQUAL_KL,
    EQUAL_PLACES,
    check_tokenizer,
    compare_answers,
    compare_stops,
    is_near_tie,
    mean_kl,
    same_ids,
)
from oribi.tensors import TensorSource

_IN_LLAMA_CPP = 0.03  # nats; it rounds activations to 8 bits where weights are quantised
_ANSWERS = 8  # of the trained model's prompts
_TOP = 64  # likeliest tokens of each place
_CONTEXT = 1024


def check_gguf_tokenizer(tokenizer: Any, path: Path) -> Check:
    """Compare the tokenizer with the one rebuilt from a GGUF file's metadata."""
    source = GGUFSource(path)
    saved = rebuild_tokenizer(source.file)
    saved.chat_template = source.value("tokenizer.chat_template")
    # a file whose template has no BOS says that none is added, see gguf.tokenizer
    return check_tokenizer(tokenizer, saved, "tokenizer rebuilt from the file", special=False)


def check_in_llama_cpp(
    trained: Trained,
    tokenizer: Any,
    path: Path,
    form: str,
    adapter: Path | None = None,
    both: TensorSource | None = None,
) -> list[Check]:
    """Ask llama.cpp about a file: token ids, probabilities and tokens of greedy answers, and where they end.

    With an adapter's file, `both` is the file's weights with the adapter added.
    Where llama.cpp cannot be asked, or no longer, the checks that remain are "not run".
    """
    name = "llama.cpp"
    found: list[Check] = []
    try:
        with LlamaCpp(path, _CONTEXT, adapter) as peer:
            found.append(_check_ids(peer, tokenizer))
            name = "end token in llama.cpp"
            found.append(_check_end_token(peer, trained, tokenizer))
            name = "answers in llama.cpp"
            asked = trained.answers[:_ANSWERS]
            given = [peer.generate(answer.prompt, ANSWER_TOKENS, top=_TOP) for answer in asked]
    except LlamaCppUnavailable as why:
        return [*found, Check(name, Outcome.NOT_RUN, str(why))]
    except ExportError as why:
        advice = "programs built on llama.cpp will not load it either"
        return [Check("loads in llama.cpp", Outcome.DIFFERENT, str(why), {"loaded": 0, "of": 1}, advice)]
    return [*found, *_compare_answers(trained, both or GGUFSource(path), asked, given, form)]


def _check_ids(peer: LlamaCpp, tokenizer: Any) -> Check:
    different, total, fixed_date = [], 0, False
    with_template = renders(tokenizer)
    for messages in CONVERSATIONS:
        text = messages[0]["content"]
        total += 1
        if peer.tokenize(text) != list(tokenizer(text, add_special_tokens=False)["input_ids"]):
            different.append(text)
        if with_template:
            total += 1
            same, dated = _same_prompt(peer, tokenizer, messages[:1])
            fixed_date = fixed_date or dated
            if not same:
                different.append(f"prompt about {text!r}")
    remark = ""
    if fixed_date:
        remark = ", compared with today's date, which llama.cpp writes in place of the template's fixed one"
    elif not with_template:
        remark = " (without a chat template that renders, no conversation was compared)"
    return same_ids("tokenizer in llama.cpp", total, different, remark)


def _same_prompt(peer: LlamaCpp, tokenizer: Any, messages: list[dict[str, str]]) -> tuple[bool, bool]:
    """Whether llama.cpp renders and cuts a prompt as the tokenizer does, and whether its date is another.

    llama.cpp gives templates today's date as `date_string` and `datetime`, in whose place many have a fixed one: both get the
    same. What calls `strftime_now` reads the clock, which may pass midnight or a minute between the two: three tries.
    """
    for _ in range(3):
        dates = {"date_string": time.strftime("%d %b %Y"), "datetime": time.strftime("%b %d %Y")}
        before = rendered_ids(tokenizer, messages, prompt=True, **dates)
        theirs = peer.tokenize(peer.render(messages, **dates), add_special=True)
        if theirs == before:
            break
        if before == rendered_ids(tokenizer, messages, prompt=True, **dates):
            return False, False
    else:
        return False, False
    return True, render_chat(tokenizer, messages, **dates) != render_chat(tokenizer, messages)


def _check_end_token(peer: LlamaCpp, trained: Trained, tokenizer: Any) -> Check:
    """Whether llama.cpp stops at the token that ends an answer, which is made the likeliest for the purpose."""
    name, end = "end token in llama.cpp", turn_end_id(tokenizer) if renders(tokenizer) else None
    end = tokenizer.eos_token_id if end is None else end
    if end is None:
        return Check(name, Outcome.NOT_TESTED, "neither the tokenizer nor its chat template has an end token")
    token = tokenizer.convert_ids_to_tokens(end)
    prompt = trained.answers[0].prompt if trained.answers else [0]
    stopped = len(peer.generate(prompt, 3, forced=end).tokens) == 1
    if stopped:
        return Check(name, Outcome.EQUAL, f"{token!r} ends an answer", {"ended": 1, "of": 1})
    advice = "the file does not mark the token that the model was trained to stop with as an end token"
    says = f"{token!r} does not end an answer"
    return Check(name, Outcome.DIFFERENT, says, {"ended": 0, "of": 1}, advice)


def _compare_answers(
    trained: Trained, source: TensorSource, asked: list[GreedyAnswer], given: list[Continuation], form: str
) -> list[Check]:
    """Compare llama.cpp's greedy answers with oribi's own reading of the file and with the trained model's."""
    pairs = [(one.prompt, answer) for one, answer in zip(asked, given) if answer.tokens]
    if not pairs:
        says = "there was no prompt to answer"
        return [Check("answers in llama.cpp", Outcome.NOT_TESTED, says)]
    rows = pack_rows([prompt + answer.tokens[:-1] for prompt, answer in pairs], "llama.cpp's answers")
    places, start = [], 0
    for (prompt, answer), document in zip(pairs, rows.documents):
        first = start + len(prompt) - 1
        places += range(first, first + len(answer.tokens))
        start += len(document)
    keep = torch.tensor(places, device=trained.device)
    ids, positions = rows.ids.to(trained.device), rows.positions.to(trained.device)
    read = streamed_logits(trained.config, source, ids, positions, trained.dtype, keep)
    sizes = [len(answer.tokens) for _, answer in pairs]
    answered = trained.evaluate(rows, keep).float().log_softmax(-1)
    read = read.log_softmax(-1)
    # the likeliest tokens of the trained model along llama.cpp's answers
    expected = [part.tolist() for part in answered.argmax(-1).cpu().split(sizes)]
    tokens = [answer.tokens for _, answer in pairs]
    ends, near_ties = [], 0
    for i, (trained_tokens, found) in enumerate(zip(expected, tokens)):
        place = next((i for i, token in enumerate(trained_tokens) if token in trained.stops), None)
        if place is not None:  # it must be the last: an end token that llama.cpp passes by ends nothing
            ends.append(place == len(found) - 1 and found[place] in trained.stops)
            row = sum(sizes[:i]) + place
            went_on = found[place] not in trained.stops
            near_ties += went_on and is_near_tie(answered[row], read[row], found[place])
    return [
        _check_probabilities(read.split(sizes), [answer for _, answer in pairs]),
        compare_answers("greedy answers in llama.cpp", expected, tokens, mean_kl(read, answered), form),
        compare_stops("ends of answers in llama.cpp", ends, len(pairs), form, near_ties),
    ]


def _check_probabilities(read: tuple[torch.Tensor, ...], given: list[Continuation]) -> Check:
    """KL of llama.cpp from our own reading of the file, over its likeliest tokens and the rest as one."""
    divergences, agreeing = [], 0
    for places, answer in zip(read, given):
        for place, found in zip(places, answer.logprobs):
            if found is not None:
                divergences.append(_divergence(place, found))
                agreeing += place.argmax().item() == max(found, key=found.get)
    name, count = "probabilities in llama.cpp", len(divergences)
    if not count:
        return Check(name, Outcome.NOT_TESTED, "llama.cpp gave no probabilities")
    kl = max(sum(divergences) / count, 0.0)
    outcome = Outcome.DIFFERENT
    if kl <= _IN_LLAMA_CPP:
        outcome = Outcome.EQUAL if kl <= EQUAL_KL and agreeing >= EQUAL_PLACES * count else Outcome.CLOSE
    says = (
        f"the likeliest token agrees with oribi's own reading of the file on {percent(agreeing / count)} of {count} "
        f"positions, KL {kl:.2g} (at most {_IN_LLAMA_CPP})"
    )
    figures = {
        "kl": kl,
        "kl_tolerance": _IN_LLAMA_CPP,
        "same_top_token": agreeing / count,
        "positions": count,
    }
    return Check(name, outcome, says, figures, "llama.cpp computes another model from this file")


def _divergence(place: torch.Tensor, found: dict[int, float]) -> float:
    p = place[torch.tensor(list(found), device=place.device)].cpu()
    q = torch.tensor(list(found.values()))
    rest = [torch.log1p(-x.exp().sum().clamp(max=1 - 1e-7)) for x in (p, q)]
    return ((p.exp() * (p - q)).sum() + rest[0].exp() * (rest[0] - rest[1])).item()
