"""Adapters whose files hold the pairs of each expert by themselves, as other programs and older versions of PEFT write them.

    experts.3.gate_proj.lora_A.weight [r, D]      experts.3.gate_proj.lora_B.weight [I, r]      likewise up_proj, down_proj

PEFT of now keeps the pairs of a stack in two tensors. A pair of gate|up has one A: where those of gate and of up differ, it has
both, and a B with zeros beside each. E experts, r rank, D hidden size, I columns of an expert's gate and up.
"""

import copy
from collections.abc import Mapping

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from oribi.errors import ConfigError, ModelError
from oribi.kernels.expert_linear import factors_by_expert
from oribi.models.experts import STACKS, Experts, StoredMatrix
from oribi.models.wrapper import PEFT_PREFIX

_Pair = tuple[torch.Tensor, torch.Tensor]


def stacked_factors(
    settings: LoraConfig, tensors: Mapping[str, torch.Tensor], experts: Mapping[str, Experts]
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Settings and tensors of an adapter with the pairs of experts in stacks; as they are where they lie so already.

    Args:
        settings: as adapter_config.json has them. tensors: of the file, by the decoder's names.
        experts: of the model, by the names of their modules.

    Raises:
        ModelError: some experts of a layer have a pair and others have none, or pairs of one stack have several ranks.
    """
    left, stacks, problems = dict(tensors), {}, []
    for prefix, module in experts.items():
        for stack in STACKS:
            matrices = [one for one in module.matrices() if one.stack == stack]
            pairs = _taken(left, prefix, matrices, problems)
            if pairs:
                names = [f"{prefix}.{one.name.removesuffix('.weight')}" for one in matrices]
                scales = [_scale(settings, name, len(a)) for name, (a, _) in zip(names, pairs)]
                stacks[prefix, stack] = pairs, scales
    if problems:
        raise ModelError(
            f"the adapter has pairs of some experts of a layer and not of others: it lacks {', '.join(problems[:3])}"
            + f" and {len(problems) - 3} more" * (len(problems) > 3)
        )
    if odd := [name for name in left if _is_of_one_expert(name, experts)]:
        raise ModelError(
            f"the adapter has {len(odd)} tensors that are no factor of a LoRA pair of one of the model's experts, "
            f"{min(odd)} the first"
        )
    if not stacks:
        return settings, left
    ranks = {}
    for (prefix, stack), (pairs, scales) in stacks.items():
        a, b = _combined(f"{prefix}.{stack}", pairs, len(pairs) // len(experts[prefix].down_proj))
        ranks[prefix, stack] = rank = a.shape[1]
        own = _scale_of(settings, settings.lora_alpha, rank)
        rows = torch.tensor(scales).view(len(a), -1).repeat_interleave(b.shape[1] * len(a) // len(scales), 1)
        b = b * (rows / own).to(b.dtype)[..., None]
        # the wrapper around the last stack is the outermost
        inner = ".base_layer" * (stack == STACKS[0] and (prefix, STACKS[1]) in stacks)
        left[f"{PEFT_PREFIX}{prefix}{inner}.lora_A.weight"] = a.flatten(0, 1)
        left[f"{PEFT_PREFIX}{prefix}{inner}.lora_B.weight"] = b.permute(1, 2, 0).flatten(1)
    return _settings(settings, left, experts, ranks), left


def _settings(
    settings: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
    experts: Mapping[str, Experts],
    ranks: Mapping[tuple[str, str], int],
) -> LoraConfig:
    """The settings of an adapter with these tensors, whose stacks have these ranks."""
    moved = copy.deepcopy(settings)
    of_parameters = {}
    for stack in STACKS:
        found = {prefix: rank for (prefix, one), rank in ranks.items() if one == stack}
        alike = len(found) == len(experts) and len(set(found.values())) == 1
        # of all layers, without their numbers
        names = {prefix.split(".", 3)[3] if alike else prefix: rank for prefix, rank in found.items()}
        of_parameters |= {f"{prefix}.{stack}": rank for prefix, rank in names.items()}
    names = {name.partition(".lora_")[0].removeprefix(PEFT_PREFIX) for name in tensors if ".lora_" in name}
    moved.target_modules = {name for name in names if name.removesuffix(".base_layer") not in experts}
    moved.target_parameters = [*of_parameters]
    own = {name: rank for name, rank in of_parameters.items() if rank != settings.r or settings.rank_pattern}
    moved.rank_pattern = {**own, **(settings.rank_pattern or {})}
    if settings.alpha_pattern:  # which could mean the stacks
        moved.alpha_pattern = {**dict.fromkeys(of_parameters, settings.lora_alpha), **settings.alpha_pattern}
    moved.exclude_modules = moved.layers_to_transform = moved.layers_pattern = None
    return moved


def _is_of_one_expert(name: str, experts: Mapping[str, Experts]) -> bool:
    prefix, _, rest = name.removeprefix(PEFT_PREFIX).partition(".experts.")
    return f"{prefix}.experts" in experts and rest.partition(".")[0].isdigit()


def _taken(
    tensors: dict[str, torch.Tensor], prefix: str, matrices: list[StoredMatrix], problems: list[str]
) -> list[_Pair]:
    """The pairs of a stack's matrices, which are taken out of `tensors`; `problems` gets the names of those that lack."""
    names = [
        tuple(f"{PEFT_PREFIX}{prefix}.{one.name.removesuffix('.weight')}.lora_{f}.weight" for f in "AB")
        for one in matrices
    ]
    present = [name for pair in names for name in pair if name in tensors]
    if not present:
        return []
    problems += [name for pair in names for name in pair if name not in tensors]
    if problems:
        return []
    return [(tensors.pop(a), tensors.pop(b)) for a, b in names]


def _scale(settings: LoraConfig, name: str, rank: int) -> float:
    """Scale of a linear layer's pair, as PEFT reads patterns."""
    pattern = settings.alpha_pattern or {}
    return _scale_of(settings, pattern.get(get_pattern_key(pattern, name), settings.lora_alpha), rank)


def _scale_of(settings: LoraConfig, alpha: float, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r)."""
    return alpha / (rank**0.5 if settings.use_rslora else rank)


def _combined(name: str, pairs: list[_Pair], parts: int) -> _Pair:
    """A [E, R, K] and B [E, N, R] of a stack whose experts have `parts` matrices, each with a pair."""
    if len({(tuple(a.shape), tuple(b.shape)) for a, b in pairs}) > 1:
        raise ModelError(
            f"{name}: the pairs of its experts have several ranks or shapes; they have to be one stack"
        )
    a, b = (torch.stack(one).unflatten(0, (-1, parts)) for one in zip(*pairs))  # [E, parts, ...]
    if parts == 1 or (a == a[:, :1]).all():
        return a[:, 0], b.flatten(1, 2)
    blocks = b.new_zeros(*b.shape[:3], parts, b.shape[3])
    for part in range(parts):
        blocks[:, part, :, part] = b[:, part]
    return a.flatten(1, 2), blocks.flatten(3).flatten(1, 2)


def separate_factors(
    settings: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
    experts: Mapping[str, Experts],
    layers: Mapping[str, tuple[int, float]],
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Settings and tensors of an adapter with the pairs of each expert by themselves: what `stacked_factors` reads.

    Args:
        settings, tensors: of the adapter, by the decoder's names. experts: as of `stacked_factors`.
        layers: name of each adapted linear layer -> r and alpha of its pair.

    Raises:
        ConfigError: the experts' pairs cannot be told apart in such a file, and why.
    """
    left, ranks, alone = dict(tensors), set(), {}
    for prefix, module in experts.items():
        for stack, inner in zip(STACKS, (".base_layer", "")):
            names = [f"{PEFT_PREFIX}{prefix}{inner}.lora_{f}.weight" for f in "AB"]
            if not set(names) <= left.keys():
                raise ConfigError(
                    f"save_method = 'lora_per_expert': {prefix}.{stack} has no pair, and programs that read experts by "
                    "themselves want gate, up and down of all; train both stacks, or save 'lora'"
                )
            a, b = factors_by_expert(*(left.pop(name) for name in names), len(module.down_proj), False)
            alone[prefix, stack] = a, b
    for (prefix, stack), (a, b) in alone.items():
        parts = 2 if stack == STACKS[0] else 1
        rank = alone[prefix, STACKS[1]][0].shape[1]
        apart = a.shape[1] == parts * rank > rank  # each part has an A of its own
        ranks.add(rank if apart else a.shape[1])
        for matrix in (one for one in experts[prefix].matrices() if one.stack == stack):
            own = slice(None)
            if apart:
                own = slice(rank, None) if matrix.rows.start else slice(0, rank)
            name = f"{PEFT_PREFIX}{prefix}.{matrix.name.removesuffix('.weight')}"
            factor = 1 / parts if apart else 1.0
            left[f"{name}.lora_A.weight"] = a[matrix.expert, own].clone()
            left[f"{name}.lora_B.weight"] = b[matrix.expert, matrix.rows, own] * factor
    if len(ranks) > 1 or settings.use_rslora:
        raise ConfigError(
            "save_method = 'lora_per_expert': plain PEFT reads pairs of single experts only where all have one rank, and without "
            "use_rslora; save 'lora'"
        )
    moved = copy.deepcopy(settings)
    moved.r, leaves = ranks.pop(), {name.rpartition(".")[2] for name in layers}
    moved.target_modules = leaves | {"gate_proj", "up_proj", "down_proj"}
    moved.rank_pattern = {name: r for name, (r, _) in layers.items() if r != moved.r}
    moved.alpha_pattern = {name: alpha for name, (_, alpha) in layers.items() if alpha != moved.lora_alpha}
    moved.target_parameters = moved.exclude_modules = moved.layers_to_transform = moved.layers_pattern = None
    return moved, left
