"""config.json and generation_config.json, read once and checked: every field that the decoder computes with.

transformers reads the types; what fits no network, such as heads that do not divide, is refused here with the file and the
field, before anything is built.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PretrainedConfig

from oribi.errors import ModelError
from oribi.families import MOST_LAYERS, family_of
from oribi.families.layer_fields import config_of_layer, layer_configs
from oribi.families.sizes import SIZES, size_fields
from oribi.formats.settings import NF4_METHODS, PackedFormat, method_of, packed_format
from oribi.models.fields import (
    BOOLEAN,
    MOST,
    Field,
    are,
    each,
    field_problems,
    is_number,
    is_whole,
    number_from,
    whole_from,
)
from oribi.models.files import Location, read_json, stored_settings
from oribi.models.mixers.attention import window_of
from oribi.models.original import load_original
from oribi.models.rope import RotaryAngles
from oribi.text import nearest, shown

# names of the number of layers in configs of models outside the family table
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")
_DROPOUTS = ("attention_dropout", "residual_dropout", "resid_pdrop", "embd_pdrop")
_CHOICES_OF_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")  # fmt: skip


def read_config(
    location: Location, *, trust_remote_code: bool = False, notes: list[str] | None = None
) -> PretrainedConfig:
    """The checkpoint's config, with whatever transformers makes of it, fit for a decoder of the family table.

    Args:
        location: of kind "checkpoint".
        trust_remote_code: whether a config class that comes with the model may run.
        notes: gets a line for each field that is not followed.

    Raises:
        ModelError: naming the file, and each field that no network can have.
    """
    file = location.directory / "config.json"
    settings = read_json(file)
    _refuse_impossible_sizes(file, settings)
    _check_quantization(file, settings.get("quantization_config"))
    kind = settings.get("model_type")
    if not settings.get("auto_map") and not (isinstance(kind, str) and kind in CONFIG_MAPPING):
        near = nearest(kind, CONFIG_MAPPING) if isinstance(kind, str) else None
        raise ModelError(
            f"{file}: model_type = {shown(kind)}: transformers {transformers.__version__} knows no such model"
            + (f"; did you mean {near}?" if near else "")
        )
    try:
        config = AutoConfig.from_pretrained(
            location.directory, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # a value of another type may end anywhere in the class
        raise ModelError(f"{file}: {_one_line(error)}") from error
    chosen = [name for name in _CHOICES_OF_KERNELS if settings.get(name) is not None]
    if chosen:  # which might name kernels of a hub
        config._attn_implementation = config._experts_implementation = None
        if notes is not None:
            notes.append(
                f"{' and '.join(chosen)} of config.json: not followed; oribi chooses for this machine"
            )
    dtype = config.dtype
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        given = settings.get("dtype", settings.get("torch_dtype"))
        raise ModelError(f"{file}: dtype = {shown(given)} is no float type")
    text = getattr(config, "text_config", None)
    if "text_config" in settings and not isinstance(text, PretrainedConfig):
        raise ModelError(
            f"{file}: text_config = {shown(text)}: a model of type {kind} holds no other; remove the field"
        )
    try:
        config.get_text_config()
    except ValueError as error:  # which names them
        raise ModelError(
            f"{file}: which of its parts is the text model cannot be told: {_one_line(error)}"
        ) from error
    for one in (config, text):
        if one is not None and family_of(one) is not None:
            check_decoder(file, one, notes)
    return config


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:600] or type(error).__name__


def _refuse_impossible_sizes(file: Path, settings: Mapping[str, Any]) -> None:
    """Sizes that cost time and memory, or a division by zero, before anything compares them with the files."""
    for part in (settings, settings.get("text_config")):
        if not isinstance(part, dict):
            continue
        for name in (*SIZES, *_LAYERS):
            value, most = part.get(name), MOST_LAYERS if name in _LAYERS else MOST
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                continue
            if value > most or (value < 1 and name in SIZES):
                raise ModelError(
                    f"{file}: {name} = {shown(value)}: must be a whole number from 1 to {most:,}"
                )


def _check_quantization(file: Path, quantization: Any) -> None:
    if quantization is None:
        return
    if not isinstance(quantization, dict):
        raise ModelError(f"{file}: quantization_config = {shown(quantization)}; it holds keys with values")
    skipped = quantization.get("llm_int8_skip_modules")
    if skipped is not None and not are(skipped, str):
        raise ModelError(f"{file}: llm_int8_skip_modules = {shown(skipped)}; it is a list of names")


def stored_quantization(location: Location) -> dict[str, Any] | PackedFormat | None:
    """How a checkpoint is quantised: settings of bitsandbytes' NF4, or a format that is dequantised while it loads.

    Raises:
        ModelError: it is quantised in another way.
    """
    stored = stored_settings(location.directory)
    try:
        packed = packed_format(stored)
    except ModelError as error:
        raise ModelError(
            f"{location.name}: {error}. {load_original(location.name, location.directory)}"
        ) from error
    if stored is None or packed is not None:
        return packed
    method = method_of(stored)
    if method not in NF4_METHODS or not stored.get("load_in_4bit"):
        what = "bitsandbytes 8-bit" if stored.get("load_in_8bit") else method
        raise ModelError(
            f"{location.name} is quantised by {what}; oribi loads 16-bit checkpoints, bitsandbytes' NF4, gpt-oss' MXFP4, and weights of fp8, "
            f"compressed-tensors and modelopt. {load_original(location.name, location.directory)}; it is quantised while it loads"
        )
    if stored.get("bnb_4bit_quant_type", "fp4") != "nf4":
        raise ModelError(
            f"{location.name} is packed as {stored.get('bnb_4bit_quant_type')!r}; only nf4 can be trained on. "
            + load_original(location.name, location.directory)
        )
    return stored


def check_decoder(file: Path, config: PretrainedConfig, notes: list[str] | None = None) -> None:
    """Compares a config with what its family's decoder can be; ids of no token are dropped with a note.

    Raises:
        ModelError: naming the file, and every field that does not fit.
    """
    problems = [
        f"{name} = {shown(getattr(one, name))}: must be a whole number from 1 to {MOST_LAYERS if name in _LAYERS else MOST:,}"
        for one in layer_configs(config)
        for name in size_fields(config)
        if not is_whole(getattr(one, name), 1, MOST_LAYERS if name in _LAYERS else MOST)
    ]
    problems = problems or [
        *(found for one in layer_configs(config) for found in _check_heads(one)),
        *_check_numbers(config),
        *_check_lists(config),
    ]
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(config, name, None)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not are(ids, int):
            problems.append(f"{name} = {shown(value)}: must be the number of a token")
        elif not problems and not all(0 <= token < config.vocab_size for token in ids):
            setattr(config, name, None)
            if notes is not None:
                notes.append(
                    f"{name} of config.json: {shown(value)} is none of {config.vocab_size} tokens; not used"
                )
    if not problems:
        problems += _check_rope(config)
    if problems:
        raise ModelError(f"{file}: " + "; ".join(problems))
    if notes is not None:
        notes += _windows_not_followed(config)
        notes += [
            f"{name} = {shown(getattr(config, name))} of config.json: not applied; only LoRA's own dropout is"
            for name in _DROPOUTS
            if getattr(config, name, None)
        ]


def _windows_not_followed(config: PretrainedConfig) -> list[str]:
    """Fields on sliding windows that a family's decoder does not read, nor transformers' own."""
    family = family_of(config)
    windows = [window_of(config, family, index) for index in range(config.num_hidden_layers)]
    slides = "slides in every layer" if any(windows) else "sees everything in every layer"
    fields = []
    if not family.reads_layer_types:
        kinds = set(getattr(config, "layer_types", None) or [])
        if kinds - {"sliding_attention" if any(windows) else "full_attention"}:
            fields.append("layer_types")
    if family.windows is None and getattr(config, "sliding_window", None) is not None:
        fields.append("sliding_window")
    if fields:
        return [f"{' and '.join(fields)} of config.json: not followed, a {config.model_type} model {slides}"]
    if getattr(config, "use_sliding_window", None) is False and any(windows):
        return [
            f"use_sliding_window = false of config.json: not followed, a {config.model_type} model slides wherever sliding_window "
            "and layer_types say so"
        ]
    return []


def _check_heads(config: PretrainedConfig) -> list[str]:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim, found = getattr(config, "head_dim", None), []
    if heads % kv_heads:
        found.append(f"num_attention_heads = {heads} is no multiple of num_key_value_heads = {kv_heads}")
    if head_dim is None and config.hidden_size % heads:
        found.append(f"hidden_size = {config.hidden_size} is no multiple of num_attention_heads = {heads}")
    head_dim = config.hidden_size // heads if head_dim is None else head_dim
    if not is_whole(head_dim, 2, 65536) or head_dim % 2:
        found.append(f"head_dim = {shown(head_dim)}: must be an even number")
    return found


def _check_numbers(config: PretrainedConfig) -> list[str]:
    family = family_of(config)
    positive = [family.norm_eps, *filter(None, (family.output_norm_eps, family.query_factor))]
    positive += [family.attention_scale] * isinstance(family.attention_scale, str)
    caps = {True: ["attn_logit_softcapping", "final_logit_softcapping"], "final": ["final_logit_softcapping"]}
    optional = caps.get(family.softcaps, [])
    nonzero = ["embedding_multiplier", "residual_multiplier", "logits_scaling"] * family.multipliers
    nonzero += [family.logit_scale] * bool(family.logit_scale)
    found = [
        f"{name} = {shown(getattr(config, name))}: must be a number above 0"
        for name in [*positive, *optional]
        if not (is_number(getattr(config, name)) and getattr(config, name) > 0)
        and not (name in optional and getattr(config, name) is None)
    ]
    found += [
        f"{name} = {shown(getattr(config, name))}: must be a number other than 0"
        for name in nonzero
        if not is_number(getattr(config, name)) or getattr(config, name) == 0
    ]
    found += [] if family.experts is None else family.experts.problems(config)
    window = getattr(config, "sliding_window", None)
    least = int(getattr(config, "use_sliding_window", None) is not False)  # of none, transformers makes 0
    if window is not None and not is_whole(window, least, MOST):  # caches read it in every family
        found.append(f"sliding_window = {shown(window)}: must be a whole number above 0, or null")
    return found


_MARKS = {"no_rope_layers": "0 or 1", "layer_rope_theta": "a base, or 0"}  # 0 of a layer without RoPE


def _check_lists(config: PretrainedConfig) -> list[str]:
    family, layers, found = family_of(config), config.num_hidden_layers, []
    kinds = getattr(config, "layer_types", None)
    allowed = [
        "full_attention",
        *["sliding_attention"] * (not family.mixers or family.windows is not None),
        *family.mixers,
    ]
    if family.reads_layer_types and not (
        isinstance(kinds, list) and len(kinds) == layers and all(kind in allowed for kind in kinds)
    ):
        found.append(f"layer_types: must be {' or '.join(allowed)} for each of {layers} layers")
    elif family.windows == "layer_types" and "sliding_attention" in kinds and not config.sliding_window:
        found.append(
            "layer_types: some are sliding_attention, and no sliding_window is set, or use_sliding_window = false takes it away; "
            "give the window, or full_attention for each layer"
        )
    if family.kv_sharing and not found:
        first = layers - config.num_kv_shared_layers
        if not (is_whole(config.num_kv_shared_layers, 0, layers - 1) and set(kinds[:first]) == set(kinds)):
            found.append(
                f"num_kv_shared_layers = {shown(config.num_kv_shared_layers)}: a layer of each type before the last so many "
                "must have keys and values of its own"
            )
    what, marks = _MARKS.get(family.without_rope), getattr(config, family.without_rope or "", None)
    if what and not (are(marks, int, bool, float) and len(marks) == layers):
        found.append(f"{family.without_rope}: must be {what} for each of {layers} layers")
    return found


def _check_rope(config: PretrainedConfig) -> list[str]:
    """Computes the angles of one position, since each kind of RoPE has fields of its own."""
    family, found = family_of(config), []
    for kind in family.rope_kinds(config):
        where = f"rope_parameters of {kind}" if kind else "rope_parameters"
        of_kind = config_of_layer(config, kind) if kind else config
        head_dim = getattr(of_kind, "head_dim", None) or config.hidden_size // config.num_attention_heads
        try:
            angles = RotaryAngles(config, kind)
            with torch.device("cpu"):
                cos, sin = angles.angles(torch.ones(1, dtype=torch.int64), config.max_position_embeddings)[:2]
        except Exception as error:  # transformers' formulas take what the file says
            found.append(f"{where}: {_one_line(error)}")
            continue
        if not (torch.isfinite(cos).all() and torch.isfinite(sin).all()):
            found.append(f"{where} = {shown_fields(angles.parameters)}: its angles are no numbers")
        elif not 0 < 2 * cos.shape[1] <= head_dim:
            found.append(f"{where}: {2 * cos.shape[1]} of {head_dim} dimensions would be rotated")
    return found


def shown_fields(fields: Mapping[str, Any]) -> str:
    """Keys with their values, as a message quotes them."""
    return ", ".join(f"{key} {shown(value)}" for key, value in list(fields.items())[:8])


def refuse_other_sizes(file: Path, config: PretrainedConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compares the sizes that cost most with the checkpoint's headers, before a model of these sizes is built.

    Raises:
        ModelError: the tensors are those of another size.
    """
    layers = {int(match[1]) for name in shapes if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    found = []
    if config.num_hidden_layers > 2 * len(layers) + 64:
        found.append(
            f"num_hidden_layers = {config.num_hidden_layers}, and the files hold {len(layers)} layers"
        )
    table = shapes.get("model.embed_tokens.weight")
    if table is not None and table != (config.vocab_size, config.hidden_size):
        found.append(
            f"vocab_size = {config.vocab_size}, hidden_size = {config.hidden_size}, and the files' embeddings are "
            f"{list(table)}"
        )
    if found:
        raise ModelError(f"{file}: {'; '.join(found)}. Take the config.json that belongs to the weights")


_TOKEN = Field("the number of a token", is_whole)
_TOKENS = Field("a list of tokens' numbers", lambda value: each(value, is_whole))
# what `generate` computes with
_GENERATION = {
    "temperature": number_from(0, 1e6), "top_p": number_from(0, 1), "min_p": number_from(0, 1), "typical_p": number_from(0, 1),
    "repetition_penalty": number_from(1e-6, 1e6), "length_penalty": number_from(-1e6, 1e6), "top_k": whole_from(),
    "max_length": whole_from(1), "max_new_tokens": whole_from(1), "min_length": whole_from(), "min_new_tokens": whole_from(),
    "num_beams": whole_from(1, 4096), "num_return_sequences": whole_from(1, 4096), "no_repeat_ngram_size": whole_from(),
    "encoder_no_repeat_ngram_size": whole_from(), "diversity_penalty": number_from(-1e6, 1e6),
    "guidance_scale": number_from(-1e6, 1e6), "forced_bos_token_id": _TOKEN, "forced_eos_token_id": _TOKEN,
    "suppress_tokens": _TOKENS, "begin_suppress_tokens": _TOKENS,
    **dict.fromkeys(
        ("eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id"),
        Field(_TOKEN.allowed, lambda value: is_whole(value, -1) or each(value, is_whole)),
    ),
    **dict.fromkeys(("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values"), BOOLEAN),
    "bad_words_ids": Field(
        "a list of lists of tokens' numbers",
        lambda value: bool(value) and each(value, lambda word: bool(word) and each(word, is_whole)),
    ),
    "stop_strings": Field(
        "a text or a list of texts", lambda value: bool(value) and (isinstance(value, str) or are(value, str))
    ),
    "output_attentions": Field("false, since its decoder never forms them", lambda value: value is False),
}  # fmt: skip
# `generate` refuses 1 where 1.0 is meant
_FLOATS = (
    "temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty", "diversity_penalty",
    "guidance_scale",
)  # fmt: skip


def read_generation(directory: Path) -> GenerationConfig | None:
    """The model's recommended generation settings; None without generation_config.json.

    Raises:
        ModelError: naming each field that cannot be used; without the file the model loads with its defaults.
    """
    file = directory / "generation_config.json"
    if not file.is_file():
        return None
    settings = {name: value for name, value in read_json(file).items() if value is not None}
    problems = field_problems(settings, _GENERATION)
    if not problems:
        settings |= {name: float(settings[name]) for name in _FLOATS if name in settings}
        try:
            generation = GenerationConfig.from_dict(settings)
            generation.validate()
            return generation
        except Exception as error:  # fields of rarer ways to generate
            problems.append(_one_line(error))
    raise ModelError(
        f"{file}: {'; '.join(problems)}. Correct it, or delete the file to answer by the defaults"
    )
