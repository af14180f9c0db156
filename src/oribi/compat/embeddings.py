"""FastSentenceTransformer: embedding models of the library sentence-transformers, with LoRA through PEFT.

The model, its trainer, its losses and its files are that library's own; oribi loads it in NF4 or 16 bit, attaches LoRA,
merges, and compares what it wrote with the trained model.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType
from peft import get_peft_model as peft_get_peft_model
from torch import nn

from oribi.compat.embedding_files import (
    nf4_settings,
    open_embedder,
    replace_inner,
    require_library,
    save_embedder,
    save_merged_embeddings,
)
from oribi.config import PROJECTIONS
from oribi.environment import detect
from oribi.errors import ConfigError, ExportError
from oribi.models.load_adapter import train_in_float32
from oribi.models.load_settings import LoadSettings, choose_device, choose_dtype
from oribi.save.hub import MERGED_KEYWORDS, push
from oribi.text import did_you_mean, say_notes

POOLING = ("mean", "cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens")
# what BERT and its kin call their projections; a model with others gets LoRA on those that it has
BERT_PROJECTIONS = ("query", "key", "value", "dense")
_WITHOUT_EFFECT = (
    "fix_tokenizer", "random_state", "max_lora_rank", "disable_log_stats", "offload_embedding", "float32_mixed_precision",
    "unsloth_tiled_mlp", "fast_inference", "gpu_memory_utilization", "use_exact_model_name", "resize_model_vocab",
)  # fmt: skip


class FastSentenceTransformer:
    """Loads embedding models for LoRA or full fine-tuning with sentence-transformers."""

    @staticmethod
    def from_pretrained(
        model_name: str,
        max_seq_length: int | None = None,
        dtype: Any = None,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        load_in_16bit: bool = True,
        full_finetuning: bool = False,
        token: str | bool | None = None,
        device_map: Any = None,
        trust_remote_code: bool = False,
        use_gradient_checkpointing: bool | str = False,
        revision: str | None = None,
        pooling_mode: str = "mean",
        for_inference: bool = False,
        **options: Any,
    ) -> Any:
        """An embedding model.

        Args:
            model_name: directory or hub name of a model of sentence-transformers, or of any encoder or decoder of
                transformers, whose tokens are pooled then.
            max_seq_length: tokens of a text; further ones are cut off. None: as the model says.
            dtype: None takes the machine's for LoRA, and float32 for full fine-tuning.
            load_in_4bit: linear layers in NF4. load_in_8bit: refused. load_in_16bit: accepted, the default.
            full_finetuning: every weight is trained, none quantised.
            token, revision, trust_remote_code: for the hub.
            device_map: the one device to load to; None and "auto" mean the machine's.
            use_gradient_checkpointing: whether activations are computed again in the backward pass.
            pooling_mode: how the tokens become one vector, where the model's files do not say it.
            for_inference: no gradients.
            options: `SentenceTransformer`'s own (prompts, truncate_dim, similarity_fn_name, ...).

        Returns:
            A `sentence_transformers.SentenceTransformer`.

        Raises:
            ImportError: sentence-transformers is not installed.
            ConfigError: a keyword is unknown, or arguments contradict each other.
            ModelError: the model cannot be loaded.
        """
        require_library()
        if load_in_8bit:
            raise ConfigError("load_in_8bit=True is not supported: use load_in_4bit=True, or 16 bit")
        if pooling_mode not in POOLING:
            raise ConfigError(f"pooling_mode = {pooling_mode!r}; allowed are {', '.join(POOLING)}")
        notes: list[str] = []
        packs = load_in_4bit and not full_finetuning
        if load_in_4bit and full_finetuning:
            notes.append(
                "full_finetuning trains every weight, so none is quantised (load_in_4bit is ignored)"
            )
        device = choose_device("auto" if device_map in (None, "unsloth") else device_map)
        asked = torch.float32 if dtype is None and full_finetuning else dtype
        settings = LoadSettings(max_seq_length, asked, device, packs, full_finetuning, None)
        dtype = choose_dtype(settings, None, notes)
        loading: dict[str, Any] = {"dtype": dtype}
        if packs:
            loading |= {"quantization_config": nf4_settings(dtype), "device_map": {"": device}}
        hub = {"token": token, "revision": revision, "trust_remote_code": trust_remote_code}
        model = open_embedder(model_name, device, loading, hub, pooling_mode, _own_options(options), notes)
        inner = model.transformers_model
        model.requires_grad_(full_finetuning)
        if max_seq_length is not None:
            _set_length(model, max_seq_length, notes)
        if isinstance(inner, PeftModel):
            if full_finetuning:
                raise ConfigError(f"{model_name} is a LoRA adapter, which full_finetuning=True cannot train")
            inner.set_requires_grad(inner.active_adapter)
            train_in_float32(inner)
        if use_gradient_checkpointing and use_gradient_checkpointing not in ("off", "speed"):
            inner.gradient_checkpointing_enable({"use_reentrant": False})
        if model.preprocess(["a"]).get("modality") == "message":
            notes.append(
                "sentence-transformers puts each text into the tokenizer's chat template, as a user's message"
            )
        say_notes([detect().summary(dtype), "sentence-transformers runs the model, unfused", *notes])
        _bind(model)
        return model.eval() if for_inference else model

    @staticmethod
    def get_peft_model(
        model: Any,
        r: int = 16,
        target_modules: Sequence[str] | str | None = BERT_PROJECTIONS,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        layers_to_transform: Any = None,
        layers_pattern: Any = None,
        use_gradient_checkpointing: bool | str | None = None,
        random_state: int = 3407,
        max_seq_length: int | None = None,
        use_rslora: bool = False,
        modules_to_save: Any = None,
        init_lora_weights: bool | str = True,
        loftq_config: dict[str, Any] | None = None,
        task_type: str = "FEATURE_EXTRACTION",
        **lora_config: Any,
    ) -> Any:
        """The model with trainable LoRA pairs, the rest frozen; arguments as in PEFT's `LoraConfig`.

        Args:
            target_modules: names of layers, of which those that the model has are taken; "all-linear" or None: all.
            use_gradient_checkpointing: None leaves it as it is.
            max_seq_length: accepted and not needed. task_type: None or "FEATURE_EXTRACTION".

        Raises:
            ConfigError: the model is trained whole, has LoRA already, or PEFT refuses an argument.
        """
        inner = model.transformers_model
        if not isinstance(inner, PeftModel) and any(p.requires_grad for p in inner.parameters()):
            say_notes(
                ["get_peft_model: the model was loaded with full_finetuning=True, so no LoRA is attached"]
            )
            return model
        if task_type not in (None, "FEATURE_EXTRACTION", TaskType.FEATURE_EXTRACTION):
            raise ConfigError(
                f"get_peft_model: task_type = {task_type!r}; an embedding model's is 'FEATURE_EXTRACTION'"
            )
        if isinstance(inner, PeftModel):
            raise ConfigError(
                "get_peft_model: the model has a LoRA adapter already; load the base model again"
            )
        if isinstance(lora_config.get("qat_scheme"), str):
            raise ConfigError(
                "get_peft_model: qat_scheme is refused: quantisation-aware training is not supported"
            )
        lora_config.pop("qat_scheme", None)
        devices = [inner.device] if inner.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(random_state)
                config = LoraConfig(
                    r=r, target_modules=_targets(inner, target_modules), lora_alpha=lora_alpha, lora_dropout=lora_dropout,
                    bias=bias, layers_to_transform=layers_to_transform, layers_pattern=layers_pattern,
                    use_rslora=use_rslora, modules_to_save=modules_to_save, init_lora_weights=init_lora_weights,
                    loftq_config=loftq_config or {}, task_type=TaskType.FEATURE_EXTRACTION, **lora_config,
                )  # fmt: skip
                adapted = peft_get_peft_model(inner, config)
        except (ValueError, TypeError, ImportError) as error:
            raise ConfigError(f"get_peft_model: PEFT refuses these LoRA settings: {error}") from error
        train_in_float32(adapted)
        replace_inner(model, inner, adapted)
        if use_gradient_checkpointing is not None:
            on = bool(use_gradient_checkpointing) and use_gradient_checkpointing not in ("off", "speed")
            if on:
                inner.gradient_checkpointing_enable({"use_reentrant": False})
                inner.enable_input_require_grads()
            else:
                inner.gradient_checkpointing_disable()
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        say_notes([f"LoRA of rank {r}: {trained:,} parameters are trained"])
        return model

    @staticmethod
    def for_inference(model: Any) -> Any:
        """Puts the model into inference mode."""
        return model.eval()

    @staticmethod
    def for_training(model: Any, use_gradient_checkpointing: bool | str | None = None) -> Any:
        """Puts the model back into training mode."""
        return model.train()


def _own_options(options: dict[str, Any]) -> dict[str, Any]:
    """The keywords that SentenceTransformer itself takes.

    Raises:
        ConfigError: one is unknown, or asks for what is not done here.
    """
    own = (
        "prompts", "default_prompt_name", "cache_folder", "local_files_only", "processor_kwargs", "config_kwargs",
        "similarity_fn_name", "truncate_dim",
    )  # fmt: skip
    if options.get("qat_scheme") is not None:
        raise ConfigError(
            "from_pretrained: qat_scheme is refused: quantisation-aware training is not supported"
        )
    for name, value in options.items():
        if name not in (*own, *_WITHOUT_EFFECT, "qat_scheme") and value not in (None, False):
            raise ConfigError(f"from_pretrained: unknown keyword {name}{did_you_mean(name, own)}")
    return {name: value for name, value in options.items() if name in own}


def _set_length(model: Any, wanted: int, notes: list[str]) -> None:
    """Sets how many tokens of a text are read, at most as many as the model has positions for."""
    inner = model.transformers_model
    most = getattr(inner.config.get_text_config(), "max_position_embeddings", None)
    table = getattr(getattr(inner, "embeddings", None), "position_embeddings", None)
    if most is not None and getattr(table, "padding_idx", None) is not None:
        most -= table.padding_idx + 1  # XLM-R and its kin count positions from there
    if most is not None and wanted > most:
        notes.append(
            f"max_seq_length {wanted} is beyond the model's {most} positions: {most} tokens of a text are read"
        )
        wanted = most
    model.max_seq_length = wanted


def _targets(inner: nn.Module, asked: Sequence[str] | str | None) -> list[str] | str:
    """Names of the layers that LoRA goes on.

    Raises:
        ConfigError: the model has none of them.
    """
    if asked is None or isinstance(asked, str):
        return asked or "all-linear"
    linear = {name.rpartition(".")[2] for name, m in inner.named_modules() if isinstance(m, nn.Linear)}
    found = [name for name in asked if name.rpartition(".")[2] in linear]
    if found:
        absent = [name for name in asked if name not in found]
        if absent:
            say_notes(
                [f"target_modules: the model has no {', '.join(absent)}; LoRA goes on {', '.join(found)}"]
            )
        return found
    if set(asked) in (set(BERT_PROJECTIONS), set(PROJECTIONS)):
        say_notes(
            [f"target_modules: the model has none of {', '.join(asked)}; LoRA goes on all its linear layers"]
        )
        return "all-linear"
    raise ConfigError(
        f"target_modules: the model has no layer {', '.join(asked)}; it has {', '.join(sorted(linear))}"
    )


def _bind(model: Any) -> None:
    """Gives this instance, and no class, the methods that scripts call on it."""
    model.save_pretrained = partial(save_embedder, model)
    model.save_pretrained_merged = partial(save_merged_embeddings, model)
    model.push_to_hub_merged = partial(_push_merged, model)
    for name in ("save_pretrained_gguf", "push_to_hub_gguf"):
        setattr(model, name, partial(_refuse_gguf, name))


def _push_merged(
    model: Any, repo_id: str, tokenizer: Any = None, save_method: str = "merged_16bit", **keywords: Any
) -> str | None:
    """Save as `save_merged_embeddings` does and upload the folder."""
    return push(save_merged_embeddings, MERGED_KEYWORDS, model, repo_id, tokenizer, save_method, **keywords)


def _refuse_gguf(name: str, *arguments: Any, **keywords: Any) -> None:
    raise ExportError(
        f"{name}: embedding models are not written as GGUF here; call save_pretrained_merged, whose folder sentence-transformers, "
        "transformers, vLLM and text-embeddings-inference load, or llama.cpp's convert_hf_to_gguf.py"
    )
