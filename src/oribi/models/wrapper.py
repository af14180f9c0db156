"""Names of a text decoder inside the multimodal class that its checkpoint's config.json names.

The decoder calls a layer `model.layers.0`; the class that AutoModelForCausalLM and vLLM build from a composite config
(Gemma 3, Mistral 3, LLaVA, ...) calls it `model.language_model.layers.0`. Adapters are written with the class's names.
"""

import copy
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import transformers
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from oribi.errors import ModelError

PEFT_PREFIX = "base_model.model."
_DECODER, _HEAD = "model", "lm_head"  # of a causal language model


@dataclass(frozen=True)
class WrapperNames:
    """Where a class keeps its text decoder.

    Args:
        class_name: of transformers.
        decoder: name of the decoder's module, such as "model.language_model".
        head: name of the output layer.
        modules: names of all modules, once for each class that a program may build from the checkpoint.
        twice: whether AutoModelForCausalLM builds a class that calls the decoder as oribi does, and vLLM this one
            (Qwen 3.5): files hold each tensor under both names then.
    """

    class_name: str
    decoder: str
    head: str
    modules: tuple[tuple[str, ...], ...]
    twice: bool = False

    def outer(self, name: str) -> str:
        """The class's name of a decoder's module or parameter; PEFT's prefix stays in front."""
        return _moved(name, {_DECODER: self.decoder, _HEAD: self.head})

    def inner(self, name: str) -> str:
        """The decoder's name of a class's module or parameter; one of another part is returned as it is."""
        return _moved(name, {self.decoder: _DECODER, self.head: _HEAD})

    def are_in(self, keys: Iterable[str]) -> bool:
        """Whether an adapter's keys are this class's names."""
        return any(key.removeprefix(PEFT_PREFIX).startswith(f"{self.decoder}.") for key in keys)

    def written(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """An adapter's tensors under the names that its file has."""
        outside = {self.outer(name): tensor for name, tensor in tensors.items()}
        # a file has no two names for one tensor in memory
        return {**outside, **{name: t.clone() for name, t in tensors.items()}} if self.twice else outside

    def read(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A file's tensors under the decoder's names.

        Raises:
            ModelError: a tensor has two names and two values.
        """
        inside: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            other = inside.setdefault(self.inner(name), tensor)
            if not torch.equal(other, tensor):
                raise ModelError(
                    f"{name} and {self.inner(name)} are one tensor of the decoder and have two values"
                )
        return inside

    def settings_outside(self, settings: LoraConfig, adapted: Collection[str]) -> LoraConfig:
        """An adapter's settings for a program that builds the whole class.

        Args:
            settings: for the decoder alone.
            adapted: the decoder's modules, and parameters, that have a LoRA pair; the parameters are in no target_modules.
        """
        moved = _resolved(settings, adapted, _within_decoder, self.outer)
        moved.target_modules = self._shortest({name for name in adapted if not _is_parameter(settings, name)})
        return moved

    def settings_inside(self, settings: LoraConfig, modules: Iterable[str]) -> LoraConfig:
        """An adapter's settings for the decoder alone, from those for the whole class.

        Args:
            settings: as adapter_config.json has them.
            modules: the decoder's modules, and parameters, that could have a LoRA pair.
        """
        outer = {self.outer(name): name for name in modules}
        parameters = {name for name in outer if _is_parameter(settings, name)}
        layers = {name: own for name, own in outer.items() if check_target_module_exists(settings, name)}
        moved = _resolved(
            settings, {*layers, *parameters}, lambda name: _within_decoder(self.inner(name)), self.inner
        )
        moved.target_modules = {own for name, own in layers.items() if name not in parameters}
        return moved

    def _shortest(self, adapted: Collection[str]) -> set[str]:
        """The shortest names that mean these modules, and no module of a vision tower, in every class."""
        outer = {self.outer(name) for name in adapted}
        candidates = (
            {name.rpartition(".")[2] for name in outer},
            {_within_decoder(name) for name in adapted},
        )
        for names in candidates:
            if all(_matched(modules, names) <= {*adapted, *outer} for modules in self.modules):
                return names
        return outer | set(adapted) if self.twice else outer


def _is_parameter(settings: LoraConfig, name: str) -> bool:
    """Whether target_parameters name it."""
    return any(f".{name}".endswith(f".{one}") for one in settings.target_parameters or ())


def _moved(name: str, prefixes: dict[str, str]) -> str:
    start, bare = (
        (PEFT_PREFIX, name.removeprefix(PEFT_PREFIX)) if name.startswith(PEFT_PREFIX) else ("", name)
    )
    for old, new in prefixes.items():
        if bare == old or bare.startswith(f"{old}."):
            return f"{start}{new}{bare.removeprefix(old)}"
    return name


def _within_decoder(name: str) -> str:
    return name.removeprefix(f"{_DECODER}.")


def _matched(modules: Iterable[str], names: set[str]) -> set[str]:
    """Modules that PEFT takes for `names`: a whole name or its end, the last part being that of the names."""
    leaves = {name.rpartition(".")[2] for name in names}
    candidates = (module for module in modules if module.rpartition(".")[2] in leaves)
    return {m for m in candidates if m in names or any(m.endswith(f".{name}") for name in names)}


def _resolved(
    settings: LoraConfig,
    adapted: Collection[str],
    short: Callable[[str], str],
    whole: Callable[[str], str],
) -> LoraConfig:
    """A copy in other names, its choice of layers, ranks and alphas written out for the adapted modules.

    Args:
        adapted: the modules, by the names that `settings` is meant for.
        short: what the copy's patterns call a module.
        whole: what the copy calls a module that is trained whole.
    """
    moved = copy.deepcopy(settings)
    for field, default in (("rank_pattern", settings.r), ("alpha_pattern", settings.lora_alpha)):
        pattern = getattr(settings, field) or {}
        values = {name: pattern.get(get_pattern_key(pattern, name), default) for name in adapted}
        setattr(moved, field, {short(name): value for name, value in values.items() if value != default})
    if moved.target_parameters:  # the end of a name is enough
        moved.target_parameters = [short(name) for name in moved.target_parameters]
    moved.exclude_modules = moved.layers_to_transform = moved.layers_pattern = None
    if moved.modules_to_save:
        moved.modules_to_save = [whole(name) for name in moved.modules_to_save]
    if isinstance(moved.trainable_token_indices, dict):
        moved.trainable_token_indices = {whole(k): ids for k, ids in moved.trainable_token_indices.items()}
    return moved


def class_named(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The transformers class that a config.json names, or that transformers takes for its model_type."""
    for name in config.architectures or ():
        if isinstance(found := getattr(transformers, name, None), type):
            return found
    return _auto_class(config)


def automatic(config: PretrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """The automatic class of transformers that builds a config's model; the causal one where the model's own code does."""
    causal = type(config) in AutoModelForCausalLM._model_mapping
    images = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if images and not causal else AutoModelForCausalLM


def _auto_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    mapping = automatic(config)._model_mapping
    return mapping.get(type(config), None)


def classifier_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The sequence classifier that transformers builds from a config.json.

    Raises:
        ModelError: it has none.
    """
    mapping = AutoModelForSequenceClassification._model_mapping
    if type(config) not in mapping:
        raise ModelError(
            f"num_labels: transformers has no sequence classifier for {config.model_type}, so no program could load one that "
            "is trained here; take a model of another family"
        )
    return mapping[type(config)]


def classes_of(config: PretrainedConfig, classifies: bool = False) -> list[type[PreTrainedModel]]:
    """The transformers classes that programs build from a config.json: the one it names and the automatic one.

    Args:
        config: of the whole checkpoint.
        classifies: whether it is loaded as a sequence classifier, of which there is one class.
    """
    if classifies:
        return [classifier_class(config)]
    return list(
        dict.fromkeys(kind for kind in (class_named(config), _auto_class(config)) if kind is not None)
    )


def skeleton(kind: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """A model of a class without storage.

    Raises:
        ModelError: transformers cannot build it here.
    """
    config = copy.deepcopy(config)
    if getattr(kind, "config_class", None) is type(config.get_text_config()):
        config = config.get_text_config()
    config.__dict__.pop("quantization_config", None)
    try:
        with torch.device("meta"):
            return kind._from_config(config, attn_implementation="eager")
    except (ImportError, ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        raise ModelError(f"transformers cannot build {kind.__name__}: {error}") from error


def wrapper_names(config: PretrainedConfig, classifies: bool = False) -> WrapperNames | None:
    """Where the class that a composite config names keeps its text decoder; None where that cannot be told.

    Args:
        config: of the whole checkpoint, with a text_config.
        classifies: as of `classes_of`; the module of scores has one name in all classes.
    """
    kinds = classes_of(config, classifies)
    if not kinds:
        return None
    outside = skeleton(kinds[0], config)
    names = {id(module): name for name, module in outside.named_modules()}
    decoder = names.get(id(outside.get_decoder()))
    head = _HEAD if classifies else names.get(id(outside.get_output_embeddings()))
    if not decoder or not head:
        return None
    others = [tuple(name for name, _ in skeleton(kind, config).named_modules()) for kind in kinds[1:]]
    twice = any(decoder not in modules for modules in others)
    return WrapperNames(kinds[0].__name__, decoder, head, (tuple(names.values()), *others), twice)


def renaming(names: WrapperNames | None) -> Callable[[str], str | None]:
    """What gives a checkpoint's tensor the decoder's name, and None to one of another part.

    Args:
        names: of the multimodal class that the checkpoint is of; None for a text model.
    """
    return _rename if names is None else partial(_rename_inside, names)


def _rename(name: str) -> str | None:
    """The decoder's name for a checkpoint's tensor: text decoders inside a larger model, and decoders without a head."""
    if name.startswith(_NOT_TEXT) or name.endswith(".rotary_emb.inv_freq"):
        return None
    for prefix, replacement in (("model.language_model.", "model."), ("language_model.", "")):
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return (
        f"model.{name}" if name.startswith(("embed_tokens.", "layers.", "norm.", "embedding_norm.")) else name
    )


def _rename_inside(names: WrapperNames, name: str) -> str | None:
    """`_rename` of a tensor of a multimodal class; None for one that is not the text decoder's."""
    inner = names.inner(name)
    moved = _rename(name) if inner == name else inner
    is_text = (
        inner != name
        or moved != name
        or name.startswith(
            (
                "lm_head.",
                "score.",
                "model.embed_tokens.",
                "model.layers.",
                "model.norm.",
                "model.embedding_norm.",
            )
        )
    )
    return moved if is_text and moved is not None and not moved.endswith(".rotary_emb.inv_freq") else None


_NOT_TEXT = tuple(
    f"{outer}{inner}."
    for outer in ("", "model.")
    for inner in (
        "vision_tower", "vision_model", "visual", "vision_adapter", "vision_projection", "vision_embedder",
        "multi_modal_projector", "audio_tower", "embed_vision", "embed_audio", "mtp",
    )
)  # fmt: skip
