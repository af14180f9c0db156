"""An adapter's files on a model: read by the names that the model's modules have, whole or not at all."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.utils import ModulesToSaveWrapper

from oribi.errors import ModelError
from oribi.models.adapter_config import check_against_base, read_adapter_config
from oribi.models.adapter_files import (
    PEFT_REFUSALS,
    RECORD_FILE,
    AdapterRecord,
    adapter_tensors,
    base_tables,
    read_tensors,
    require_exact_tensors,
    shapes_of,
)
from oribi.models.expert_factors import stacked_factors
from oribi.models.expert_names import expert_modules
from oribi.models.files import HubOptions, Location, adapter_weights, locate
from oribi.models.identity import BaseIdentity
from oribi.models.unwrap import bare_module, bare_name, base_model, source_of


def compare_with_record(location: Location, record: AdapterRecord, base: BaseIdentity) -> list[str]:
    """Notes on how a loaded base differs from the one that an adapter was trained on.

    Raises:
        ModelError: its weights are others.
    """
    way_out = f"To use it on this base all the same, delete {location.directory / RECORD_FILE}"
    if record.changed:
        raise ModelError(
            f"{location.name} was trained on weights that were changed in memory after {record.base.name!r} was loaded "
            f"({len(record.changed)} tensors, {record.changed[0]} the first), and no file holds them: on the base as it "
            f"is, it computes something else. Train and export in one process (save_pretrained_merged). {way_out}"
        )
    changed = record.base.changed_files(base)
    if any(not line.startswith("config.json:") for line in changed):
        raise ModelError(
            f"{location.name} was trained on other weights than {base.name!r} has now; trained on, not found: "
            + "; ".join(record.base.differences(base))
            + f". Put the base back that it was trained on ({record.base.name!r}). {way_out}"
        )
    notes = [f"the base's {line}: it was edited since the adapter was trained" for line in changed]
    before, now = record.base.rounding, base.rounding
    if before != now:
        notes.append(
            f"{location.name} was trained on {before or record.base.weights} weights and is loaded on {now or base.weights} ones, "
            "as asked. This has cost 12 of 85 points (SmolLM2-135M); without load_in_4bit and train_for it gets what it was "
            "trained on"
        )
    return notes


def train_in_float32(model: PeftModel) -> None:
    """Makes every trained weight float32: in 16 bit, small updates are rounded away."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save.float()
        elif isinstance(module, TrainableTokensLayer):
            module.trainable_tokens_delta.float()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


@contextmanager
def without_word_on_ties() -> Iterator[None]:
    """Inside the block PEFT warns neither of adapters on one of two tied matrices, which every export here keeps apart, nor of
    patterns for experts."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        # PEFT compares patterns with modules alone, and follows those that name parameters all the same
        warnings.filterwarnings("ignore", message=r".* keys did not match any targeted module.*\.experts\.")
        yield


def read_for(model: Any, settings: PeftConfig, path: Path) -> tuple[PeftConfig, dict[str, torch.Tensor]]:
    """Settings and tensors of an adapter as this model calls its modules.

    Args:
        model: the base, or PEFT's model of it.
        settings: as adapter_config.json has them.
        path: the adapter's weights.

    Raises:
        ModelError: the file is damaged, or holds values that are not finite.
    """
    names = getattr(source_of(model), "names", None)
    tensors, inner = read_tensors(path), base_model(model)
    if not isinstance(settings, LoraConfig):
        return settings, tensors
    if names is not None and names.are_in(tensors):
        plain = [
            bare_name(name)
            for name, module in inner.named_modules()
            if isinstance(module, (torch.nn.Linear, torch.nn.Embedding))
        ]
        plain += [bare_name(name) for name, one in inner.named_parameters() if one.dim() == 3]  # of experts
        settings, tensors = names.settings_inside(settings, plain), names.read(tensors)
    return stacked_factors(settings, tensors, expert_modules(inner))


def load_into(model: PeftModel, path: Path, adapter: str) -> None:
    """Give an adapter of a model, attached already, the tensors of a file.

    Args:
        model: has the adapter.
        path: the file of tensors, its adapter_config.json beside it.
        adapter: the adapter's name in the model.

    Raises:
        ModelError: the file does not hold exactly this adapter's tensors.
    """
    _, tensors = read_for(model, model.peft_config[adapter], path)
    require_adapter_fits(model, path, tensors, adapter)
    set_peft_model_state_dict(model, tensors, adapter_name=adapter)


def require_adapter_fits(
    model: PeftModel, path: Path, tensors: Mapping[str, torch.Tensor], adapter: str
) -> None:
    """`require_exact_tensors` of a file's tensors and an adapter that is attached to a model."""
    expected, optional = (shapes_of(adapter_tensors(model, adapter, tables=t)) for t in (False, True))
    require_exact_tensors(path, shapes_of(tensors), expected, optional | shapes_of(base_tables(model)))


def attach_from(
    model: Any, location: Location, path: Path, adapter: str = "default", is_trainable: bool = False
) -> PeftModel:
    """A model with an adapter read from a folder.

    Args:
        model: the base, or PEFT's model, which gets one adapter more.
        location: of kind "adapter".
        path: the adapter's weights.
        adapter: what it is called in the model.
        is_trainable: whether it can be trained.

    Raises:
        ModelError: settings or tensors do not fit the model.
    """
    names = [name for name, _ in model.named_modules()]
    check_against_base(location, names, len(bare_module(model.get_input_embeddings()).weight))
    settings, tensors = read_for(model, read_adapter_config(location), path)
    settings.inference_mode = not is_trainable
    base = settings.base_model_name_or_path
    try:
        with without_word_on_ties():
            if isinstance(model, PeftModel):
                model.add_adapter(adapter, settings)
            else:
                settings.base_model_name_or_path = (
                    None  # PEFT would warn that it is called by another name here
                )
                model = get_peft_model(model, settings, adapter)
                settings.base_model_name_or_path = base
        train_in_float32(model)  # before the file's values come, which are float32
        require_adapter_fits(model, path, tensors, adapter)
        set_peft_model_state_dict(model, tensors, adapter_name=adapter)
    except ModelError:
        raise
    except PEFT_REFUSALS as error:
        raise ModelError(
            f"{location.directory}: PEFT cannot put this adapter on the model: {error!r}. Its adapter_config.json is "
            "damaged, or belongs to another base"
        ) from error
    return model


def load_adapter(
    model: PeftModel, model_id: Any, adapter_name: str, is_trainable: bool = False, **options: Any
) -> None:
    """PEFT's `load_adapter`, which loads a whole adapter or nothing.

    Args:
        model: PEFT's model.
        model_id: folder of the adapter, or its name on the hub.
        adapter_name: one that the model has gets the file's tensors; another is added.
        is_trainable: whether an added adapter can be trained.
        options: of `files.HubOptions`; PEFT's others are not needed.

    Raises:
        ModelError: the files are not the adapter.
    """
    known = {name: options[name] for name in HubOptions.__dataclass_fields__ if options.get(name) is not None}
    location = locate(str(model_id), HubOptions(**known))
    if location.kind != "adapter":
        raise ModelError(f"{model_id} has no adapter_config.json, so it is not an adapter")
    path = adapter_weights(location, HubOptions(**known), allow_pickle=True)
    if adapter_name in model.peft_config:
        load_into(model, path, adapter_name)
        return
    attach_from(model, location, path, adapter_name, is_trainable)
    if not is_trainable:
        model.eval()  # as PEFT does
