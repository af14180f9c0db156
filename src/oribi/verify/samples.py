"""What is wrong with a file of weights, from a few values of each tensor: names the fault where what is said cannot.

o observed, f the file's own values, d what the adapter added to them: o = f - d + s d at the strength s.
"""

from typing import Any

import torch

from oribi.save.check import Check, Outcome
from oribi.save.samples import SampledSource

_NAME = "tensors"
_EQUAL = 0.01  # of a tensor's values, in their root mean square: what rounding to 16 bits leaves, and more
_QUANTISED = 0.35  # likewise: what a few bits leave
_STRENGTH = 0.1  # by which the adapter's strength may be off
_EXPLAINED = 0.4  # of the difference, what another strength of the adapter may leave of it
_ADVICE = "serve the export beside probes.json"


def check_samples(
    expected: dict[str, Any], observed: SampledSource, *, rounded_otherwise: bool = False
) -> Check | None:
    """Compare the values of a file's tensors with those of the exported file.

    Args:
        expected: `ExportedFile.samples`.
        observed: the file, every tensor read.
        rounded_otherwise: whether its tensors are stored in another form, so that their values may be off by as much as a few
            bits leave.

    Returns:
        The finding; None where the export kept no samples.
    """
    if not expected:
        return None
    shapes = observed.shapes()
    missing = [name for name in expected if name not in observed.values]
    if missing:
        says = f"{len(missing)} of {len(expected)} tensors are not in it, {missing[0]} the first"
        return Check(_NAME, Outcome.DIFFERENT, says, {"missing": len(missing)}, _ADVICE)
    other = [name for name, entry in expected.items() if list(shapes[name]) != entry["shape"]]
    if other:
        name = other[0]
        says = f"{name} is {list(shapes[name])}, was {expected[name]['shape']} in the export"
        kind = "vocabulary" if "embed" in name or name == "lm_head.weight" else _NAME
        return Check(kind, Outcome.DIFFERENT, says, {"other_shapes": len(other)}, _ADVICE)
    wanted = {name: torch.tensor(entry["values"]) for name, entry in expected.items()}
    errors = {name: _error(observed.values[name], wanted[name]) for name in wanted}
    worst = max(errors.values(), default=0.0)
    figures = {"tensors": len(errors), "largest_difference": worst}
    if worst <= (_QUANTISED if rounded_otherwise else _EQUAL):
        says = f"the values of all {len(errors)} tensors that were sampled are those of the export"
        says += f", but for rounding by up to {100 * worst:.2g} %" if worst > _EQUAL else ""
        return Check(_NAME, Outcome.CLOSE if worst > _EQUAL else Outcome.EQUAL, says, figures)
    return _diagnosis(expected, wanted, observed.values, errors, figures)


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm().clamp_min(1e-12)).item()


def _diagnosis(
    expected: dict[str, Any],
    wanted: dict[str, torch.Tensor],
    found: dict[str, torch.Tensor],
    errors: dict[str, float],
    figures: dict[str, Any],
) -> Check:
    wrong = [name for name, error in errors.items() if error > _EQUAL]
    moved = {name: other for name in wrong if (other := _moved_from(name, wanted, found)) is not None}
    figures["different"] = len(wrong)
    if moved:
        name, other = next(iter(moved.items()))
        says = f"{len(moved)} tensors hold the values of others: {name} those of {other}"
        return Check("layers", Outcome.DIFFERENT, says, {**figures, "moved": len(moved)}, _ADVICE)
    updates = {
        name: torch.tensor(entry["update"]) for name, entry in expected.items() if entry["update"] is not None
    }
    frozen = [name for name in wrong if name not in updates]
    strength, left = _strength(updates, wanted, found)
    if abs(strength - 1) > _STRENGTH and left <= _EXPLAINED:
        figures["strength"] = strength
        what = (
            "the adapter is missing: these are the base's values"
            if abs(strength) <= _STRENGTH
            else f"the adapter acts at {strength:.2g} times its strength"
        )
        return Check("adapter", Outcome.DIFFERENT, what, figures, _ADVICE)
    if updates and not frozen:
        says = (
            f"{len(wrong)} of {len(updates)} tensors that the adapter changes have other values, and all others those of the export: "
            "another or an older adapter"
        )
        return Check("adapter", Outcome.DIFFERENT, says, figures, _ADVICE)
    matrices = [errors[name] for name in errors if len(expected[name]["shape"]) > 1]
    if max(matrices, default=1.0) <= _QUANTISED:
        says = f"values differ by up to {100 * figures['largest_difference']:.2g} % of a tensor's, as by another quantisation"
        return Check(
            "quantisation",
            Outcome.DIFFERENT,
            says,
            figures,
            "verify against the export that is served (--file)",
        )
    says = f"{len(wrong)} of {len(errors)} tensors have other values, {frozen[0] if frozen else wrong[0]} the first: another base"
    return Check("base", Outcome.DIFFERENT, says, figures, _ADVICE)


def _moved_from(name: str, wanted: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> str | None:
    """Another tensor of the same kind whose values a tensor has."""
    leaf = name.rpartition("layers.")[2].partition(".")[2]
    if not leaf:
        return None
    for other, values in wanted.items():
        # norms of new models are alike in every layer
        same_kind = other != name and other.endswith(f".{leaf}") and _error(wanted[name], values) > _EQUAL
        if same_kind and _error(found[name], values) <= _EQUAL:
            return other
    return None


def _strength(
    updates: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], found: dict[str, torch.Tensor]
) -> tuple[float, float]:
    """The adapter's strength in a file, and the share of the difference that it does not explain."""
    if not updates:
        return 1.0, 1.0
    d = torch.cat(list(updates.values()))
    apart = torch.cat([found[name] - wanted[name] for name in updates])
    strength = 1 + ((apart @ d) / (d @ d).clamp_min(1e-30)).item()
    return strength, ((apart - (strength - 1) * d).norm() / apart.norm().clamp_min(1e-30)).item()
