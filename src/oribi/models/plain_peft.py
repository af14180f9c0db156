"""Whether an adapter's files mean something to a program that knows nothing of oribi: PEFT on transformers' classes.

A skeleton, a model without storage, shows it in a fraction of a second, whatever the model's size.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, TaskType, get_peft_model, set_peft_model_state_dict
from transformers import PretrainedConfig, PreTrainedModel

from oribi.errors import ModelError
from oribi.models.adapter_files import PEFT_REFUSALS
from oribi.models.unwrap import bare_name
from oribi.models.wrapper import WrapperNames, classes_of, skeleton


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No progress bars and warnings of transformers and datasets inside the block."""
    import datasets
    import transformers

    bars = datasets.utils.logging.is_progress_bar_enabled()
    level = transformers.utils.logging.get_verbosity()
    transformers_bars = transformers.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(level)
        if transformers_bars:
            transformers.utils.logging.enable_progress_bar()
        if bars:
            datasets.enable_progress_bars()


def try_in_plain_peft(
    config: PretrainedConfig,
    names: WrapperNames | None,
    settings: PeftConfig,
    stored: dict[str, torch.Tensor],
    where: str,
) -> str | None:
    """Let PEFT load an adapter on the classes that programs build from its base's config.json.

    Each tensor must find a place, and each place a tensor.

    Args:
        config: the base's, of the whole checkpoint.
        names: of the text decoder in these classes, where they differ from oribi's.
        settings: adapter_config.json.
        stored: the file's tensors.
        where: the adapter, in words.

    Returns:
        Why no class could be tried; None where the adapter fits them.

    Raises:
        ModelError: a tensor is missing, belongs to nothing, or has another shape.
    """
    kinds = classes_of(config, settings.task_type == TaskType.SEQ_CLS)
    if not kinds:
        return f"the class {config.architectures} comes with the model's own code, which was not run"
    for kind in kinds:
        missing, unexpected = _load_on_skeleton(kind, config, settings, stored, where)
        if names is not None and names.twice:  # for the other class
            unexpected = [name for name in unexpected if not _both(names, name) <= stored.keys()]
        if missing or unexpected:
            raise ModelError(
                f"{where}: plain PEFT on {kind.__name__} finds no tensor for {len(missing)} places "
                f"({', '.join(missing[:2])}) and no place for {len(unexpected)} tensors ({', '.join(unexpected[:2])})"
            )
    return None


def _both(names: WrapperNames, name: str) -> set[str]:
    return {names.inner(name), names.outer(names.inner(name))}


def _load_on_skeleton(
    kind: type[PreTrainedModel],
    config: PretrainedConfig,
    settings: PeftConfig,
    stored: dict[str, torch.Tensor],
    where: str,
) -> tuple[list[str], list[str]]:
    """Places that get no tensor and tensors that find no place when PEFT loads an adapter on an empty model."""
    outside, settings = skeleton(kind, config), copy.deepcopy(settings)
    tables = ("embed_tokens.weight", "lm_head.weight")
    rows = [len(t) for name, t in stored.items() if bare_name(name).endswith(tables)]
    if rows and rows[0] != len(outside.get_input_embeddings().weight):
        outside.resize_token_embeddings(rows[0], mean_resizing=False)
    if isinstance(settings, LoraConfig):
        settings.init_lora_weights = True  # other ways read the base's values
    settings.inference_mode, settings.base_model_name_or_path = False, None
    empty: dict[str, Any] = {name: tensor.to("meta") for name, tensor in stored.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(outside, settings, low_cpu_mem_usage=True)
            places = {name for name, p in adapted.named_parameters() if p.requires_grad}
            result = set_peft_model_state_dict(adapted, empty, low_cpu_mem_usage=True)
    except PEFT_REFUSALS as error:
        raise ModelError(f"{where}: plain PEFT cannot load it on {kind.__name__}: {error!r}") from error
    return sorted(places & set(result.missing_keys)), list(result.unexpected_keys)
