"""Which modules of a model LoRA goes on: names, expressions and layers, checked against what the model has."""

import re
from collections.abc import Iterable, Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from oribi.config import PROJECTIONS
from oribi.errors import ConfigError
from oribi.families import Family, row_of
from oribi.models.experts import SHARED_GATE, Experts
from oribi.models.mixers import MIXERS
from oribi.models.mixers.gated_delta import DECAY_PROJECTIONS
from oribi.models.unwrap import bare_module, read_by_kernels
from oribi.text import nearest

# what models outside the family table with fused projections call them
_FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}


def is_tied(model: PreTrainedModel) -> bool:
    """Whether embeddings and head are one matrix."""
    # the configs of a multimodal model and of its text decoder may say different things
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or table is None:
        return False
    return getattr(bare_module(head), "weight", head) is getattr(bare_module(table), "weight", table)


# parts of a module's name by which transformers' classes keep apart attention and MLP; whatever else mixes tokens is attention
_MLP_PARTS = re.compile(r"mlp|per_layer|feed_forward|ffn|moe|expert|fc\d|dense_h|dense_4h|w[123]$")
# an MLP's projections, and the stack of matrices that holds those of experts
STACK_OF = {
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj"), "gate_up_proj"),
    "down_proj": "down_proj",
}
# choose experts, and are not trained as projections are
_ROUTERS = ("gate", "router", SHARED_GATE)


def layer_projections(model: PreTrainedModel, attention: bool, mlp: bool) -> list[str]:
    """Names of the linear layers in a text decoder, whatever its family calls them.

    Args:
        model: the base.
        attention, mlp: which: those that mix tokens, and those that do not.
    """
    inside = set(_of_text(model, [name for name, _ in model.named_modules()]))
    head, without = model.get_output_embeddings(), {*_ROUTERS, *DECAY_PROJECTIONS}
    without |= {name.rpartition(".")[2] for name in read_by_kernels(model)}
    found: dict[str, bool] = {}
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if _layer_of(name) is None:
            continue
        if (
            isinstance(module, (nn.Linear, Conv1D))
            and module is not head
            and name in inside
            and leaf not in without
        ):
            found[leaf] = _MLP_PARTS.search(name) is not None
    if has_experts(model):
        found |= dict.fromkeys(STACK_OF.values(), True)
    return [leaf for leaf, is_mlp in found.items() if (mlp if is_mlp else attention)]


def has_head(targets: Iterable[str] | str) -> bool:
    """Whether targets name the head."""
    if isinstance(targets, str):
        return targets != "all-linear" and re.fullmatch(targets, "lm_head") is not None
    return any(matches("lm_head", [target]) for target in targets)


def resolve_targets(
    model: nn.Module,
    target_modules: Sequence[str] | str | None,
    modules_to_save: Sequence[str] | None,
    notes: list[str],
    tied: bool,
    layers: Sequence[int] | None = None,
) -> tuple[list[str] | str, list[str] | None]:
    """Target and whole-trained module names that this model has, those of its text decoder.

    Args:
        model: the base. target_modules, modules_to_save: as asked for. notes: takes a line on each name that is read as another.
        tied: whether embeddings and head are trained as one matrix. layers: the only layers that are meant; None for all.
    """
    saved, every = list(modules_to_save or ()), [name for name, _ in model.named_modules()]
    names = _of_text(model, every)
    if isinstance(target_modules, str):
        target_modules = target_modules.strip()
        leaves = {name.rpartition(".")[2] for name in names}
        linear = target_modules.lower() == "all-linear"
        if linear and (layers is not None or _has_more_linear_layers(model, leaves)):
            target_modules = layer_projections(model, True, True)  # PEFT takes no word together with layers
        elif linear and len(names) < len(every):
            target_modules = list(PROJECTIONS)
        elif linear:
            _present("modules_to_save", saved, names)
            return "all-linear", saved or None
        elif target_modules not in leaves:
            _check_expression(target_modules, names)
            _present("modules_to_save", saved, names)
            return target_modules, saved or None
        else:
            target_modules = [target_modules]
    targets = list(dict.fromkeys(target_modules if target_modules is not None else PROJECTIONS))
    if "embed_tokens" in targets:
        targets.remove("embed_tokens")
        saved.append("embed_tokens")
        notes.append("embed_tokens is trained whole (modules_to_save), not through LoRA")
    targets = _without_read_by_kernels(model, targets, notes)
    leaves = {name.rpartition(".")[2] for name in names}
    row = row_of(model.config)
    held = _FUSED if row is None else row.projections()
    if row is not None and row.mixers and set(targets) == set(PROJECTIONS):
        targets += _of_mixers(row, leaves, notes)
    if set(targets) == set(PROJECTIONS) and not leaves & {*PROJECTIONS, *held.values()}:
        notes.append(
            f"target_modules: the model has none of {', '.join(PROJECTIONS)}; LoRA goes on all its linear layers"
        )
        _present("modules_to_save", saved, names)
        every_layer = layer_projections(model, True, True) if read_by_kernels(model) else "all-linear"
        return every_layer, saved or None
    if row is not None and row.mixers and set(targets) == set(PROJECTIONS):
        # the usual names are those of attention alone; other mixers have linear layers of their own
        every_layer = layer_projections(model, True, True)
        notes.append(
            f"target_modules: LoRA goes on all linear layers of this family: {', '.join(every_layer)}"
        )
        targets = every_layer
    fused = {t: held[t] for t in targets if t not in leaves and held.get(t) in leaves}
    if fused:
        targets = list(dict.fromkeys(fused.get(t, t) for t in targets))
        asked = ", ".join(fused)
        notes.append(
            f"this family keeps {asked} in {', '.join(dict.fromkeys(fused.values()))}: LoRA goes there"
        )
    _present("modules_to_save", saved, names)
    found, absent = _present("target_modules", targets, names, some=True)
    if absent:
        notes.append(
            f"target_modules: the model has no {', '.join(absent)}; LoRA is attached to {', '.join(found)}"
        )
    if len(names) < len(every):
        asked, found = found, _within_text(found, names, every)
        if layers is not None and found != asked:  # PEFT takes a whole name in whichever layer it is
            found = [name for name in found if _layer_of(name) in layers or has_head([name])]
    if tied and "embed_tokens" in saved and "lm_head" in found:
        found.remove("lm_head")
    return found, list(dict.fromkeys(saved)) or None


def has_experts(model: nn.Module) -> bool:
    """Whether layers of oribi's decoder have experts."""
    return any(isinstance(module, Experts) for module in model.modules())


def _without_read_by_kernels(model: nn.Module, targets: list[str], notes: list[str]) -> list[str]:
    """Targets without the layers whose weight kernels take as it lies, unless nothing else is named."""
    left = [target for target in targets if target != "out_proj"]
    if not left or len(left) == len(targets) or not read_by_kernels(model):
        return targets
    notes.append("out_proj stays as it is: kernels that mix tokens in this model read its weight past LoRA")
    return left


def _has_more_linear_layers(model: nn.Module, leaves: set[str]) -> bool:
    """Whether oribi's decoder has linear layers that get an adapter by name only, or none."""
    return bool(
        getattr(getattr(model, "model", None), "per_layer_size", 0)
        or leaves & {*DECAY_PROJECTIONS}
        or read_by_kernels(model)
    )


def _of_mixers(row: Family, leaves: set[str], notes: list[str]) -> list[str]:
    """Projections of a family's mixers other than attention."""
    named = [name for mixer in row.mixers.values() for name in MIXERS[mixer].projections]
    further = [name for name in dict.fromkeys(named) if name in leaves and name not in PROJECTIONS]
    if further:
        notes.append(f"this family mixes tokens in {', '.join(further)} too: LoRA goes there as well")
    return further


def _of_text(model: nn.Module, names: list[str]) -> list[str]:
    """The modules that a text model has; of a multimodal one, those of its text decoder and the head."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    parts = {id(decoder), id(model.get_output_embeddings())}
    prefixes = [name for name, module in model.named_modules() if id(module) in parts]
    if getattr(model.config, "text_config", None) is None or len(prefixes) != 2:
        return names
    return [name for name in names if name.startswith(tuple(f"{p}." for p in prefixes)) or name in prefixes]


def _within_text(targets: list[str], names: list[str], every: list[str]) -> list[str]:
    """Targets that mean modules of the text decoder only: full names where a tower has modules of the same name."""
    wanted = [name for name in names if matches(name, targets)]
    return targets if sum(matches(name, targets) for name in every) == len(wanted) else wanted


def _layer_of(name: str) -> int | None:
    number = re.search(r"\.(\d+)\.", name)
    return None if number is None else int(number[1])


def matches(name: str, targets: Iterable[str]) -> bool:
    # the way PEFT matches: a whole name or its end
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _present(
    what: str, wanted: list[str], names: list[str], some: bool = False
) -> tuple[list[str], list[str]]:
    """Those of the wanted names that the model has, and those that it has not.

    Raises:
        ConfigError: one is absent, or, with `some`, all are.
    """
    found = [name for name in wanted if any(matches(have, [name]) for have in names)]
    absent = [name for name in wanted if name not in found]
    if absent and not (some and found):
        leaves = sorted({name.rpartition(".")[2] for name in names} - {""})
        near = [match for name in absent if (match := nearest(name, leaves))]
        hint = f"; did you mean {', '.join(dict.fromkeys(near))}?" if near else "."
        linear = ", ".join(leaf for leaf in leaves if leaf.endswith(("_proj", "_head", "_tokens")))
        raise ConfigError(
            f"{what}: the model has no module {', '.join(map(repr, absent))}{hint} It has {linear}"
        )
    return found, absent


def _check_expression(expression: str, names: list[str]) -> None:
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise ConfigError(f"target_modules = {expression!r} is not a regular expression: {error}") from error
    if not any(pattern.fullmatch(name) for name in names):
        raise ConfigError(
            f"target_modules = {expression!r} matches no module as a regular expression over full names such as {names[-2]!r}"
        )


def resolve_layers(
    model: PreTrainedModel, layers: Sequence[int] | int | None, last: int | None
) -> list[int] | None:
    count = model.config.get_text_config().num_hidden_layers
    if last is not None:
        if layers is not None:
            raise ConfigError("give layers_to_transform or finetune_last_n_layers, not both")
        if not 1 <= last <= count:
            raise ConfigError(f"finetune_last_n_layers = {last}: must be 1 to {count}, the model's layers")
        return list(range(count - last, count))
    if layers is None:
        return None
    chosen = [layers] if isinstance(layers, int) else list(layers)
    outside = [i for i in chosen if not 0 <= i < count]
    if outside:
        raise ConfigError(f"layers_to_transform: {outside} are not among the model's layers 0 to {count - 1}")
    return chosen
