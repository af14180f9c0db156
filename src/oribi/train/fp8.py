"""fp8 = True: products of frozen weights in 8-bit floating point while training. What it computes is in `kernels/fp8.py`."""

from collections.abc import Iterator

import torch
from torch import nn
from transformers import TrainingArguments

from oribi.environment import Environment, detect
from oribi.errors import ConfigError
from oribi.models.decoder import DecoderForCausalLM

# NVIDIA's first generation whose matrix units take e4m3
NEEDED = (8, 9)
WITHOUT = "Leave out fp8: training is exact then"


def require_fp8_gpu(environment: Environment) -> None:
    """Before anything is loaded: whether this machine can multiply in fp8.

    Raises:
        ConfigError: it has no such GPU.
    """
    if environment.capability is None or environment.capability < NEEDED:
        found = environment.device_name
        if environment.capability is not None:
            found += f" has compute capability {'.'.join(map(str, environment.capability))}"
        raise ConfigError(
            f"fp8 = true needs an NVIDIA GPU of compute capability {'.'.join(map(str, NEEDED))} or higher, and the device "
            f"here is {found}. {WITHOUT}"
        )


def settle_fp8(args: TrainingArguments, base: nn.Module) -> None:
    """Find what stands against the fp8 that is asked for.

    Args:
        args: an `SFTConfig`.
        base: the model, taken out of PEFT's wrapper.

    Raises:
        ConfigError: this machine, the model or another setting rules it out.
    """
    if not args.fp8:
        return
    require_fp8_gpu(detect())
    problems = list(_problems(args, base))
    if problems:
        raise ConfigError(f"fp8 = true, but {'; and '.join(problems)}. {WITHOUT}")


def _problems(args: TrainingArguments, base: nn.Module) -> Iterator[str]:
    if not isinstance(base, DecoderForCausalLM):
        yield f"{type(base).__name__} is outside oribi's family table, and transformers' class runs it"
        return
    if base.device.type != "cuda":
        yield "the model lies in host memory: load it on the GPU"
    dtype = base.model.norm.weight.dtype
    if dtype is not torch.bfloat16:
        yield f"the model computes in {str(dtype).removeprefix('torch.')}: load it with dtype='bfloat16'"
    if args.fsdp:
        yield "fsdp gathers the frozen weights anew in every step"
    training = base.training
    base.train()  # dropout is read where it acts
    layers = base.use_fp8(True)
    base.use_fp8(False)
    base.train(training)
    if not layers:
        yield (
            "no layer can use it: it takes frozen weights, in 4 or 16 bits and of sizes divisible by 16, under plain LoRA "
            "without dropout"
        )


def switch_on(base: DecoderForCausalLM) -> str:
    """Has training multiply in fp8 wherever it can, and says in one line where that is."""
    base.train()
    return f"fp8 (approximate): base products of {base.use_fp8(True)} of {len(base.model.layers)} layers"
