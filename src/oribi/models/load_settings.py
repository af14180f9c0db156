"""What a caller asks of the loader, and what is chosen from it: dtype, device, quantisation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from oribi.environment import detect
from oribi.errors import ConfigError
from oribi.families.table import BEYOND_FLOAT16
from oribi.gguf.coded import kept_method
from oribi.models.identity import AS_IN_FILE, BaseIdentity
from oribi.models.labels import Labels
from oribi.models.load_together import LoadTogether
from oribi.models.quantization import Quantization

_DTYPES = {
    **dict.fromkeys(("float16", "fp16", "half"), torch.float16),
    **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
    **dict.fromkeys(("float32", "fp32", "float"), torch.float32),
}
_ONE_DEVICE = ("auto", "sequential", "balanced", "balanced_low_0")


# keywords of `load_model` that few callers need, those of them that are for the hub, and those that make a classifier
HUB_OPTIONS = ("cache_dir", "local_files_only", "force_download", "subfolder")
LABEL_OPTIONS = ("num_labels", "id2label", "label2id", "problem_type")
RARE_OPTIONS = (
    "float32_mixed_precision", "quantization_config", "fix_tokenizer", "resize_model_vocab", "use_safetensors",
    "gguf_file", "classifies", "keep_in_16bit", "train_for", *LABEL_OPTIONS, *HUB_OPTIONS,
)  # fmt: skip


@dataclass(frozen=True)
class LoadSettings:
    """How a model is loaded: `load_model`'s arguments without those for the hub, and what an adapter's record says.

    Args:
        float32_mixed_precision: full fine-tuning keeps its weights in float32.
        quantization_config: bitsandbytes' settings; wins over the flags.
        fix_tokenizer: whether padding, chat template and end of turn are repaired.
        resize_model_vocab: number of rows that the embeddings get.
        use_safetensors: False allows pickled .bin weights.
        positions: RoPE's settings that an adapter was trained with, where they are not the checkpoint's.
        labels: what a sequence classifier tells apart; None loads what the checkpoint is.
        keep_in_16bit: names of linear layers, or of parts of the model, that are not packed; None: as an adapter was trained.
        train_for: method of the GGUF file whose values the frozen weights get; None: as an adapter was trained, else their own.
        together: processes that load this model at the same time.
        classifies: a classifier is loaded whatever the checkpoint is, of two labels where nothing names them.
    """

    max_seq_length: int | None
    dtype: torch.dtype | str | None
    device: torch.device
    load_in_4bit: bool | None
    full_finetuning: bool
    rope_scaling: dict[str, Any] | None
    float32_mixed_precision: bool | None = None
    quantization_config: BitsAndBytesConfig | dict[str, Any] | None = None
    fix_tokenizer: bool = True
    resize_model_vocab: int | None = None
    use_safetensors: bool | None = None
    positions: dict[str, Any] | None = None
    labels: Labels | None = None
    together: LoadTogether | None = None
    classifies: bool = False
    keep_in_16bit: Sequence[str] | None = None
    train_for: str | None = None

    @property
    def allow_pickle(self) -> bool:
        return self.use_safetensors is False

    def as_trained(
        self, base: BaseIdentity, positions: dict[str, Any] | None, kept: Sequence[str] = ()
    ) -> "LoadSettings":
        """The settings for an adapter's base: quantised as it was trained on, unless the caller asked for a way.

        Args:
            base: as it lay in memory.
            positions: RoPE's settings.
            kept: what was kept in 16 bits.
        """
        if self.keep_in_16bit is None:
            self = replace(self, keep_in_16bit=kept)
        if self.train_for is None:
            self = replace(self, train_for=base.train_for)
        config, wanted = self.quantization_config, self.load_in_4bit
        if wanted is None:
            wanted = base.in_nf4 or base.weights == AS_IN_FILE
        if config is None and wanted and base.in_nf4:  # of a GGUF file too, whose codes are kept otherwise
            config = {"load_in_4bit": True, "bnb_4bit_use_double_quant": base.weights == "nf4"}
        return replace(self, load_in_4bit=wanted, quantization_config=config, positions=positions)


def choose_quantization(
    settings: LoadSettings,
    notes: list[str],
    stored: dict[str, Any] | None = None,
    from_gguf: bool = False,
) -> Quantization:
    """How linear layers are stored.

    Args:
        settings: its flags and quantization_config.
        notes: takes one line for each decision the caller might not expect.
        stored: how the checkpoint is quantised, as `config_file.stored_quantization` says.
        from_gguf: it is a GGUF file, whose codes are kept unless NF4 is asked for by quantization_config.

    Raises:
        ConfigError: another quantisation is asked for.
    """
    enabled, double, skip = settings.load_in_4bit is not False, True, ()
    stored = stored if isinstance(stored, dict) else None  # other formats are dequantised before
    given = settings.quantization_config
    if given is not None:
        given = given if isinstance(given, dict) else given.to_dict()
        if given.get("load_in_8bit") or given.get("bnb_4bit_quant_type", "nf4") != "nf4":
            raise ConfigError(
                "quantization_config must be bitsandbytes' load_in_4bit with bnb_4bit_quant_type='nf4'"
            )
        enabled = bool(given.get("load_in_4bit", False))
        double = bool(given.get("bnb_4bit_use_double_quant", True))
        skip = tuple(given.get("llm_int8_skip_modules") or ())
    asked = settings.keep_in_16bit or ()
    asked = (asked,) if isinstance(asked, str) else tuple(asked)
    if asked and not enabled:
        notes.append("keep_in_16bit: every weight is kept in 16 bits, because load_in_4bit is off")
    if settings.full_finetuning and enabled:
        notes.append("full_finetuning trains every weight, so none is quantised (load_in_4bit is ignored)")
        enabled = False
    if asked and stored is not None and enabled:
        raise ConfigError(
            f"keep_in_16bit = {list(asked)}: the checkpoint is packed in NF4 already; load the 16-bit original, which is packed "
            "while it loads"
        )
    if stored is not None:
        double = bool(stored.get("bnb_4bit_use_double_quant", False))
        skip = tuple(name for name in stored.get("llm_int8_skip_modules") or () if name != "lm_head")
        if not enabled:
            notes.append(
                "the checkpoint is packed in NF4 and load_in_4bit is off: its weights are dequantised"
            )
    skip = (*(name for name in skip if name != "lm_head"), *asked)
    train_for = None if settings.train_for is None else kept_method(settings.train_for)
    if train_for and enabled and given is not None:
        raise ConfigError(
            f"train_for = {train_for!r} and quantization_config contradict each other; give one of them"
        )
    as_in_file = (from_gguf or train_for is not None) and enabled and given is None
    return Quantization(enabled, double, skip, asked if enabled else (), as_in_file, train_for)


def choose_dtype(
    settings: LoadSettings, stored: torch.dtype | None, notes: list[str], model_type: str = ""
) -> torch.dtype:
    """The compute dtype: the caller's, or the checkpoint's (`stored`) for "auto", or the machine's.

    Raises:
        ConfigError: the dtype is not one of the three, or the model overflows in it.
    """
    environment = detect()
    wanted: torch.dtype | str | None = settings.dtype
    if isinstance(wanted, str):
        wanted = wanted.removeprefix("torch.").lower()
        if wanted == "auto":
            wanted = stored
        elif wanted not in _DTYPES:
            raise ConfigError(f"dtype is {settings.dtype!r}; allowed are auto, {', '.join(_DTYPES)}")
        else:
            wanted = _DTYPES[wanted]
    if wanted is None:
        wanted = environment.dtype
    if wanted not in _DTYPES.values():
        raise ConfigError(f"dtype is {wanted}; allowed are float16, bfloat16 and float32")
    if wanted == torch.bfloat16 and settings.device.type == "cuda" and environment.dtype == torch.float16:
        notes.append(f"bfloat16 becomes float16: {environment.reasons['dtype']}")
        wanted = torch.float16
    if settings.full_finetuning and wanted != torch.float32:
        if settings.float32_mixed_precision:
            return torch.float32
        if wanted == torch.float16:
            notes.append(
                "full fine-tuning keeps its weights in float32: float16 gradients cannot be unscaled"
            )
            return torch.float32
    if wanted == torch.float16 and model_type in BEYOND_FLOAT16:
        reason = f" ({environment.reasons['dtype']})" if environment.dtype == wanted else ""
        raise ConfigError(
            f"dtype is float16{reason}, in which the activations of {model_type} models overflow and every logit is a nan. Take "
            "dtype='bfloat16' on a GPU of compute capability 8.0 or newer (A100, L4, RTX 30 series), or dtype='float32', which "
            "is slow; on a V100 or T4 train another model"
        )
    return wanted


def choose_device(device_map: str | int | torch.device | dict[str, Any] | None) -> torch.device:
    """The device to load to.

    Raises:
        ConfigError: several devices, or none that exists.
    """
    if isinstance(device_map, dict):
        places = {str(place) for place in device_map.values()}
        if len(places) != 1:
            raise ConfigError(
                f"device_map spreads the model over {', '.join(sorted(places))}; oribi keeps a model on one device. "
                "For several GPUs start one process per GPU with torchrun"
            )
        (device_map,) = places
    if device_map is None or device_map in _ONE_DEVICE:
        return detect().device
    try:
        device = torch.device(int(device_map) if str(device_map).isdigit() else device_map)
    except (RuntimeError, TypeError) as error:
        allowed = ", ".join(_ONE_DEVICE)
        raise ConfigError(
            f"device_map is {device_map!r}; give a device such as 'cuda:0' or 'cpu', or {allowed}"
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device_map is {device_map!r} but {detect().reasons['device']}")
    return device
