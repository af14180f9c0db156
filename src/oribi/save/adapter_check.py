"""An adapter's files, loaded by plain transformers and PEFT with the base's weights, answer or score as the trained model does."""

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from oribi.errors import ExportError, ModelError
from oribi.gguf.source import GGUFSource
from oribi.kernels.ggml_blocks import BlockCodes
from oribi.models.expert_tensors import Stacked, expert_modules, stored_stack
from oribi.models.experts import Experts
from oribi.models.files import Location, weight_files
from oribi.models.plain_peft import quiet_libraries
from oribi.models.quantize import rounded_to_nf4
from oribi.models.unfused import from_checkpoint, packed_weights
from oribi.models.unwrap import base_model, is_classifier, source_of
from oribi.models.wrapper import classes_of
from oribi.save.base import locate_here
from oribi.save.check import Check, NotTested
from oribi.save.reference import Trained, logits_by_document
from oribi.save.trained import Slot, plain_tensor, slots_of
from oribi.save.verify import compare, mean_kl

MOST_ON_CPU = 4 << 30  # bytes of a base's files; a CPU would take minutes for more


def compare_in_plain_peft(model: PeftModel, folder: Path, trained: Trained) -> Check:
    """Probabilities of the written adapter in plain PEFT beside the trained model's.

    Args:
        model: the trained model.
        folder: its adapter "default", written.
        trained: its answers.

    Returns:
        The check of `verify.compare`; its figures tell, too, how far the bare base is from the trained model, which shows
        whether the rows can tell the two apart.

    Raises:
        NotTested, ExportError: as `load_in_plain_peft`.
    """
    adapted = load_in_plain_peft(model, folder, trained.dtype, trained.device)
    check = compare(
        trained,
        logits_by_document(adapted, trained.pack, trained.keep),
        str(trained.dtype).removeprefix("torch."),
    )[0]
    with adapted.disable_adapter():
        bare, _ = trained.split(logits_by_document(adapted, trained.pack, trained.keep))
    check.figures["kl_without_adapter"] = mean_kl(bare.log_softmax(-1), trained.logprobs)
    check.name = "answers in plain PEFT"
    check.says += f"; the bare base's KL is {check.figures['kl_without_adapter']:.2g}"
    return check


def load_in_plain_peft(model: PeftModel, folder: Path, dtype: torch.dtype, device: torch.device) -> PeftModel:
    """The written adapter on transformers' own model from the files of its base.

    Args:
        model: the trained model.
        folder: its adapter "default", written.
        dtype, device: of the model that is returned.

    Raises:
        NotTested: the base is not in reach, too large for the memory that is free, or its class is unknown.
        ExportError: plain PEFT cannot load the files.
    """
    source = source_of(model)
    if source is None or source.config is None:
        raise NotTested("the model was not loaded by oribi, so its base's files are not known")
    if list(model.active_adapters) != ["default"]:
        raise NotTested(
            f"the active adapters are {', '.join(model.active_adapters)}, and PEFT loads another by default"
        )
    if any(isinstance(m, LoraLayer) and m.disable_adapters for m in model.modules()):
        raise NotTested("the adapters are switched off")
    location, files = _files_here(model, source)
    _require_memory(files, device)
    with quiet_libraries():  # a new head of labels is random here, until the adapter's takes its place
        outside = plain_base(model, location, source, dtype, device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PeftModel.from_pretrained(outside, str(folder)).eval()
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ExportError(f"plain PEFT cannot load {folder}: {error}") from error


def _files_here(model: PeftModel, source: Any) -> tuple[Location, list[Path]]:
    name = model.peft_config["default"].base_model_name_or_path
    try:
        location, options = locate_here(model, source.name_or_path)
        return location, weight_files(location, options)
    except (ExportError, ModelError) as error:
        raise NotTested(f"the base {name!r} is not on this machine in files that plain PEFT reads") from error


def _require_memory(files: list[Path], device: torch.device) -> None:
    size = sum(path.stat().st_size for path in files)
    most = MOST_ON_CPU if device.type != "cuda" else int(torch.cuda.mem_get_info(device)[0] * 0.8)
    if size > most:
        raise NotTested(
            f"a second copy of the base takes {size / 1e9:.1f} GB and {most / 1e9:.1f} GB are free for it; names, shapes and "
            "values were compared on a skeleton"
        )


def plain_base(
    model: PeftModel, location: Location, source: Any, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """transformers' own model from the base's files, its weights rounded to NF4 where the trained model's were."""
    kinds = classes_of(source.config, is_classifier(model))
    if not kinds:
        raise NotTested(f"the class {source.config.architectures} comes with the model's own code")
    config, positions = copy.deepcopy(source.config), source.positions(base_model(model).config)
    for name, value in (positions or {}).items():
        setattr(config.get_text_config(), name, value)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager"}
    if location.kind == "gguf":
        outside = kinds[0]._from_config(config, **options)
        # transformers' classes have experts in stacks
        weights = Stacked(GGUFSource(location.file), expert_modules(base_model(model)))
        state = {name: weights.read(name, torch.device("cpu"), dtype) for name in weights.shapes()}
        outside.load_state_dict(state, strict=False)
        outside.tie_weights()
    else:
        automatic = not is_classifier(model) and type(config) in AutoModelForCausalLM._model_mapping
        kind = AutoModelForCausalLM if automatic else kinds[0]
        outside = from_checkpoint(kind, location, config, packed=packed_weights(location, config), **options)
    outside = outside.to(device).eval()
    rows = len(base_model(model).get_input_embeddings().weight)
    if rows != len(outside.get_input_embeddings().weight):
        outside.resize_token_embeddings(rows, mean_resizing=False)
    if source.kind != "bnb-4bit":
        _round_as_trained(model, outside, source.names)
    return outside


@torch.no_grad()
def _round_as_trained(model: PeftModel, outside: nn.Module, names: Any) -> None:
    weights, trained_for = dict(outside.named_parameters()), source_of(model).identity.train_for
    for name, slot in slots_of(model).items():
        if trained_for is not None:  # every weight has the values of a GGUF file
            outer = name if names is None else names.outer(name)
            if (target := weights.get(outer, weights.get(name))) is not None and slot.matrix is None:
                target.copy_(_as_in_transformers(name, slot))
            continue
        state, packed = (getattr(slot.tensor, key, None) for key in ("quant_state", "packed"))
        if state is None and packed is None:
            continue
        outer = name if names is None else names.outer(name)
        weight = weights[outer if outer in weights else name]
        if isinstance(packed, BlockCodes):  # what is read of the file has its values
            continue
        if packed is not None:  # a layer's experts
            weight.copy_(_as_in_transformers(name, slot))
            continue
        weight.copy_(rounded_to_nf4(weight.data, state.nested))


def _as_in_transformers(name: str, slot: Slot) -> torch.Tensor:
    """A tensor's values as transformers' class has them."""
    values = plain_tensor(name, slot.tensor)
    return stored_stack(slot.module, slot.leaf, values) if isinstance(slot.module, Experts) else values
