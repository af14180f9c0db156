"""Names of target modules that mean the experts of a model: stacks of matrices, which get pairs by target_parameters."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from oribi.config import PROJECTIONS
from oribi.errors import ConfigError
from oribi.families import Family, row_of
from oribi.lora.targets import STACK_OF, has_experts, layer_projections, matches, resolve_targets


def why_layers_only(dropout: float, dora: bool, start: bool | str) -> str | None:
    """Why the settings of an adapter leave out parameters that are no layers, as experts' stacks; None if they do not.

    Args:
        dropout, dora, start: lora_dropout, use_dora and init_lora_weights.
    """
    if dropout:
        return f"lora_dropout = {dropout}"
    if dora:
        return "use_dora"
    # PEFT begins pairs of parameters in no other way
    return None if str(start).lower() in ("true", "false", "gaussian") else f"init_lora_weights = {start}"


def stacks_of(names: Iterable[str], family: Family, layers: Iterable[int] | None = None) -> list[str]:
    """The stacks of experts that names of an MLP's projections mean, as target_parameters has them.

    Args:
        names: of target modules; "all-linear" means all. family: with experts. layers: the only ones meant; None for all.
    """
    inside = "" if family.experts.in_layer_itself else f"{family.attribute('mlp')}."
    every = "all-linear" in names
    meant = {stack: f"{inside}experts.{stack}" for stack in ("gate_up_proj", "down_proj")}
    stacks = [
        one for stack, one in meant.items() if every or any(STACK_OF.get(name) == stack for name in names)
    ]
    for name in names:  # which may say of which layer
        prefix, _, leaf = name.rpartition(".")
        if prefix and _means_stack(name):
            stacks.append(f"{prefix}.{STACK_OF[leaf]}")
    if layers is None:
        return list(dict.fromkeys(stacks))
    return [f"layers.{index}.{stack}" for index in layers for stack in dict.fromkeys(stacks)]


def _means_stack(name: str) -> bool:
    """Whether a target is the name of an MLP's projection, alone or behind that of the experts' module."""
    prefix, _, leaf = name.rpartition(".")
    return leaf in STACK_OF and prefix.rpartition(".")[2] in ("", "experts")


def resolve_all(
    model: nn.Module,
    target_modules: Sequence[str] | str | None,
    modules_to_save: Sequence[str] | None,
    notes: list[str],
    tied: bool,
    layers: Sequence[int] | None,
    layers_only: str | None,
    given: dict[str, Any],
) -> tuple[list[str] | str, list[str] | None]:
    """What `resolve_experts` and then `resolve_targets` make of target modules; arguments and errors as theirs."""
    _refuse_whole_experts(model, modules_to_save or ())
    target_modules = resolve_experts(model, target_modules, layers, notes, layers_only, given)
    return resolve_targets(model, target_modules, modules_to_save, notes, tied, layers)


def _refuse_whole_experts(model: nn.Module, saved: Iterable[str]) -> None:
    """Raise over experts, or a router, that are to be trained whole: oribi's decoder reads their own tensors, and no copy of PEFT's.

    Raises:
        ConfigError: modules_to_save names such a module, or one that holds it.
    """
    if not has_experts(model) or not (saved := list(saved)):
        return
    family = row_of(model.config)
    mlp = () if family.experts.in_layer_itself else (family.attribute("mlp"),)
    parts = [".".join((*mlp, one)) for one in (family.attribute("router"), "experts")]
    named = [
        one
        for one in saved
        for part in [*parts, *mlp]
        if f".{one}".endswith(f".{part}") or f".{part}".endswith(f".{one}")
    ]
    if named:
        raise ConfigError(
            f"modules_to_save: {', '.join(dict.fromkeys(named))}: experts and their router are not trained whole. LoRA reaches the "
            "experts by target_parameters, and the router by its name in target_modules"
        )


def resolve_experts(
    model: nn.Module,
    target_modules: Sequence[str] | str | None,
    layers: Sequence[int] | None,
    notes: list[str],
    layers_only: str | None,
    given: dict[str, Any],
) -> Sequence[str] | str | None:
    """Target modules without an MLP's projections in a model with experts, whose stacks these names mean; others as asked for.

    PEFT reads these names as the experts' stacks where transformers' older classes had layers of these names.

    Args:
        model: the base. target_modules: as asked for. layers: the only layers that are meant; None for all.
        notes: takes a line on what is trained. layers_only: as `why_layers_only` says.
        given: further fields of `peft.LoraConfig`; its target_parameters are set where names mean them.

    Raises:
        ConfigError: nothing is left that could be trained.
    """
    if not has_experts(model):
        return target_modules
    word = target_modules.strip() if isinstance(target_modules, str) else None
    if word is not None and word.lower() == "all-linear":
        targets = layer_projections(model, True, True)
    elif word is None or word in STACK_OF:
        targets = list(PROJECTIONS if target_modules is None else [word] if word else target_modules)
    else:
        return target_modules
    left = [target for target in targets if not _means_stack(target)]
    rules = row_of(model.config).experts
    others = [target for target in left if target.rpartition(".")[2] in STACK_OF]
    if others and not rules.shared_by_name:
        raise ConfigError(
            f"target_modules: {', '.join(others)}: PEFT takes every name that ends so for the experts of this family, so MLPs beside "
            "them, and layers without experts, get no pairs; name gate_proj, up_proj, down_proj for the experts, or leave them out"
        )
    if len(left) == len(targets):
        return targets
    beside = {
        leaf
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (leaf := name.rpartition(".")[2]) in STACK_OF
    }
    if rules.shared_by_name:
        left += [target for target in targets if target in beside]
        beside = set()
    parameters = given.get("target_parameters")
    if layers_only and not parameters:
        if not left:
            raise ConfigError(
                f"target_modules: {', '.join(targets)} are stacks of experts in this model, which have no pairs with {layers_only}"
            )
        notes.append(
            f"target_modules: experts{' and MLPs beside them' if beside else ''} stay frozen, because of {layers_only}"
        )
        return left
    if not parameters:
        meant = stacks_of(targets, row_of(model.config), layers)
        names = [name for name, _ in model.named_parameters()]
        # some layers have no experts
        parameters = [one for one in meant if any(matches(name, [one]) for name in names)]
        found = [name for name in names if matches(name, parameters)]
        kept = [name for name in found if not _is_excluded(name, given.get("exclude_modules"))]
        if len(kept) < len(found):
            parameters = kept
        if not parameters:
            return left
        given["target_parameters"] = parameters
    stacks = dict.fromkeys(re.sub(r"^(model\.)?layers\.\d+\.", "", one) for one in parameters)
    notes.append(
        f"LoRA goes on the experts: target_parameters = {', '.join(stacks)}"
        + ("; MLPs beside the experts stay frozen" if beside else "")
    )
    return left


def _is_excluded(stack: str, excluded: Sequence[str] | str | None) -> bool:
    """Whether exclude_modules mean a stack, by its name or its module's; PEFT applies them to modules alone."""
    names = (stack, stack.rpartition(".")[0])
    if isinstance(excluded, str):
        return any(re.fullmatch(excluded, name) for name in names)
    return any(matches(name, excluded or ()) for name in names)
