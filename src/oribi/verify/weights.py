"""What is wrong with the weights, from what is said at the places of the probes."""

import math
from pathlib import PurePath

from oribi.save.check import Check, Outcome, percent
from oribi.save.probe_file import ExportedFile, ProbeFile, Said, mean_divergence
from oribi.save.verify import EQUAL_KL, EQUAL_PLACES, KL_TOLERANCE

# nats between oribi's reading of a file and a program's answers: activations in 16 bits, or in 8 as llama.cpp rounds them
ROUNDING = 0.03
_TELLING = 3.0  # times ROUNDING that the base must be away for the probes to tell it from the trained model
NEAREST = 0.25  # of the divergence from what is expected: one so much nearer is what answers
_OTHER_FORM = 0.5  # of the divergence from the base, up to which it is the trained model in another precision
_SAME_TOKENS = 0.82  # as for exports, see `save.verify`
_NAME = "weights"


def check_weights(probes: ProbeFile, file: ExportedFile, said: Said) -> Check:
    """Whether the tuned weights answer.

    Args:
        probes: of the export.
        file: that should answer.
        said: by what is verified.
    """
    kl, trained = mean_divergence(file.says, said), mean_divergence(probes.says["trained"], said)
    if math.isnan(kl):
        return Check(_NAME, Outcome.NOT_TESTED, "it gives no log-probabilities of the probes' tokens")
    agreeing, count = same_tokens(file.says, said)
    own = mean_divergence(probes.says["trained"], file.says)
    away = mean_divergence(probes.says["base"], file.says) if "base" in probes.says else math.nan
    figures = {
        "kl": kl, "kl_limit": ROUNDING, "kl_from_trained": trained, "kl_of_the_file": own, "kl_of_the_base": away,
        "same_top_token": agreeing, "positions": count,
    }  # fmt: skip
    measured = f"KL {kl:.2g} from {_called(file)} (at most {ROUNDING}), {percent(agreeing)} of {count} likeliest tokens the same"
    if kl <= ROUNDING:
        if not math.isnan(away) and away < _TELLING * ROUNDING:
            says = f"{measured}; but without its adapter the model answers these probes almost alike (KL {away:.2g})"
            return Check(_NAME, Outcome.NOT_TESTED, says, figures)
        nearer = _other_file(probes, file, said, kl)
        if nearer:
            return _form_differs(file, measured, figures, nearer)
        equal = kl <= EQUAL_KL and agreeing >= EQUAL_PLACES
        return Check(_NAME, Outcome.EQUAL if equal else Outcome.CLOSE, measured, figures)
    return _diagnosis(probes, file, said, figures, measured)


def _diagnosis(
    probes: ProbeFile, file: ExportedFile, said: Said, figures: dict[str, float], measured: str
) -> Check:
    kl, trained, away = figures["kl"], figures["kl_from_trained"], figures["kl_of_the_base"]
    others = {name: mean_divergence(other, said) for name, other in probes.says.items() if _is_model(name)}
    nearest = min(others, key=others.get, default=None)
    if nearest is not None and others[nearest] <= max(ROUNDING, NEAREST * kl):
        figures = {**figures, "nearest": nearest, "kl_of_nearest": others[nearest]}
        if nearest == "base":
            says = f"the base answers, without the adapter: KL {others['base']:.2g} from the base; {measured}"
            return Check(
                _NAME, Outcome.DIFFERENT, says, figures, "load the adapter, or serve the merged export"
            )
        says = (
            f"the adapter acts at about {nearest.removeprefix('x')} times its strength (KL {others[nearest]:.2g} from that); "
            f"{measured}"
        )
        return Check(
            _NAME, Outcome.DIFFERENT, says, figures,
            "its scale is lora_alpha / r (with use_rslora, lora_alpha / sqrt(r)), once; check for an adapter that is merged twice",
        )  # fmt: skip
    agreeing = figures["same_top_token"]
    allowed = max(KL_TOLERANCE.values())
    if (
        trained <= min(allowed, _OTHER_FORM * away if not math.isnan(away) else allowed)
        and agreeing >= _SAME_TOKENS
    ):
        return _form_differs(file, measured, figures, _other_file(probes, file, said, kl))
    if not math.isnan(away) and trained < away and others.get("base", math.inf) < _base_to_trained(probes):
        says = (
            f"weights between the base and the trained model answer: another or an older adapter; {measured}"
        )
        return Check(_NAME, Outcome.DIFFERENT, says, figures, "serve the export beside probes.json")
    named = f" {PurePath(probes.base).name}" if probes.base else ""
    says = (
        f"neither the trained model nor its base{named} answers (KL {others.get('base', math.nan):.2g} from that): "
        f"another base, another adapter or damaged weights; {measured}"
    )
    return Check(_NAME, Outcome.DIFFERENT, says, figures, "serve the export beside probes.json")


def _base_to_trained(probes: ProbeFile) -> float:
    return mean_divergence(probes.says["base"], probes.says["trained"])


def _is_model(name: str) -> bool:
    """Whether a signature is of another model, and not of another prompt."""
    return name == "base" or name.startswith("x")


def _other_file(probes: ProbeFile, file: ExportedFile, said: Said, kl: float) -> str:
    """The form of another file of the same export that answers, if it is clearly nearer."""
    others = {other.form: mean_divergence(other.says, said) for other in probes.files.values()}
    form = min(others, key=others.get, default=file.form)
    if form == file.form or others[form] > NEAREST * kl:
        return ""
    apart = next(
        mean_divergence(file.says, other.says) for other in probes.files.values() if other.form == form
    )
    return form if apart > EQUAL_KL else ""


def _form_differs(file: ExportedFile, measured: str, figures: dict[str, float], form: str) -> Check:
    what = f"as {form}" if form else "in another precision, or with the adapter of another step,"
    says = (
        f"the trained model answers {what} and not as {file.form}: {measured}, KL {figures['kl_from_trained']:.2g} from the "
        f"trained model (the file itself: {figures['kl_of_the_file']:.2g})"
    )
    advice = "serve the file as it is, without quantising it again, or verify against the export that is served (--file)"
    return Check("quantisation", Outcome.DIFFERENT, says, figures, advice)


def _called(file: ExportedFile) -> str:
    return f"the {file.form} export"


def same_tokens(expected: Said, found: Said) -> tuple[float, int]:
    """Share of places with the same likeliest token, of those that both know, and their number."""
    pairs = [
        max(place, key=place.get) == max(other, key=other.get)
        for places, others in zip(expected, found)
        for place, other in zip(places, others)
        if place and other
    ]
    return sum(pairs) / max(len(pairs), 1), len(pairs)
