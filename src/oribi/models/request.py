"""What a caller asks of the loader, and what is chosen from it: dtype, device, quantisation."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from oribi.environment import detect
from oribi.errors import ConfigError
from oribi.models.files import HubOptions
from oribi.models.quantize import Quantization

_DTYPES = {
    **dict.fromkeys(("float16", "fp16", "half"), torch.float16),
    **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
    **dict.fromkeys(("float32", "fp32", "float"), torch.float32),
}
_ONE_DEVICE = ("auto", "sequential", "balanced", "balanced_low_0", "unsloth")


@dataclass(frozen=True)
class Options:
    """The rarer settings of a load.

    Args:
        float32_mixed_precision: full fine-tuning keeps its weights in float32.
        quantization_config: bitsandbytes' settings; wins over the flags.
        fix_tokenizer: whether padding, chat template and end of turn are repaired.
        resize_model_vocab: rows that the embeddings shall have.
        use_safetensors: False allows pickled .bin weights.
        gguf_file: which GGUF file of a directory or repository to load.
        cache_dir, local_files_only, force_download, subfolder: for the hub.
    """

    float32_mixed_precision: bool | None = None
    quantization_config: BitsAndBytesConfig | dict[str, Any] | None = None
    fix_tokenizer: bool = True
    resize_model_vocab: int | None = None
    use_safetensors: bool | None = None
    gguf_file: str | None = None
    cache_dir: str | None = None
    local_files_only: bool = False
    force_download: bool = False
    subfolder: str = ""


@dataclass(frozen=True)
class Request:
    """`load_model`'s arguments, and what an adapter's record says of its base's positions."""

    max_seq_length: int | None
    dtype: torch.dtype | str | None
    device: torch.device
    load_in_4bit: bool | None
    full_finetuning: bool
    token: str | bool | None
    rope_scaling: dict[str, Any] | None
    trust_remote_code: bool
    revision: str | None
    options: Options
    positions: dict[str, Any] | None = None

    @property
    def hub(self) -> HubOptions:
        """What the hub is asked with."""
        o = self.options
        return HubOptions(
            self.token, self.revision, o.cache_dir, o.local_files_only, o.force_download, o.subfolder or "",
            with_code=self.trust_remote_code,
        )  # fmt: skip


def choose_quantization(
    request: Request, notes: list[str], stored: dict[str, Any] | None = None
) -> Quantization:
    """How linear layers are stored.

    Args:
        request: its flags and quantization_config.
        notes: takes one line for each decision the caller might not expect.
        stored: the checkpoint's own quantization_config if it comes packed in NF4.

    Raises:
        ConfigError: another quantisation is asked for.
    """
    enabled, double, skip = request.load_in_4bit is not False, True, ()
    given = request.options.quantization_config
    if given is not None:
        given = given if isinstance(given, dict) else given.to_dict()
        if given.get("load_in_8bit") or given.get("bnb_4bit_quant_type", "nf4") != "nf4":
            raise ConfigError(
                "quantization_config must be bitsandbytes' load_in_4bit with bnb_4bit_quant_type='nf4'"
            )
        enabled = bool(given.get("load_in_4bit", False))
        double = bool(given.get("bnb_4bit_use_double_quant", True))
        skip = tuple(given.get("llm_int8_skip_modules") or ())
    if request.full_finetuning and enabled:
        notes.append("full_finetuning trains every weight, so none is quantised (load_in_4bit is ignored)")
        enabled = False
    if stored is not None:
        double = bool(stored.get("bnb_4bit_use_double_quant", False))
        skip = tuple(name for name in stored.get("llm_int8_skip_modules") or () if name != "lm_head")
        if not enabled:
            notes.append(
                "the checkpoint is packed in NF4 and load_in_4bit is off: its weights are dequantised"
            )
    return Quantization(enabled, double, tuple(name for name in skip if name != "lm_head"))


def choose_dtype(request: Request, stored: torch.dtype | None, notes: list[str]) -> torch.dtype:
    """The compute dtype: the caller's, or the checkpoint's (`stored`) for "auto", or the machine's.

    Raises:
        ConfigError: the dtype is not one of the three.
    """
    environment = detect()
    wanted: torch.dtype | str | None = request.dtype
    if isinstance(wanted, str):
        wanted = wanted.removeprefix("torch.").lower()
        if wanted == "auto":
            wanted = stored
        elif wanted not in _DTYPES:
            raise ConfigError(f"dtype is {request.dtype!r}; allowed are auto, {', '.join(_DTYPES)}")
        else:
            wanted = _DTYPES[wanted]
    if wanted is None:
        wanted = environment.dtype
    if wanted not in _DTYPES.values():
        raise ConfigError(f"dtype is {wanted}; allowed are float16, bfloat16 and float32")
    if wanted == torch.bfloat16 and request.device.type == "cuda" and environment.dtype == torch.float16:
        notes.append(f"bfloat16 becomes float16: {environment.reasons['dtype']}")
        wanted = torch.float16
    if request.full_finetuning and wanted != torch.float32:
        if request.options.float32_mixed_precision:
            return torch.float32
        if wanted == torch.float16:
            notes.append(
                "full fine-tuning keeps its weights in float32: float16 gradients cannot be unscaled"
            )
            return torch.float32
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
                "For several GPUs start one process a GPU with torchrun"
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
