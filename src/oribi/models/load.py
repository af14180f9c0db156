"""STEP 2: a model and its tokenizer from a directory, a hub name, a GGUF file or a LoRA adapter, in NF4 or 16 bit."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from oribi.chat.tokenizer import load_tokenizer, repair
from oribi.errors import ConfigError, ModelError
from oribi.families import family_of
from oribi.gguf.source import GGUFSource
from oribi.gguf.tokenizer import rebuild_tokenizer
from oribi.models.adapter_config import read_adapter_config
from oribi.models.adapter_files import RECORD_FILE, AdapterRecord, attach_from, read_record
from oribi.models.config_file import check_decoder, read_config, read_generation, refuse_other_sizes
from oribi.models.decoder import build
from oribi.models.files import (
    HubOptions,
    Location,
    adapter_weights,
    locate,
    locate_base,
    read_json,
    shard_of,
    weight_files,
    written_name,
)
from oribi.models.identity import BaseIdentity, WeightSums, identify, weight_sums
from oribi.models.quantize import Quantization, fill
from oribi.models.request import Options, Request, choose_device, choose_dtype, choose_quantization
from oribi.models.rope import extend_context, override_rope
from oribi.models.unfused import load_unfused
from oribi.models.unwrap import bare_name
from oribi.models.wrapper import WrapperNames, wrapper_names
from oribi.tensors import PickleSource, SafetensorsSource


@dataclass
class ModelSource:
    """Where a loaded model comes from and what the loader decided; `model.oribi`.

    Args:
        name_or_path: as given to the loader.
        kind: how the weights were stored.
        max_seq_length: longest training example in tokens.
        load_in_4bit: whether linear layers are NF4.
        full_finetuning: whether every weight is trained.
        fused: whether oribi's decoder runs it; False is transformers' own class.
        checkpointing: what was asked of gradient checkpointing (`lora.attach.set_checkpointing`).
        new_token_ids: rows of the embeddings that `add_new_tokens` made.
        identity: the base's files and how they lie in memory.
        revision: the revision of the base that was asked for.
        hub: how the hub was asked for it.
        names: the decoder's names in the multimodal class that its checkpoint's config.json names; None where they are
            the same.
        chat_template: what the adapter's record says that it was trained with, or the trainer's.
        config: config.json as it was read, of the whole checkpoint.
        sums: of each weight as loaded, by its name in the checkpoint; they tell which were changed since.
        changed_before_lora: those that were changed when an adapter was attached; None if oribi did not attach it.
        tried: adapters' files that plain PEFT was seen to load.
        notes: what was repaired or decided, one line each.
    """

    name_or_path: str
    kind: Literal["safetensors", "pickle", "gguf", "bnb-4bit"]
    max_seq_length: int
    load_in_4bit: bool
    full_finetuning: bool = False
    fused: bool = True
    checkpointing: bool | str = False
    new_token_ids: tuple[int, ...] = ()
    identity: BaseIdentity | None = None
    revision: str | None = None
    hub: HubOptions = HubOptions()
    names: WrapperNames | None = None
    chat_template: Any = None
    config: PretrainedConfig | None = None
    sums: dict[str, WeightSums] = field(default_factory=dict)
    changed_before_lora: tuple[str, ...] | None = None
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
    **options: Any,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Loads a model to fine-tune and its tokenizer.

    Args:
        model_name: directory, .gguf file, directory or hub name of a LoRA adapter (its base is loaded and the adapter
            attached, trainable), training run, or hub name.
        max_seq_length: longest example in tokens; beyond the model's positions RoPE is stretched. None: the model's.
        dtype: compute dtype, or its name; None takes the machine's (`environment.detect`), "auto" the checkpoint's.
        load_in_4bit: frozen linear layers in NF4; False, or load_in_16bit, in the compute dtype. None: NF4, and an adapter's
            base as it was trained on.
        load_in_8bit: refused.
        full_finetuning: every weight is trained, none quantised.
        token, revision: for the hub; an adapter's base has the revision that its settings name.
        device_map: the one device to load to; "auto" and the like mean the machine's.
        rope_scaling: replaces the config's scaling.
        trust_remote_code: whether code that comes with the model may run.
        options: fields of `Options`.

    Returns:
        model with `model.oribi` (`ModelSource`), and a tokenizer that pads on the left.

    Raises:
        ConfigError: arguments contradict each other.
        ModelError: the model cannot be loaded; the message says why.
    """
    if load_in_8bit:
        raise ConfigError(
            "load_in_8bit=True is not supported: NF4 (load_in_4bit=True) takes half the memory, and 16 bit "
            "(load_in_4bit=False) is exact"
        )
    request = Request(
        max_seq_length=max_seq_length,
        dtype=dtype,
        device=choose_device(device_map),
        load_in_4bit=False if load_in_16bit else load_in_4bit,
        full_finetuning=full_finetuning,
        token=token,
        rope_scaling=rope_scaling,
        trust_remote_code=trust_remote_code,
        revision=revision,
        options=Options(**options),
    )
    return _load(locate(str(model_name), request.hub, request.options.gguf_file), request)


def _load(
    location: Location, request: Request
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    if location.kind == "adapter":
        return _load_adapter(location, request)
    if location.kind == "gguf":
        return _load_gguf(location, request)
    return _load_checkpoint(location, request)


def _load_checkpoint(location: Location, request: Request) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    directory, notes = location.directory, list(location.notes)
    config = read_config(location, trust_remote_code=request.trust_remote_code, notes=notes)
    generation = read_generation(directory)
    tokenizer = load_tokenizer(directory, trust_remote_code=request.trust_remote_code, notes=notes)
    stored, whole = _stored_quantization(location, config), copy.deepcopy(config)
    text, names = getattr(config, "text_config", None), None
    if text is not None and family_of(config) is None and family_of(text) is not None:
        notes.append(f"{config.model_type}: the text decoder is loaded; images and sound are not supported")
        text.tie_word_embeddings = getattr(config, "tie_word_embeddings", text.tie_word_embeddings)
        names = wrapper_names(whole)
        config = text
    dtype = choose_dtype(request, getattr(config, "dtype", None), notes)
    quantization = choose_quantization(request, notes, stored)
    _choose_positions(config, request, notes)
    files = weight_files(location, request.hub, request.options.use_safetensors is False)
    pickled = files[0].suffix == ".bin"
    fused = family_of(config) is not None
    if fused:
        config.__dict__.pop("quantization_config", None)
        rename = renaming(names)
        source = (
            PickleSource(files, rename) if pickled else SafetensorsSource(files, rename, shard_of(location))
        )
        refuse_other_sizes(directory / "config.json", config, source.shapes())
        model = build(config, dtype=dtype)
        notes += fill(
            model, source, device=request.device, dtype=dtype, quantization=quantization,
            trainable=request.full_finetuning,
        )  # fmt: skip
    else:
        notes.append(
            f"{config.model_type} is outside oribi's family table: it runs as transformers' {config.architectures}, "
            "unfused; expect the speed and memory of plain PEFT"
        )
        model = load_unfused(
            location, config, device=request.device, dtype=dtype, quantization=quantization,
            trust_remote_code=request.trust_remote_code, allow_pickle=pickled, notes=notes,
        )  # fmt: skip
        if text is not None and type(model.config) is type(text):
            names = wrapper_names(whole)
    kind = "bnb-4bit" if stored is not None else "pickle" if pickled else "safetensors"
    model, tokenizer = _finish(
        model, tokenizer, generation, location, [directory / "config.json", *files], request, quantization, kind,
        fused, notes,
    )  # fmt: skip
    model.oribi.names, model.oribi.config = names, whole
    return model, tokenizer


def _load_gguf(location: Location, request: Request) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    notes = list(location.notes)
    source = GGUFSource(location.file)
    config = source.config
    check_decoder(location.file, config, notes)
    refuse_other_sizes(location.file, config, source.shapes())
    dtype = choose_dtype(request, None, notes)
    quantization = choose_quantization(request, notes)
    _choose_positions(config, request, notes)
    if (location.directory / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(
            location.directory, trust_remote_code=request.trust_remote_code, notes=notes
        )
        notes.append("tokenizer: read from the tokenizer.json beside the GGUF file")
    else:
        tokenizer = rebuild_tokenizer(source.file)
    ends = [config.eos_token_id, source.value("tokenizer.ggml.eot_token_id")]
    model = build(config, dtype=dtype)
    notes += fill(
        model, source, device=request.device, dtype=dtype, quantization=quantization,
        trainable=request.full_finetuning,
    )  # fmt: skip
    generation = GenerationConfig.from_model_config(config)
    generation.eos_token_id = [end for end in dict.fromkeys(ends) if end is not None]
    model, tokenizer = _finish(
        model, tokenizer, generation, location, [location.file], request, quantization, "gguf", True, notes
    )
    model.oribi.config = copy.deepcopy(source.config)
    return model, tokenizer


def _load_adapter(location: Location, request: Request) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    if request.full_finetuning:
        raise ConfigError(
            f"{location.name} is a LoRA adapter, which full_finetuning=True cannot train; merge it first "
            "(save_pretrained_merged) or load it without full_finetuning"
        )
    weights = adapter_weights(location, request.hub, request.options.use_safetensors is False)
    settings, record = read_adapter_config(location), read_record(location.directory)
    options = replace(request.options, subfolder="", gguf_file=None)
    request = replace(request, revision=settings.revision, options=options)
    gguf_file = None
    if record is not None:
        gguf_file = next((name for name in record.base.files if name.endswith(".gguf")), None)
        request = replace(_as_trained(request, record.base), positions=record.positions)
    base_location = locate_base(location, request.hub, gguf_file)
    base, tokenizer = _load(base_location, request)
    notes = base.oribi.notes
    notes[:0] = location.notes
    if record is None:
        how = "in NF4" if base.oribi.load_in_4bit else "in 16 bit"
        notes.append(
            f"{location.name} has no {RECORD_FILE}: it is not known which weights it was trained on; they are loaded {how}"
        )
    else:
        notes += _compare_base(location, record, base.oribi.identity)
        base.oribi.chat_template = record.chat_template
    if any(location.directory.glob("tokenizer*")):
        generation = base.generation_config
        vocab_size = base.get_input_embeddings().weight.shape[0]
        tokenizer = load_tokenizer(
            location.directory, trust_remote_code=request.trust_remote_code, notes=notes
        )
        if len(tokenizer) > vocab_size:
            base.resize_token_embeddings(len(tokenizer))
            notes.append(
                f"embeddings resized from {vocab_size} to {len(tokenizer)} rows for the adapter's tokens"
            )
            vocab_size = len(tokenizer)
        if request.options.fix_tokenizer:
            repair(tokenizer, vocab_size, generation, max_seq_length=base.oribi.max_seq_length)
    elif record is not None and record.chat_template not in (None, tokenizer.chat_template):
        tokenizer.chat_template = record.chat_template
        notes.append("chat template: the one that the adapter was trained with")
    try:
        model = attach_from(base, location, weights, is_trainable=True)
    except ModelError as error:
        raise ModelError(f"{location.name} does not fit {base_location.name}: {error}") from error
    train_in_float32(model)
    return model.train(), tokenizer


def _as_trained(request: Request, base: BaseIdentity) -> Request:
    """The request with the quantisation that an adapter was trained on, where the caller did not ask for another."""
    if request.load_in_4bit is not None or request.options.quantization_config is not None:
        return request
    options = request.options
    if base.weights == "nf4, single":
        settings = {"load_in_4bit": True, "bnb_4bit_use_double_quant": False}
        options = replace(options, quantization_config=settings)
    return replace(request, load_in_4bit=base.in_nf4, options=options)


def _compare_base(location: Location, record: AdapterRecord, base: BaseIdentity) -> list[str]:
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
    if record.base.in_nf4 != base.in_nf4:
        notes.append(
            f"{location.name} was trained on {record.base.weights} weights and is loaded on {base.weights} ones, as asked. "
            "Such a pair has cost 12 points of 85 (SmolLM2-135M); load_in_4bit=None loads what it was trained on"
        )
    return notes


def train_in_float32(model: PeftModel) -> None:
    """Makes every trained weight float32: in 16 bit, small updates are rounded away."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save.float()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _finish(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    generation: GenerationConfig | None,
    location: Location,
    files: list[Path],
    request: Request,
    quantization: Quantization,
    kind: Literal["safetensors", "pickle", "gguf", "bnb-4bit"],
    fused: bool,
    notes: list[str],
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """What every loaded model needs: names, generation settings, the mark of quantisation, the repaired tokenizer."""
    model.config._name_or_path = model.name_or_path = written_name(location.name)
    if generation is not None:
        model.generation_config = generation
    if fused and quantization.enabled:
        mark_quantized(model, quantization)
    vocab_size = model.get_input_embeddings().weight.shape[0]
    sums = {} if request.full_finetuning else _sums(model)
    if request.options.resize_model_vocab is not None:
        model.resize_token_embeddings(request.options.resize_model_vocab)
        notes.append(f"embeddings resized from {vocab_size} to {request.options.resize_model_vocab} rows")
        vocab_size = request.options.resize_model_vocab
    if len(tokenizer) > vocab_size:
        notes.append(
            f"tokenizer: it has {len(tokenizer)} tokens but the model only {vocab_size} rows; resize_model_vocab= adds them"
        )
    identity = identify(location.name, files, model, request.revision, tokenizer.chat_template)
    max_seq_length = request.max_seq_length or model.config.get_text_config().max_position_embeddings
    if request.options.fix_tokenizer:
        repaired = repair(tokenizer, vocab_size, model.generation_config, max_seq_length=max_seq_length)
        notes += repaired.notes
        ends = repaired.eos_token_ids
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
        model.generation_config.pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    model.oribi = ModelSource(
        name_or_path=location.name,
        kind=kind,
        max_seq_length=max_seq_length,
        load_in_4bit=quantization.enabled,
        full_finetuning=request.full_finetuning,
        fused=fused,
        identity=identity,
        revision=request.revision,
        hub=request.hub,
        sums=sums,
        notes=notes,
    )
    model.max_seq_length = max_seq_length
    model.requires_grad_(request.full_finetuning)
    return model.train(request.full_finetuning), tokenizer


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


def checkpoint_config(location: Location) -> PretrainedConfig:
    """A model's config, of the whole checkpoint or made from a GGUF file's header; no weights are read.

    Raises:
        ModelError: it cannot be read.
    """
    if location.kind == "gguf":
        return GGUFSource(location.file).config
    return read_config(location)


def _stored_quantization(location: Location, config: PretrainedConfig) -> dict[str, Any] | None:
    """How the checkpoint is quantised, if it is in bitsandbytes' NF4; refuses every other way."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:  # of the whole model, where config is its text decoder's
        stored = read_json(location.directory / "config.json").get("quantization_config")
    if stored is None:
        return None
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    method = str(stored.get("quant_method", "bitsandbytes")).lower().rpartition(".")[2]
    if method not in ("bitsandbytes", "bits_and_bytes") or not stored.get("load_in_4bit"):
        what = "bitsandbytes 8-bit" if stored.get("load_in_8bit") else method
        raise ModelError(
            f"{location.name} is quantised by {what}; oribi loads 16-bit checkpoints and bitsandbytes' NF4. "
            "Take the original 16-bit release: it is quantised while it loads"
        )
    if stored.get("bnb_4bit_quant_type", "fp4") != "nf4":
        raise ModelError(
            f"{location.name} is packed as {stored.get('bnb_4bit_quant_type')!r}; only nf4 can be trained on"
        )
    return stored


def _choose_positions(config: PretrainedConfig, request: Request, notes: list[str]) -> None:
    if request.positions is not None and request.rope_scaling is None:
        text = config.get_text_config()
        for name, value in request.positions.items():
            setattr(text, name, value)
        notes.append("RoPE is stretched as it was when the adapter was trained")
        return
    if request.rope_scaling is not None:
        override_rope(config, request.rope_scaling)
    if request.max_seq_length is not None:
        notes += extend_context(config, request.max_seq_length)


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
    return f"model.{name}" if name.startswith(("embed_tokens.", "layers.", "norm.")) else name


def _rename_inside(names: WrapperNames, name: str) -> str | None:
    """`_rename` of a tensor of a multimodal class; None for one that is not the text decoder's."""
    inner = names.inner(name)
    moved = _rename(name) if inner == name else inner
    is_text = (
        inner != name
        or moved != name
        or name.startswith(("lm_head.", "model.embed_tokens.", "model.layers.", "model.norm."))
    )
    return moved if is_text and moved is not None and not moved.endswith(".rotary_emb.inv_freq") else None


_NOT_TEXT = tuple(
    f"{outer}{inner}."
    for outer in ("", "model.")
    for inner in ("vision_tower", "multi_modal_projector", "audio_tower")
)
