"""Models outside the family table: transformers' own class with NF4 weights, without oribi's fused path."""

from functools import partial

import bitsandbytes as bnb
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from oribi.errors import ModelError
from oribi.models.checkpoint import Quantization, fits_nf4
from oribi.models.generation import generate_in_inference_mode
from oribi.models.locate import Location


def load_unfused(
    location: Location,
    config: PretrainedConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization,
    trust_remote_code: bool,
    allow_pickle: bool,
) -> PreTrainedModel:
    """A causal language model through `AutoModelForCausalLM`.

    Args:
        location: a checkpoint whose weights are on disk.
        config: its config; one that names a quantisation is loaded as it is.
        device, dtype, quantization, trust_remote_code, allow_pickle: as in `load.Request`.

    Raises:
        ModelError: transformers cannot load it, or its layers cannot be packed on this device.
    """
    settings = None
    if quantization.enabled and not getattr(config, "quantization_config", None):
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=quantization.double,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["lm_head", *quantization.skip],
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            location.directory,
            config=config,
            dtype=dtype,
            device_map={"": device},
            quantization_config=settings,
            trust_remote_code=trust_remote_code,
            use_safetensors=not allow_pickle,
            local_files_only=True,
        )
    except (ValueError, OSError, ImportError, KeyError) as error:
        raise ModelError(
            f"{location.name}: transformers cannot load this {config.model_type} model: {error}"
        ) from error
    model.generate = partial(generate_in_inference_mode, model, model.generate)
    for name, layer in model.named_modules():
        if not isinstance(layer, bnb.nn.Linear4bit):
            continue
        if not fits_nf4(layer, device):
            raise ModelError(
                f"{location.name}: {name} has rows of {layer.in_features} values, which bitsandbytes computes wrongly on a "
                "CPU; pass load_in_4bit=False"
            )
        # bitsandbytes would repack the weight in an eval forward, and later gradients would be wrong
        layer.support_avx512bf16_for_cpu = False
    return model
