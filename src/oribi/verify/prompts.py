"""What is wrong with prompts and ends: the chat template, BOS, the tokens that end an answer, the vocabulary."""

import math
from collections.abc import Sequence
from typing import Any

from oribi.save.check import Check, Outcome
from oribi.save.probe_file import ExportedFile, Messages, Probe, ProbeFile, mean_divergence
from oribi.verify.peers import ChatAnswer, Peer, PeerError
from oribi.verify.weights import NEAREST, ROUNDING

_TEMPLATE, _BOS, _STOPS = "chat template", "BOS", "stops"
_ADVICE = {
    _TEMPLATE: "serve it with the template that is in the export (tokenizer, GGUF file or Modelfile), and name no other",
    _BOS: "the template and the tokenizer each add BOS, or neither does; leave it to one of them",
    _STOPS: "name them as stop tokens: eos_token_id in generation_config.json, tokenizer.ggml.eot_token_id, or PARAMETER stop",
}


def check_prompts(probes: ProbeFile, peer: Peer) -> list[Check]:
    """Whether the peer makes the trained prompts of conversations: by their ids, where it shows them."""
    if probes.template is None:
        return [
            Check(
                _TEMPLATE, Outcome.NOT_TESTED, "the model was exported without a chat template that renders"
            )
        ]
    asked = [(p.messages, p.ids) for p in probes.probes if p.messages is not None]
    asked += [(one["messages"], one["ids"]) for one in probes.renderings]
    found = []
    for messages, expected in asked:
        try:
            ids = peer.prompt_ids(messages)
        except PeerError as error:
            return [
                Check(
                    _TEMPLATE, Outcome.DIFFERENT, f"{peer.name} does not render {_short(messages)}: {error}", {},
                    _ADVICE[_TEMPLATE],
                )
            ]  # fmt: skip
        if ids is not None:
            found.append((messages, expected, ids))
    if not found:
        return []
    if probes.dated and any(ids != expected for _, expected, ids in found):
        says = "the template writes today's date, so its prompts are not those of the export"
        return [Check(_TEMPLATE, Outcome.NOT_TESTED, says)]
    return _compare_ids(probes, found)


def _compare_ids(probes: ProbeFile, found: Sequence[tuple[Messages, list[int], list[int]]]) -> list[Check]:
    wrong = [(messages, expected, ids) for messages, expected, ids in found if ids != expected]
    figures: dict[str, Any] = {"same": len(found) - len(wrong), "of": len(found)}
    says = f"{figures['same']} of {len(found)} conversations become the trained prompt's token ids"
    if not wrong:
        return [Check(_TEMPLATE, Outcome.EQUAL, says, figures), Check(_BOS, Outcome.EQUAL, says, figures)]
    messages, expected, ids = wrong[0]
    bos = probes.bos
    if bos is not None and all(ids == [bos, *expected] for _, expected, ids in wrong):
        what = "twice" if expected[:1] == [bos] else "once, where the model was trained without"
        return [
            Check(
                _BOS,
                Outcome.DIFFERENT,
                f"{probes.text(bos)!r} begins a prompt {what}",
                figures,
                _ADVICE[_BOS],
            )
        ]
    if bos is not None and all(expected == [bos, *ids] for _, expected, ids in wrong):
        says = f"{probes.text(bos)!r} does not begin a prompt, as it did in training"
        return [Check(_BOS, Outcome.DIFFERENT, says, figures, _ADVICE[_BOS])]
    pairs = enumerate(zip(expected, ids))
    place = next((i for i, (one, other) in pairs if one != other), min(len(expected), len(ids)))
    says += f"; {_short(messages)}: token {place + 1} is {_token(probes, ids, place)}, was {_token(probes, expected, place)} in training"
    return [Check(_TEMPLATE, Outcome.DIFFERENT, says, figures, _ADVICE[_TEMPLATE])]


def _token(probes: ProbeFile, ids: list[int], place: int) -> str:
    if place >= len(ids):
        return "missing"
    return repr(probes.texts[ids[place]]) if ids[place] in probes.texts else f"id {ids[place]}"


def _short(messages: Messages) -> str:
    text = messages[-1]["content"]
    return repr(text if len(text) <= 40 else text[:40] + "...")


def check_chat(probes: ProbeFile, file: ExportedFile, peer: Peer, *, by_ids: bool) -> list[Check]:
    """What the peer answers to conversations: the length of its prompts, the first token, and where answers end.

    Args:
        by_ids: whether its prompts were compared by their ids already.
    """
    asked = [(i, probe) for i, probe in enumerate(probes.probes) if probe.messages is not None]
    answers: list[tuple[int, Probe, ChatAnswer]] = []
    for i, probe in asked:
        try:
            answer = peer.chat(probe)
        except PeerError as error:
            says = f"it does not answer {_short(probe.messages)}: {error}"
            return [
                Check(
                    "chat",
                    Outcome.DIFFERENT,
                    says,
                    {},
                    "ask it for chat completions without this probe first",
                )
            ]
        if answer is not None:
            answers.append((i, probe, answer))
    if not answers:
        return []
    found = [] if by_ids else _by_count(probes, answers)
    if all(check.passed for check in found) and not probes.dated:
        found += _by_first_tokens(probes, file, answers)
    return found + _by_ends(file, answers)


def _by_count(probes: ProbeFile, answers: Sequence[tuple[int, Probe, ChatAnswer]]) -> list[Check]:
    counted = [(a.prompt_tokens - len(p.ids)) for _, p, a in answers if a.prompt_tokens is not None]
    if not counted:
        return []
    figures = {"longer_by": counted}
    says = f"{counted.count(0)} of {len(counted)} prompts have as many tokens as in training"
    if not any(counted):
        return [Check(_TEMPLATE, Outcome.CLOSE, says, figures)]
    if probes.dated:
        return [Check(_TEMPLATE, Outcome.NOT_TESTED, f"{says}; the template writes today's date", figures)]
    if set(counted) in ({1}, {-1}) and probes.bos is not None:
        more = "one token more, as with a second BOS" if counted[0] == 1 else "one token less, as without BOS"
        return [Check(_BOS, Outcome.DIFFERENT, f"every prompt has {more}", figures, _ADVICE[_BOS])]
    return [Check(_TEMPLATE, Outcome.DIFFERENT, says, figures, _ADVICE[_TEMPLATE])]


def _by_first_tokens(
    probes: ProbeFile, file: ExportedFile, answers: Sequence[tuple[int, Probe, ChatAnswer]]
) -> list[Check]:
    """Compare what is said to conversations with what is expected, and with what faulty prompts give."""
    said = [answer.places for _, _, answer in answers]
    expected = {"": [file.says[i] for i, _, _ in answers]}
    for name in ("bos twice", "no bos", "no template"):
        if name in probes.says:
            expected[name] = [probes.says[name][i] for i, _, _ in answers]
    kls = {name: mean_divergence(one, said) for name, one in expected.items()}
    if math.isnan(kls[""]):
        return _by_text(answers)
    figures = {"kl": kls[""], "kl_limit": ROUNDING, **{f"kl {name}": kl for name, kl in kls.items() if name}}
    says = f"answers to {len(answers)} conversations: KL {kls['']:.2g} (at most {ROUNDING})"
    nearest = min(kls, key=kls.get)
    if kls[""] <= ROUNDING:
        return [Check("answers in chat", Outcome.EQUAL, says, figures)]
    if kls[nearest] <= max(ROUNDING, NEAREST * kls[""]):
        what = {
            "bos twice": "with a second BOS",
            "no bos": "without BOS",
            "no template": "without the chat template",
        }
        says += f"; they are those to prompts {what[nearest]} (KL {kls[nearest]:.2g})"
        if nearest != "no template":
            return [Check(_BOS, Outcome.DIFFERENT, says, figures, _ADVICE[_BOS])]
    return [Check("answers in chat", Outcome.DIFFERENT, says, figures, _ADVICE[_TEMPLATE])]


def _by_text(answers: Sequence[tuple[int, Probe, ChatAnswer]]) -> list[Check]:
    same = sum(a.text.strip().startswith(p.text.strip()) and bool(p.text.strip()) for _, p, a in answers)
    figures = {"same": same, "of": len(answers)}
    says = f"{same} of {len(answers)} answers in chat begin as the trained model's (it gives no log-probabilities)"
    outcome = (
        Outcome.EQUAL
        if same == len(answers)
        else Outcome.CLOSE
        if same * 2 >= len(answers)
        else Outcome.DIFFERENT
    )
    return [
        Check("answers in chat", outcome, says, figures, "it answers with other weights or another prompt")
    ]


def _by_ends(file: ExportedFile, answers: Sequence[tuple[int, Probe, ChatAnswer]]) -> list[Check]:
    """Where answers end that are the trained model's up to there, of those that the file ends there too."""
    reached = [
        (answer.stopped and answer.text.strip() == probe.text.strip())
        for i, probe, answer in answers
        if probe.stopped and _says(file, i, probe) and answer.text.strip().startswith(probe.text.strip())
    ]
    if not reached:
        return []
    figures = {"ended": sum(reached), "of": len(reached)}
    says = f"{sum(reached)} of {len(reached)} answers in chat end where the trained model ends them"
    outcome = Outcome.EQUAL if all(reached) else Outcome.DIFFERENT
    return [Check("ends in chat", outcome, says, figures, _ADVICE[_STOPS])]


def _says(file: ExportedFile, index: int, probe: Probe) -> bool:
    """Whether the last token of an answer is the file's likeliest there: quantised, it may continue."""
    place = file.says[index][-1]
    return bool(place) and max(place, key=place.get) == probe.answer[-1]


def check_stops(probes: ProbeFile, peer: Peer) -> list[Check]:
    """Whether each token that ends an answer ends it, and whether the vocabulary is whole."""
    prompt = probes.probes[0].ids
    ended = {}
    for token in probes.stops:
        try:
            ended[token] = peer.ends(token, prompt)
        except PeerError:  # it refuses what makes a token likely
            ended[token] = None
    known = {token: end for token, end in ended.items() if end is not None}
    found = []
    if known:
        missing = [probes.text(token) for token, end in known.items() if not end]
        figures = {"ended": len(known) - len(missing), "of": len(known)}
        if missing:
            says = (
                f"{', '.join(map(repr, missing))} {'does' if len(missing) == 1 else 'do'} not end an answer"
            )
            found.append(Check(_STOPS, Outcome.DIFFERENT, says, figures, _ADVICE[_STOPS]))
        else:
            says = f"{', '.join(repr(probes.text(token)) for token in known)}: every one ends an answer"
            found.append(Check(_STOPS, Outcome.EQUAL, says, figures))
    return found + _check_vocabulary(probes, peer)


def _check_vocabulary(probes: ProbeFile, peer: Peer) -> list[Check]:
    name, rows, last = "vocabulary", probes.shape["vocab_size"], probes.shape["tokens"] - 1
    advice = "serve it with the tokenizer and the embeddings of the export"
    if peer.vocabulary is not None and peer.vocabulary != rows:
        figures = {"tokens": peer.vocabulary, "expected": rows}
        says = f"it has {peer.vocabulary} tokens, the trained model {rows}"
        return [Check(name, Outcome.DIFFERENT, says, figures, advice)]
    try:
        taken = peer.takes(last)
    except PeerError as error:
        says = f"it does not take token {last}, the last of the vocabulary ({error})"
        return [Check(name, Outcome.DIFFERENT, says, {"last": last}, advice)]
    if peer.vocabulary is None and not taken:
        return []
    says = f"it has {rows} tokens" if peer.vocabulary is not None else f"it takes token {last}, the last one"
    return [Check(name, Outcome.EQUAL, says, {"last": last})]
