"""STEP 2: a model and its tokenizer from a directory, a hub name, a GGUF file or a LoRA adapter, in NF4 or 16 bit."""

from dataclasses import dataclass, field, replace
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

from oribi.errors import ConfigError, ModelError
from oribi.models.adapter_config import check_against_base, read_adapter_config
from oribi.models.checkpoint import PickleSource, Quantization, SafetensorsSource, fill
from oribi.models.config_file import check_decoder, read_config, read_generation, refuse_other_sizes
from oribi.models.context import extend_context, override_rope
from oribi.models.decoder import build
from oribi.models.families import family_of
from oribi.models.gguf_source import GGUFSource
from oribi.models.gguf_tokenizer import rebuild_tokenizer
from oribi.models.identity import BaseIdentity, identify
from oribi.models.locate import (
    Location,
    adapter_weights,
    locate,
    locate_base,
    read_json,
    shard_of,
    weight_files,
    written_name,
)
from oribi.models.request import Options, Request, choose_device, choose_dtype, choose_quantization
from oribi.models.tokenizer import load_tokenizer, repair
from oribi.models.unfused import load_unfused


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
    notes: list[str] = field(default_factory=list)


def load_model(
    model_name: str,
    *,
    max_seq_length: int | None = 2048,
    dtype: torch.dtype | str | None = None,
    load_in_4bit: bool = True,
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
        load_in_4bit: frozen linear layers in NF4; False, or load_in_16bit, in the compute dtype.
        load_in_8bit: refused.
        full_finetuning: every weight is trained, none quantised.
        token, revision: for the hub.
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
        load_in_4bit=load_in_4bit and not load_in_16bit,
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
    stored = _stored_quantization(location, config)
    text = getattr(config, "text_config", None)
    if text is not None and family_of(config) is None and family_of(text) is not None:
        notes.append(f"{config.model_type}: the text decoder is loaded; images and sound are not supported")
        text.tie_word_embeddings = getattr(config, "tie_word_embeddings", text.tie_word_embeddings)
        config = text
    dtype = choose_dtype(request, getattr(config, "dtype", None), notes)
    quantization = choose_quantization(request, notes, stored)
    _choose_positions(config, request, notes)
    files = weight_files(location, request.hub, request.options.use_safetensors is False)
    pickled = files[0].suffix == ".bin"
    fused = family_of(config) is not None
    if fused:
        config.__dict__.pop("quantization_config", None)
        source = (
            PickleSource(files, _rename) if pickled else SafetensorsSource(files, _rename, shard_of(location))
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
    kind = "bnb-4bit" if stored is not None else "pickle" if pickled else "safetensors"
    return _finish(
        model, tokenizer, generation, location, [directory / "config.json", *files], request, quantization, kind,
        fused, notes,
    )  # fmt: skip


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
        tokenizer = rebuild_tokenizer(source.value, str(location.file))
    ends = [config.eos_token_id, source.value("tokenizer.ggml.eot_token_id")]
    model = build(config, dtype=dtype)
    notes += fill(
        model, source, device=request.device, dtype=dtype, quantization=quantization,
        trainable=request.full_finetuning,
    )  # fmt: skip
    generation = GenerationConfig.from_model_config(config)
    generation.eos_token_id = [end for end in dict.fromkeys(ends) if end is not None]
    return _finish(
        model, tokenizer, generation, location, [location.file], request, quantization, "gguf", True, notes
    )


def _load_adapter(location: Location, request: Request) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    if request.full_finetuning:
        raise ConfigError(
            f"{location.name} is a LoRA adapter, which full_finetuning=True cannot train; merge it first "
            "(save_pretrained_merged) or load it without full_finetuning"
        )
    adapter_weights(location, request.hub, request.options.use_safetensors is False)
    settings = read_adapter_config(location)
    options = replace(request.options, subfolder="", gguf_file=None)
    request = replace(request, revision=settings.revision, options=options)
    base_location = locate_base(location, request.hub)
    base, tokenizer = _load(base_location, request)
    notes = base.oribi.notes
    notes[:0] = location.notes
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
    names = [name for name, _ in base.named_modules()]
    check_against_base(location, names, base.get_input_embeddings().weight.shape[0])
    try:
        model = PeftModel.from_pretrained(base, str(location.directory), is_trainable=True)
    except Exception as error:  # whatever PEFT makes of files that belong to another base
        raise ModelError(
            f"{location.name} does not fit {base_location.name}: {error}. Its adapter_config.json or its weights are "
            "damaged, or belong to another base"
        ) from error
    train_in_float32(model)
    return model.train(), tokenizer


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
    if request.options.resize_model_vocab is not None:
        model.resize_token_embeddings(request.options.resize_model_vocab)
        notes.append(f"embeddings resized from {vocab_size} to {request.options.resize_model_vocab} rows")
        vocab_size = request.options.resize_model_vocab
    if len(tokenizer) > vocab_size:
        notes.append(
            f"tokenizer: it has {len(tokenizer)} tokens but the model only {vocab_size} rows; resize_model_vocab= adds them"
        )
    identity = identify(location.name, files, model, request.revision, tokenizer.chat_template)
    max_seq_length = request.max_seq_length or model.config.max_position_embeddings
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
    if request.rope_scaling is not None:
        override_rope(config, request.rope_scaling)
    if request.max_seq_length is not None:
        notes += extend_context(config, request.max_seq_length)


def _rename(name: str) -> str | None:
    """The decoder's name for a checkpoint's tensor: text decoders inside a larger model, and decoders without a head."""
    if name.startswith(_NOT_TEXT) or name.endswith(".rotary_emb.inv_freq"):
        return None
    for prefix, replacement in (("model.language_model.", "model."), ("language_model.", "")):
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return f"model.{name}" if name.startswith(("embed_tokens.", "layers.", "norm.")) else name


_NOT_TEXT = tuple(
    f"{outer}{inner}."
    for outer in ("", "model.")
    for inner in ("vision_tower", "multi_modal_projector", "audio_tower")
)
