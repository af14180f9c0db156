"""What the self-test trains and saves: a model in NF4 with an adapter, rows, and the same model in transformers and PEFT."""

import copy
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from datasets import Dataset
from peft import PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from oribi.errors import ModelError
from oribi.gguf.file import Type
from oribi.gguf.quantize import encode
from oribi.kernels.mxfp4 import MX_BLOCK, from_blocks
from oribi.lora.attach import attach_lora
from oribi.models.decoder import DecoderForCausalLM, build
from oribi.models.expert_tensors import stacked
from oribi.models.load import load_model
from oribi.save.adapter_check import plain_base
from oribi.save.base import locate_here
from oribi.save.trained import LoadedModel

LONGEST = 48  # tokens of a row
RANK = 32  # gives A of the small model 4096 values, the fewest for which the optimizer uses 8 bits
DATA_SEED = 20


@dataclass(frozen=True)
class Subject:
    """A model on disk and where to run it.

    Args:
        path: anything that `load_model` takes.
        device: "cpu", "cuda", or None for the machine's best.
    """

    path: str
    device: str | None = None

    def load(self, dtype: str = "float32") -> tuple[PeftModel, Any]:
        """The model in NF4, computing in `dtype`, with LoRA whose B is not zero (with B = 0, A has no gradient)."""
        model, tokenizer = load_model(
            self.path, dtype=dtype, device_map=self.device, max_seq_length=4 * LONGEST
        )
        if not isinstance(model, DecoderForCausalLM):
            raise ModelError(
                f"{self.path} runs as transformers' {type(model).__name__}; the self-test is for models of oribi's "
                "families"
            )
        model = attach_lora(model, r=RANK, lora_alpha=RANK, use_gradient_checkpointing=False)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.02, generator=generator))
        return model, tokenizer

    def rows(self, count: int, vocab_size: int) -> Dataset:
        """Rows of random ids and lengths with untrained prompts; the shortest row has a single target."""
        draw = random.Random(DATA_SEED)
        rows = []
        for index in range(count):
            length = 2 if index == 1 else draw.randint(6, LONGEST)
            ids = [draw.randrange(vocab_size) for _ in range(length)]
            prompt = draw.randint(1, max(length // 2, 1))
            rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
        return Dataset.from_list(rows)


# model type -> fields of the config of its small model, beside `_SIZES`
FAMILIES_TESTED: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 256},
    # experts packed in NF4, each matrix by itself in the checkpoint
    "qwen3_moe": {
        "intermediate_size": 256, "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 64,
        "norm_topk_prob": True, "mlp_only_layers": [0],
    },
    # experts in MXFP4, in stacks with biases; attention with sinks
    "gpt_oss": {
        "intermediate_size": 128, "head_dim": 32, "sliding_window": 16, "num_local_experts": 8, "num_experts_per_tok": 3,
        "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4, "truncate": False,
        },
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    },
}  # fmt: skip
_SIZES = {
    "vocab_size": 320, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def write_small_model(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    deviation: float = 0.1,
    model_type: str = "llama",
    **sizes: Any,
) -> Path:
    """A random model with a byte tokenizer, as a checkpoint in `folder` in the layout of its family's releases.

    Args:
        folder: created if needed.
        dtype: of the weights.
        deviation: standard deviation of the weights.
        model_type: one of `FAMILIES_TESTED`.
        sizes: fields of the config that differ from those of the usual two-layer model.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "<s>", "</s>", *alphabet]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    config = AutoConfig.for_model(model_type, **{**_SIZES, **FAMILIES_TESTED[model_type], **sizes})
    generator = torch.Generator().manual_seed(3)
    model = build(config, device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if "norm" in name else 0.0
            parameter.normal_(center, deviation, generator=generator)
    source = stacked(LoadedModel(model.to(dtype)), model)
    tensors = {name: source.read(name, torch.device("cpu"), dtype) for name in source.shapes()}
    if hasattr(config, "quantization_config"):
        tensors = _in_mxfp4(tensors)
    model.save_pretrained(folder, state_dict=tensors)
    tokenizer.save_pretrained(folder)
    return folder


def _in_mxfp4(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors with codes and scales in place of its stacks of experts [E, K, N]."""
    packed = {}
    for name, tensor in tensors.items():
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            packed[name] = tensor
            continue
        codes, scales = from_blocks(torch.from_numpy(encode(tensor.mT.float(), Type.MXFP4)))
        packed[f"{name}_blocks"] = codes.unflatten(-1, (-1, MX_BLOCK // 2)).contiguous()
        packed[f"{name}_scales"] = scales.contiguous()
    return packed


def plain_model(model: PeftModel) -> PreTrainedModel:
    """The model as its transformers class in float32, with the values of its packed weights."""
    location, _ = locate_here(model, model.oribi.name_or_path)
    return plain_base(model, location, model.oribi, torch.float32, model.device)


def reference_of(model: PeftModel) -> PeftModel:
    """`plain_model` with PEFT's own adapter and the same LoRA matrices, in training mode."""
    settings = copy.deepcopy(model.peft_config["default"])
    plain = plain_model(model)
    plain.config._experts_implementation = "eager"  # the others have no float64
    reference = peft.get_peft_model(plain, settings)
    set_peft_model_state_dict(reference, get_peft_model_state_dict(model))
    return reference.train()
