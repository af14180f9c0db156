"""STEP 2: a model and its tokenizer from a directory, a hub name, a GGUF file or a LoRA adapter, in NF4 or 16 bit."""

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel, TaskType
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from oribi.errors import ConfigError, ModelError
from oribi.formats.packed import note_on_packed
from oribi.models.adapter_files import RECORD_FILE, read_tensors
from oribi.models.classifier import WithScore, build_classifier
from oribi.models.config_file import refuse_other_sizes
from oribi.models.decoder import build
from oribi.models.files import HubOptions, adapter_weights, open_weights, weight_files, written_name
from oribi.models.identity import AS_IN_FILE, BaseIdentity, WeightSums, identify, weight_sums
from oribi.models.labels import HEADS, Labels, read_labels, stored_labels
from oribi.models.load_adapter import attach_from, compare_with_record, train_in_float32
from oribi.models.load_settings import (
    HUB_OPTIONS,
    LABEL_OPTIONS,
    LoadSettings,
    choose_device,
    choose_dtype,
    choose_quantization,
)
from oribi.models.load_together import LoadTogether
from oribi.models.open import OpenedAdapter, OpenedModel, open_model
from oribi.models.pretrained import DecoderPreTrainedModel
from oribi.models.quantization import Quantization, require_codable
from oribi.models.quantize import fill
from oribi.models.rope import extend_context, override_rope, trained_positions
from oribi.models.unfused import load_unfused
from oribi.models.unwrap import bare_name
from oribi.models.wrapper import WrapperNames, renaming, wrapper_names


@dataclass
class ModelSource:
    """Where a loaded model comes from and what the loader decided; `model.oribi`.

    Args:
        name_or_path: as given to the loader.
        kind: how the weights were stored.
        max_seq_length: longest training example in tokens.
        load_in_4bit: whether linear layers are quantised: in NF4, or in the codes of a GGUF file.
        kept_in_16bit: names of linear layers that are not nevertheless.
        full_finetuning: whether every weight is trained.
        fused: whether oribi's decoder runs it, not transformers' own class.
        checkpointing: what was asked of gradient checkpointing (`lora.attach.set_checkpointing`).
        new_token_ids: rows of the embeddings that `add_new_tokens` made.
        identity: the base's files and how they lie in memory.
        revision: the revision of the base that was asked for.
        hub: how the hub was asked for it.
        labels: of a sequence classifier; None for a language model.
        new_modules: those of a classifier's head that its checkpoint does not hold; they are trained whole.
        names: the decoder's in the multimodal class that its checkpoint's config.json names; None where they are the same.
        chat_template: what the adapter's record says that it was trained with, or the trainer's.
        config: config.json as it was read, of the whole checkpoint.
        sums: of each weight as loaded, by its name in the checkpoint; they tell which were changed since.
        changed_before_lora: those that were changed when an adapter was attached; None if oribi did not attach it.
        merges_codes: whether its adapter was trained for one merged GGUF file.
        tried: adapters' files that plain PEFT was seen to load.
        notes: what was repaired or decided, one line each.
    """

    name_or_path: str
    kind: Literal["safetensors", "pickle", "gguf", "bnb-4bit"]
    max_seq_length: int
    load_in_4bit: bool
    kept_in_16bit: tuple[str, ...] = ()
    full_finetuning: bool = False
    fused: bool = True
    checkpointing: str = "off"
    new_token_ids: tuple[int, ...] = ()
    identity: BaseIdentity | None = None
    revision: str | None = None
    hub: HubOptions = HubOptions()
    labels: Labels | None = None
    new_modules: tuple[str, ...] = ()
    names: WrapperNames | None = None
    chat_template: Any = None
    config: PretrainedConfig | None = None
    sums: dict[str, WeightSums] = field(default_factory=dict)
    changed_before_lora: tuple[str, ...] | None = None
    merges_codes: bool = False
    tried: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def positions(self, config: PretrainedConfig) -> dict[str, Any] | None:
        """RoPE's settings in a model's config; None where they are the checkpoint's."""
        fields = ("rope_parameters", "max_position_embeddings")
        now = {name: getattr(config.get_text_config(), name, None) for name in fields}
        loaded = now if self.config is None else vars(self.config.get_text_config())
        return None if all(loaded.get(name) == now[name] for name in fields) else now

    def sum_weights(self, base: nn.Module) -> None:
        """Takes the base's weights as they are now for what was loaded."""
        self.sums = _sums(base)

    def changed_weights(self, base: nn.Module) -> list[str]:
        """Frozen weights that have other values than when the base was loaded; rows that were added do not count.

        Of a base that is sharded over several processes nothing can be told, and nothing is.
        """
        if getattr(getattr(base, "model", None), "shards", None) is not None:
            return []
        weights = {bare_name(name): p for name, p in base.named_parameters() if not p.requires_grad}
        return [
            name
            for name, before in self.sums.items()
            if name in weights and before.changed_rows(weights[name])
        ]


def _sums(base: nn.Module) -> dict[str, WeightSums]:
    found = {bare_name(name): weight_sums(parameter) for name, parameter in base.named_parameters()}
    return {name: value for name, value in found.items() if value is not None}


def load_model(
    model_name: str,
    *,
    max_seq_length: int | None = 2048,
    dtype: torch.dtype | str | None = None,
    load_in_4bit: bool | None = None,
    load_in_8bit: bool = False,
    load_in_16bit: bool = False,
    full_finetuning: bool = False,
    token: str | bool | None = None,
    device_map: str | int | torch.device | dict[str, Any] | None = None,
    rope_scaling: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    together: LoadTogether | None = None,
    **options: Any,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Loads a model to fine-tune and its tokenizer.

    Args:
        model_name: directory, .gguf file, directory or hub name of a LoRA adapter (its base is loaded and the adapter
            attached, trainable), training run, or hub name.
        max_seq_length: longest example in tokens; beyond the model's positions RoPE is stretched. None: the model's.
        dtype: compute dtype, or its name; None takes the machine's (`environment.detect`), "auto" the checkpoint's.
        load_in_4bit: frozen linear layers in NF4, or of a GGUF file in its own codes; False, or load_in_16bit, in the compute
            dtype. None: True, and an adapter's base as it was trained on.
        load_in_8bit: refused.
        full_finetuning: every weight is trained, none quantised.
        token, revision: for the hub; an adapter's base has the revision that its settings name.
        device_map: the one device to load to; "auto" and the like mean the machine's.
        rope_scaling: replaces the config's scaling.
        trust_remote_code: whether code that comes with the model may run.
        together: the processes that all load this model at this moment, one of which reads each large tensor.
        options: `load_settings.RARE_OPTIONS`.

    Returns:
        model with `model.oribi` (`ModelSource`), and a tokenizer that pads on the left.

    Raises:
        ConfigError: arguments contradict each other.
        ModelError: the model cannot be loaded; the message says why.

    With `num_labels`, or the labels' names in `id2label` or `label2id`, a sequence classifier is loaded; so is a checkpoint
    that is one.
    """
    if load_in_8bit:
        raise ConfigError(
            "load_in_8bit=True is not supported: NF4 (load_in_4bit=True) takes half the memory, and 16 bit "
            "(load_in_4bit=False) is exact"
        )
    asked = {name: options.pop(name, None) for name in HUB_OPTIONS}
    hub = HubOptions(token, revision, **{name: value for name, value in asked.items() if value},
                     trust_remote_code=trust_remote_code)  # fmt: skip
    gguf_file = options.pop("gguf_file", None)
    labels = read_labels(*(options.pop(name, None) for name in LABEL_OPTIONS))
    settings = LoadSettings(
        max_seq_length, dtype, choose_device(device_map), False if load_in_16bit else load_in_4bit, full_finetuning,
        rope_scaling, labels=labels, together=together, **options,
    )  # fmt: skip
    with nullcontext() if together is None else together.until_loaded():
        opened = open_model(str(model_name), hub, gguf_file)
        if opened.adapter is None:
            return _load_base(opened, settings)
        return _load_with_adapter(opened, settings, hub)


def _load_with_adapter(
    opened: OpenedModel, settings: LoadSettings, hub: HubOptions
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Args: `hub` is how the adapter was asked for, `opened.hub` how its base is."""
    location, record = opened.adapter.location, opened.adapter.record
    if settings.full_finetuning:
        raise ConfigError(
            f"{location.name} is a LoRA adapter, which full_finetuning=True cannot train; merge it first "
            "(save_pretrained_merged) or load it without full_finetuning"
        )
    weights = adapter_weights(location, hub, settings.allow_pickle)
    settings = replace(settings, labels=_labels_of_adapter(opened.adapter, weights, settings.labels))
    if record is not None:
        settings = settings.as_trained(record.base, record.positions, record.kept_in_16bit)
    base, tokenizer = _load_base(opened, settings)
    source = base.oribi
    if record is None:
        how = "in NF4" if source.identity.in_nf4 else "in 16 bit"
        how = "in the file's own codes" if source.identity.weights == AS_IN_FILE else how
        source.notes.append(
            f"{location.name} has no {RECORD_FILE}: the weights it was trained on are unknown; they are loaded {how}"
        )
    else:
        source.notes += compare_with_record(location, record, source.identity)
        source.chat_template, source.merges_codes = record.chat_template, record.merges_codes
    try:
        model = attach_from(base, location, weights, is_trainable=True)
    except ModelError as error:
        raise ModelError(f"{location.name} does not fit {opened.location.name}: {error}") from error
    train_in_float32(model)
    return model.train(), tokenizer


def _labels_of_adapter(adapter: OpenedAdapter, weights: Path, asked: Labels | None) -> Labels | None:
    """What an adapter's classifier tells apart: as its record says, or the caller, or as many labels as its head has.

    Raises:
        ConfigError: the caller asks for other labels.
    """
    name = adapter.location.name
    if adapter.settings.task_type != TaskType.SEQ_CLS:
        if asked is not None:
            raise ConfigError(
                f"{name} is the adapter of a language model; num_labels, id2label and label2id do not fit it"
            )
        return None
    heads = [
        t
        for key, t in read_tensors(weights).items()
        if key.endswith(tuple(f"{head}.weight" for head in HEADS))
    ]
    count = len(heads[0]) if heads else len(asked.names) if asked else None
    if asked is not None and len(asked.names) != count:
        raise ConfigError(
            f"{name} tells {count} labels apart, and {len(asked.names)} are asked for; leave num_labels out"
        )
    stored = adapter.record.labels if adapter.record is not None else None
    return asked or stored or read_labels(count)


def _load_base(
    opened: OpenedModel, settings: LoadSettings
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    location, config, notes = opened.location, opened.config, opened.notes
    tokenizer, template = opened.read_tokenizer()
    stored = opened.stored()
    dtype = choose_dtype(settings, getattr(config, "dtype", None), notes, config.model_type)
    quantization = choose_quantization(settings, notes, stored, opened.gguf is not None)
    _choose_positions(config, settings, notes)
    files = weight_files(location, opened.hub, settings.allow_pickle)
    pickled, names, new_modules = files[0].suffix == ".bin", None, ()
    labels = _choose_labels(opened, settings)
    if quantization.train_for is not None:
        require_codable(opened, settings.full_finetuning, labels is not None)
    if opened.fused:
        names = wrapper_names(opened.whole, labels is not None) if opened.is_part else None
        weights = opened.gguf or open_weights(location, opened.hub, renaming(names), settings.allow_pickle)
        notes += note_on_packed(weights, quantization.enabled)
        refuse_other_sizes(opened.config_file, config, weights.shapes())
        if labels is not None:
            weights = WithScore(weights, config)
            new_modules = ("score",) * weights.is_new
        model = (build if labels is None else build_classifier)(config, dtype=dtype)
        notes += fill(
            model, weights, device=settings.device, dtype=dtype, quantization=quantization,
            trainable=settings.full_finetuning, together=settings.together,
        )  # fmt: skip
    else:
        model, new_modules = load_unfused(
            location, config, device=settings.device, dtype=dtype, quantization=quantization,
            trust_remote_code=opened.hub.trust_remote_code, allow_pickle=pickled, notes=notes,
            classifies=labels is not None,
        )  # fmt: skip
        if type(model.config) is type(getattr(config, "text_config", None)):
            names = wrapper_names(opened.whole, labels is not None)
    if new_modules and opened.adapter is None:  # an adapter brings its own
        notes.append(f"{', '.join(new_modules)}: not in the checkpoint, so random values are trained from")
    model.config._name_or_path = model.name_or_path = written_name(location.name)
    model.generation_config = opened.generation
    if opened.fused and quantization.enabled and not quantization.as_in_file:
        mark_quantized(model, quantization)
    sums = {} if settings.full_finetuning else _sums(model)
    rows = _resize(model, len(tokenizer), opened, settings.resize_model_vocab)
    max_seq_length = settings.max_seq_length or trained_positions(config)
    seen = [location.file] if opened.gguf is not None else [opened.config_file, *files]
    identity = identify(location.name, seen, model, opened.hub.revision, template, quantization)
    if settings.fix_tokenizer:
        encodes = _is_encoder(model)
        if not encodes:
            ends = opened.repair_tokenizer(tokenizer, rows, max_seq_length).eos_token_ids
            model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
        if not encodes or model.config.pad_token_id is None:  # RoBERTa and its kin count positions from it
            model.generation_config.pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    kind = "gguf" if opened.gguf is not None else "pickle" if pickled else "safetensors"
    model.oribi = ModelSource(
        name_or_path=location.name,
        kind="bnb-4bit" if isinstance(stored, dict) else kind,
        max_seq_length=max_seq_length,
        load_in_4bit=quantization.enabled,
        kept_in_16bit=quantization.asked,
        full_finetuning=settings.full_finetuning,
        fused=opened.fused,
        identity=identity,
        revision=opened.hub.revision,
        hub=opened.hub,
        labels=labels,
        new_modules=new_modules,
        names=names,
        config=opened.whole,
        sums=sums,
        notes=notes,
    )
    model.max_seq_length = max_seq_length
    model.requires_grad_(settings.full_finetuning)
    return model.train(settings.full_finetuning), tokenizer


def _choose_labels(opened: OpenedModel, settings: LoadSettings) -> Labels | None:
    """What a classifier tells apart, which its configs then say; None for a language model."""
    labels = settings.labels or stored_labels(opened.whole)
    if labels is None and settings.classifies:
        labels = read_labels(2)
        opened.notes.append("num_labels is not given: the classifier gets 2 labels, as in transformers")
    for one in (opened.whole, opened.whole.get_text_config(), opened.config) if labels is not None else ():
        labels.write(one)
    return labels


def _is_encoder(model: PreTrainedModel) -> bool:
    """Whether a model reads whole texts and never continues one, so that no token has to end them."""
    return not getattr(model, "can_generate", bool)() and not isinstance(model, DecoderPreTrainedModel)


def _resize(model: PreTrainedModel, tokens: int, opened: OpenedModel, wanted: int | None) -> int:
    """Gives the embeddings as many rows as were asked for, or as an adapter's tokenizer needs; returns their number."""
    rows, notes = model.get_input_embeddings().weight.shape[0], opened.notes
    if wanted is not None:
        model.resize_token_embeddings(wanted)
        notes.append(f"embeddings resized from {rows} to {wanted} rows")
        rows = wanted
    if tokens <= rows:
        return rows
    if opened.adapter is None or not opened.adapter.has_tokenizer:
        notes.append(
            f"tokenizer: it has {tokens} tokens but the model only {rows} rows; resize_model_vocab= adds them"
        )
        return rows
    model.resize_token_embeddings(tokens)
    notes.append(f"embeddings resized from {rows} to {tokens} rows for the adapter's tokens")
    return tokens


def mark_quantized(model: PreTrainedModel, quantization: Quantization) -> None:
    """Marks a model as transformers marks those it quantised itself; PEFT, Trainer and save_pretrained ask for it."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=quantization.double,
        bnb_4bit_compute_dtype=model.dtype,
        # whole names: transformers takes them for the start of a name
        llm_int8_skip_modules=[name for name, layer in model.named_modules() if type(layer) is nn.Linear],
    )
    model.config.quantization_config = settings
    model.hf_quantizer = Bnb4BitHfQuantizer(settings, pre_quantized=True)
    model.is_quantized = model.is_loaded_in_4bit = True
    model.quantization_method = QuantizationMethod.BITS_AND_BYTES


def _choose_positions(config: PretrainedConfig, settings: LoadSettings, notes: list[str]) -> None:
    text = config.get_text_config()
    if settings.positions is not None and settings.rope_scaling is None:
        for name, value in settings.positions.items():
            setattr(text, name, value)
        notes.append("RoPE is stretched as it was when the adapter was trained")
        return
    if settings.rope_scaling is not None:
        override_rope(text, settings.rope_scaling)
    if settings.max_seq_length is not None:
        notes += extend_context(text, settings.max_seq_length)
    elif trained_positions(text) is None:
        raise ConfigError(
            f"max_seq_length is not given, and this {text.model_type} model names no longest text; give it"
        )
