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
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from oribi.errors import ModelError
from oribi.lora.attach import attach_lora
from oribi.models.decoder import DecoderForCausalLM, build
from oribi.models.load import load_model
from oribi.models.unwrap import base_model
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


def write_small_model(
    folder: Path, dtype: torch.dtype = torch.float32, deviation: float = 0.1, **sizes: int
) -> Path:
    """A random llama with a byte tokenizer, as a checkpoint in `folder`.

    Args:
        folder: created if needed.
        dtype: of the weights.
        deviation: standard deviation of the weights.
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
    small = {
        "vocab_size": 320, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    config = LlamaConfig(**{**small, **sizes}, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    generator = torch.Generator().manual_seed(3)
    model = build(config, device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if "norm" in name else 0.0
            parameter.normal_(center, deviation, generator=generator)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def plain_model(model: PeftModel) -> PreTrainedModel:
    """The model as its transformers class in float32, with the dequantised NF4 weights."""
    config = copy.deepcopy(base_model(model).config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(model.device)
    source = LoadedModel(model)
    plain.load_state_dict(
        {name: source.read(name, model.device, torch.float32) for name in source.shapes()}, strict=False
    )
    plain.tie_weights()
    return plain


def reference_of(model: PeftModel) -> PeftModel:
    """`plain_model` with PEFT's own adapter and the same LoRA matrices, in training mode."""
    settings = copy.deepcopy(model.peft_config["default"])
    reference = peft.get_peft_model(plain_model(model), settings)
    set_peft_model_state_dict(reference, get_peft_model_state_dict(model))
    return reference.train()
