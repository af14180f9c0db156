"""What a model, its arguments and its data have to agree on before the trainer is built."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
import torch
from torch import nn
from transformers import TrainingArguments, set_seed

from oribi.environment import Environment, detect
from oribi.errors import ConfigError
from oribi.models.decoder import DecoderForCausalLM
from oribi.models.load import load_model
from oribi.models.rope import trained_positions
from oribi.models.unwrap import base_model, is_classifier
from oribi.text import say_notes
from oribi.train.arguments import SFTConfig
from oribi.train.context import require_context
from oribi.train.shards import require_shardable

logger = logging.getLogger(__name__)

# dtypes by the names of accelerate's launcher
_LAUNCHED_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
NOT_COMPILED = "oribi's layers run kernels and backward passes of their own, which torch.compile cannot trace"
# fields of TRL's SFTConfig that oribi does not honour: the values with which it agrees, and what to do instead
NOT_HONOURED = {
    "activation_offloading": ((False,), "adapt the model with use_gradient_checkpointing='memory', which offloads them"),
    "chat_template_path": ((None,), "set tokenizer.chat_template, or call oribi.get_chat_template, before the trainer"),
    "liger_kernel_config": ((None,), "oribi's layers have kernels of their own; leave it out"),
    "optim_target_modules": ((None,), "optimizers run on all that is trained; leave it out"),
    "eos_token": ((None,), "set tokenizer.eos_token before the trainer"),
    "loss_type": (("nll",), "oribi trains with 'nll'"),
    "packing_strategy": (("bfd",), "oribi packs whole documents, as 'bfd' does; leave it out"),
    "pad_token": ((None,), "set tokenizer.pad_token before the trainer"),
    "router_aux_loss_coef": ((None, 0.0), "oribi adds no load-balancing loss; leave it out"),
    "truncation_mode": (("keep_start",), "oribi keeps the start; overlong chooses what else happens to long rows"),
}  # fmt: skip
# and those of transformers that nothing here reads
_NO_WRAPPER = "processes exchange gradients in one sum, without DistributedDataParallel"
NOT_USED = {
    "ddp_find_unused_parameters": _NO_WRAPPER, "ddp_bucket_cap_mb": _NO_WRAPPER, "ddp_broadcast_buffers": _NO_WRAPPER,
    "ddp_static_graph": _NO_WRAPPER,
}  # fmt: skip

# NVIDIA's first generation whose matrix units take e4m3
FP8_CAPABILITY = (8, 9)
WITHOUT_FP8 = "Leave out fp8: training is exact then"


def keep_dtype_in_evaluation(args: TrainingArguments) -> None:
    """Switch off the cast of a whole model for an evaluation: it is never undone, so the adapter would stay rounded."""
    for name in ("fp16_full_eval", "bf16_full_eval"):
        if getattr(args, name):
            setattr(args, name, False)
            logger.warning("%s has no effect: the model's dtype decides how it is evaluated", name)


def model_and_tokenizer(
    model: str | nn.Module,
    args: SFTConfig,
    processing_class: Any,
    tokenizer: Any,
    adapter: peft.PeftConfig | None,
) -> tuple[nn.Module, Any]:
    """The model to train and its tokenizer, from what the trainer was given.

    Args:
        model: a model, or a name that `FastLanguageModel.from_pretrained` takes.
        args: model_init_kwargs and trust_remote_code apply to a name.
        processing_class, tokenizer: two names of the tokenizer.
        adapter: to put on a model that has none; it begins equally in every run of a seed.

    Raises:
        ConfigError: they contradict each other.
    """
    if tokenizer is not None and processing_class is not None and tokenizer is not processing_class:
        raise ConfigError("tokenizer and processing_class name the same thing; give one of them")
    tokenizer = processing_class or tokenizer
    if isinstance(model, str):
        options = {
            "max_seq_length": args.max_length or 2048,
            "load_in_4bit": False,
            "full_finetuning": adapter is None,
            "trust_remote_code": args.trust_remote_code,
        }
        model, own = load_model(model, **{**options, **(args.model_init_kwargs or {})})
        tokenizer = tokenizer or own
    elif args.model_init_kwargs is not None:
        logger.warning("model_init_kwargs is not used: the model is loaded already")
    if adapter is not None:
        if isinstance(model, peft.PeftModel):
            raise ConfigError(
                "peft_config is given, and the model has an adapter already; leave out one of them"
            )
        set_seed(args.seed)
        model = peft.get_peft_model(model, adapter)
    if is_classifier(model):
        raise ConfigError(
            "SFTTrainer trains models that continue texts, and this one scores labels: pass it to transformers.Trainer, or to "
            "oribi.trl.RewardTrainer where num_labels is 1"
        )
    if tokenizer is None:
        raise ConfigError(
            "the tokenizer is missing; pass tokenizer= what from_pretrained returned with the model"
        )
    if hasattr(model, "_orig_mod") and isinstance(base_model(model), DecoderForCausalLM):
        raise ConfigError(f"the model went through torch.compile: {NOT_COMPILED}. Pass it as it was before")
    return model, tokenizer


def fit_arguments(args: SFTConfig, base: nn.Module) -> None:
    """Let the loaded model decide what the arguments left open: the longest example and the precision.

    Raises:
        ConfigError: bf16 or fp16 contradicts the model's dtype, a loss is asked for that the model cannot give, or FSDP
            or fp8 is asked for where it cannot be, or context parallelism is.
    """
    if args.n_gpu > 1:  # the Trainer would copy the model to all of them, step by step
        logger.info(
            "%d GPUs are visible, and this process trains on one; `torchrun --nproc-per-node %d` uses all",
            args.n_gpu, args.n_gpu,
        )  # fmt: skip
        args._n_gpu = 1
    require_shardable(args, base)
    require_fp8(args, base)
    require_context(args, base)
    problems = [
        f"{name} = {getattr(args, name)!r}: {remedy}"
        for name, (agreed, remedy) in NOT_HONOURED.items()
        if getattr(args, name) not in agreed and (name != "packing_strategy" or args.packing)
    ]
    if problems:
        raise ConfigError("; ".join(problems))
    say_notes(
        f"{name} has no effect: {why}" for name, why in NOT_USED.items() if getattr(args, name) is not None
    )
    if getattr(base.config.get_text_config(), "output_router_logits", False):
        say_notes(
            ["output_router_logits in the model's config has no effect: oribi adds no load-balancing loss"]
        )
    source = getattr(base, "oribi", None)
    if args.max_length is None:
        args.max_length = getattr(source, "max_seq_length", None) or trained_positions(base.config)
    if base.device.type == "cpu":
        args.dataloader_pin_memory = False
    elif args.dataloader_pin_memory:
        args.accelerator_config.non_blocking = True  # or reading a batch would wait for the step that runs
    unused = set(args.dataset_kwargs or {}) - {"skip_prepare_dataset"}
    if unused:
        logger.warning("dataset_kwargs: %s not used", ", ".join(sorted(unused)))
    if not isinstance(base, DecoderForCausalLM):
        if args.gradient_checkpointing and any(not p.requires_grad for p in base.parameters()):
            base.enable_input_require_grads()  # a frozen embedding's output would end the checkpoints' backward
        return
    keep_dtype_in_evaluation(args)
    dynamo = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if args.torch_compile or dynamo != "no":
        asked = (
            "torch_compile = True"
            if args.torch_compile
            else f"accelerate's launcher asks for dynamo's {dynamo}"
        )
        raise ConfigError(
            f"{asked}: {NOT_COMPILED}. Leave it out; small models run as CUDA graphs without it"
        )
    if args.use_liger_kernel:
        raise ConfigError("use_liger_kernel = True: oribi's layers have kernels of their own; leave it out")
    for asked, other in ((torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)):
        flag = "bf16" if asked is torch.bfloat16 else "fp16"
        if getattr(args, flag) and base.config.dtype is other:
            raise ConfigError(
                f"{flag} = True, but the model was loaded in {str(other).removeprefix('torch.')}; load it with "
                f"dtype={asked} or leave out {flag}: the model's dtype decides"
            )
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launched in ("bf16", "fp16", "fp8") and _LAUNCHED_DTYPES.get(launched) is not base.config.dtype:
        say_notes(
            [
                f"accelerate's launcher asks for {launched}: the model's dtype decides, which is {base.config.dtype}"
            ]
        )
    args.mixed_precision = "fp16" if base.config.dtype is torch.float16 else "no"


def require_fp8_gpu(environment: Environment) -> None:
    """Before anything is loaded: whether this machine can multiply in fp8.

    Raises:
        ConfigError: it has no such GPU.
    """
    if environment.capability is None or environment.capability < FP8_CAPABILITY:
        found = environment.device_name
        if environment.capability is not None:
            found += f" has compute capability {'.'.join(map(str, environment.capability))}"
        raise ConfigError(
            f"fp8 = true needs an NVIDIA GPU of compute capability {'.'.join(map(str, FP8_CAPABILITY))} or higher, and the device "
            f"here is {found}. {WITHOUT_FP8}"
        )


def require_fp8(args: SFTConfig, base: nn.Module) -> None:
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
    problems = list(_fp8_problems(args, base))
    if problems:
        raise ConfigError(f"fp8 = true, but {'; and '.join(problems)}. {WITHOUT_FP8}")


def _fp8_problems(args: SFTConfig, base: nn.Module) -> Iterator[str]:
    if not isinstance(base, DecoderForCausalLM):
        yield f"{type(base).__name__} is outside oribi's family table, and transformers' class runs it"
        return
    if base.device.type != "cuda":
        yield "the model is in host memory: load it on the GPU"
    dtype = base.model.last_norm.weight.dtype
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


@contextmanager
def temporarily(target: Any, **values: Any) -> Iterator[None]:
    """Attributes of an object set to other values inside the block."""
    before = {name: vars(target)[name] for name in values if name in vars(target)}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name in values:
            if name in before:
                setattr(target, name, before[name])
            else:
                delattr(target, name)
