"""FastLanguageModel and FastModel: load, attach LoRA, switch between training and inference, save.

The names and keywords are those that fine-tuning scripts already call. A keyword that has no meaning here is accepted
with a note, one that would silently change the result is refused, and an unknown one is an error.
"""

import inspect
import os
from pathlib import Path
from types import MethodType
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from oribi.compat.names import IGNORED_KEYWORDS, QUIET_DEFAULTS, REFUSED_KEYWORDS
from oribi.compat.reinforcement import fast_generate, load_lora, save_lora
from oribi.config import PROJECTIONS
from oribi.environment import detect
from oribi.errors import ConfigError
from oribi.lora.attach import attach_lora, set_checkpointing, switch_checkpointing
from oribi.lora.targets import layer_projections
from oribi.models.files import HubOptions
from oribi.models.load import load_model
from oribi.models.load_adapter import load_adapter
from oribi.models.open import open_model
from oribi.models.unwrap import base_model
from oribi.save.four_bits import kept_by_auto
from oribi.save.requantised import Requantiser
from oribi.text import did_you_mean, say_notes

Model = PreTrainedModel | PeftModel


class FastLanguageModel:
    """Loads causal language models for LoRA or full fine-tuning."""

    @staticmethod
    def from_pretrained(
        model_name: str,
        max_seq_length: int | None = 2048,
        dtype: Any = None,
        load_in_4bit: bool | None = None,
        load_in_8bit: bool = False,
        load_in_16bit: bool = False,
        full_finetuning: bool = False,
        token: str | bool | None = None,
        device_map: Any = "sequential",
        rope_scaling: dict[str, Any] | None = None,
        fix_tokenizer: bool = True,
        trust_remote_code: bool = False,
        use_gradient_checkpointing: bool | str = "auto",
        resize_model_vocab: int | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> tuple[Model, PreTrainedTokenizerBase]:
        """A model and its tokenizer; arguments as `oribi.models.load.load_model`.

        Args:
            use_gradient_checkpointing: as in `get_peft_model`, which overrides it.
            options: rarer settings of `oribi.models.load_settings`, and keywords of other libraries: those without
                meaning here are noted, those that would change the result are refused.

        Raises:
            ConfigError: a keyword is unknown or refused, or arguments contradict each other.
            ModelError: the model cannot be loaded.
        """
        if options.get("load_in_fp8") and load_in_4bit is None:
            load_in_4bit = False  # nobody who asks for 8 bits expects 4
        notes = _read_auto_model(options)
        notes += _sort_out(options)
        older_name = options.pop("torch_dtype", None)
        if options.get("keep_in_16bit") in ("auto", ["auto"]):
            opened = open_model(model_name, HubOptions(token, revision, trust_remote_code=trust_remote_code))
            options["keep_in_16bit"], found = kept_by_auto(opened, detect().device, detect().dtype)
            notes += found
        model, tokenizer = load_model(
            model_name,
            max_seq_length=max_seq_length,
            dtype=older_name if dtype is None else dtype,
            load_in_4bit=load_in_4bit,
            load_in_8bit=load_in_8bit,
            load_in_16bit=load_in_16bit,
            full_finetuning=full_finetuning,
            token=token,
            device_map="auto" if device_map == "unsloth" else device_map,
            rope_scaling=rope_scaling,
            trust_remote_code=trust_remote_code,
            revision=revision,
            fix_tokenizer=fix_tokenizer,
            resize_model_vocab=resize_model_vocab,
            **options,
        )
        if model.oribi.merges_codes:
            Requantiser(model).quantise()
        set_checkpointing(base_model(model), use_gradient_checkpointing)
        model.oribi.notes += notes
        say_notes([detect().summary(model.dtype), *model.oribi.notes])
        base_model(model).loaded_tokenizer = tokenizer
        tokenizer.tokenizer = tokenizer  # scripts for image-text models take the tokenizer out of a processor
        _bind(model)
        return model, tokenizer

    @staticmethod
    def get_peft_model(
        model: Model,
        r: int = 16,
        target_modules: Any = PROJECTIONS,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        layers_to_transform: Any = None,
        layers_pattern: Any = None,
        finetune_last_n_layers: int | None = None,
        use_gradient_checkpointing: bool | str = "auto",
        random_state: int = 3407,
        max_seq_length: int = 2048,
        use_rslora: bool = False,
        modules_to_save: Any = None,
        init_lora_weights: bool | str = True,
        loftq_config: dict[str, Any] | None = None,
        temporary_location: str | None = None,
        qat_scheme: Any = None,
        **lora_config: Any,
    ) -> Model:
        """The model with trainable LoRA pairs; arguments as `oribi.lora.attach.attach_lora`.

        Args:
            max_seq_length, temporary_location: accepted and not needed.
            qat_scheme: refused.
        """
        if qat_scheme is not None:
            raise ConfigError(f"get_peft_model: qat_scheme is refused: {REFUSED_KEYWORDS['qat_scheme']}")
        before = len(model.oribi.notes)
        peft_model = attach_lora(
            model,
            r=r,
            target_modules=target_modules,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            bias=bias,
            layers_to_transform=layers_to_transform,
            layers_pattern=layers_pattern,
            finetune_last_n_layers=finetune_last_n_layers,
            use_gradient_checkpointing=use_gradient_checkpointing,
            random_state=random_state,
            use_rslora=use_rslora,
            modules_to_save=modules_to_save,
            init_lora_weights=init_lora_weights,
            loftq_config=loftq_config,
            **lora_config,
        )
        say_notes(peft_model.oribi.notes[before:])
        _bind(peft_model)
        return peft_model

    @staticmethod
    def for_inference(model: Model) -> Model:
        """Puts the model into inference mode: no dropout, no checkpointing, cached generation."""
        model.eval()
        base = base_model(model)
        switch_checkpointing(base, on=False)
        base.config.use_cache = True
        return model

    @staticmethod
    def for_training(model: Model, use_gradient_checkpointing: bool | str | None = None) -> Model:
        """Puts the model back into training mode, with the checkpointing it had or another."""
        model.train()
        base = base_model(model)
        choice = (
            base.oribi.checkpointing if use_gradient_checkpointing is None else use_gradient_checkpointing
        )
        set_checkpointing(base, choice)
        return model


class FastModel(FastLanguageModel):
    """FastLanguageModel with the keywords that scripts for multimodal models pass; the text decoder is trained."""

    @staticmethod
    def get_peft_model(
        model: Model,
        r: int = 16,
        target_modules: Any = None,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        finetune_vision_layers: bool | None = None,
        finetune_language_layers: bool = True,
        finetune_attention_modules: bool = True,
        finetune_mlp_modules: bool = True,
        finetune_audio_layers: bool = False,
        task_type: str | None = None,
        **arguments: Any,
    ) -> Model:
        """The model with trainable LoRA pairs.

        Args:
            finetune_attention_modules, finetune_mlp_modules: which of the projections, where `target_modules` is None or
                "all-linear".
            finetune_language_layers: must be on, no others are trained. finetune_vision_layers: True is answered with a note.
            finetune_audio_layers: refused. task_type: None, or what the model is loaded for, as in `attach_lora`.
            arguments: as in `FastLanguageModel.get_peft_model`.

        Raises:
            ConfigError: nothing would be trained, or something that is not loaded.
        """
        if not finetune_language_layers or finetune_audio_layers:
            raise ConfigError(
                "get_peft_model: only the layers of the text decoder can be trained, those for images and sound cannot"
            )
        if finetune_vision_layers and model.oribi.config.get_text_config() is not model.oribi.config:
            say_notes(
                [
                    "finetune_vision_layers=True: only the text decoder is trained; the layers for images stay as they are"
                ]
            )
        if target_modules is None or target_modules == "all-linear":
            if model.oribi.fused and finetune_attention_modules and finetune_mlp_modules:
                target_modules = list(PROJECTIONS)
            else:
                base = base_model(model)
                target_modules = layer_projections(base, finetune_attention_modules, finetune_mlp_modules)
            if not target_modules:
                raise ConfigError(
                    "get_peft_model: finetune_attention_modules and finetune_mlp_modules are both off"
                )
        return FastLanguageModel.get_peft_model(
            model, r=r, target_modules=target_modules, lora_alpha=lora_alpha, lora_dropout=lora_dropout, bias=bias,
            task_type=task_type, **arguments,
        )  # fmt: skip


FastTextModel = FastVisionModel = FastModel
# scripts that name a family: the checkpoint says it
FastLlamaModel = FastMistralModel = FastGemmaModel = FastGemma2Model = FastLanguageModel
FastQwen2Model = FastQwen3Model = FastQwen3MoeModel = FastLanguageModel
FastGraniteModel = FastCohereModel = FastFalconH1Model = FastLanguageModel


def _read_auto_model(options: dict[str, Any]) -> list[str]:
    """Reads a class of transformers that scripts name: one of a sequence classifier asks for one.

    Raises:
        ConfigError: it is neither a classifier's nor a language model's.
    """
    kind = options.pop("auto_model", None)
    name = getattr(kind, "__name__", kind)
    if kind is None:
        return []
    if str(name).endswith("ForSequenceClassification"):
        options["classifies"] = True
        return []
    images = ("AutoModelForImageTextToText", *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values())
    if str(name).endswith("ForCausalLM") or name in images:
        return [f"auto_model={name} has no effect: the checkpoint's config.json says the class"]
    raise ConfigError(
        f"from_pretrained: auto_model={name} is refused: oribi loads language models and sequence classifiers; embedding models "
        "are loaded by FastSentenceTransformer"
    )


def loading_keywords() -> set[str]:
    """Keywords that `from_pretrained` reads."""
    from oribi.models.load_settings import RARE_OPTIONS

    named = {
        p
        for call in (load_model, FastLanguageModel.from_pretrained)
        for p in inspect.signature(call).parameters
    }
    return {*RARE_OPTIONS, "torch_dtype", "auto_model", *named} - {"options"}


def _sort_out(options: dict[str, Any]) -> list[str]:
    """Drops keywords without effect from `options` and returns notes on them; raises over refused and unknown ones."""
    known, notes = loading_keywords(), []
    for name, value in list(options.items()):
        if name in REFUSED_KEYWORDS:
            if value not in (None, False):
                raise ConfigError(f"from_pretrained: {name}={value!r} is refused: {REFUSED_KEYWORDS[name]}")
            options.pop(name)
        elif name in IGNORED_KEYWORDS:
            if value not in (None, False, QUIET_DEFAULTS.get(name)):
                notes.append(f"{name}={value!r} has no effect: {IGNORED_KEYWORDS[name]}")
            options.pop(name)
        elif name not in known:
            hint = did_you_mean(name, {*known, *IGNORED_KEYWORDS})
            raise ConfigError(f"from_pretrained: unknown keyword {name}{hint}")
    return notes


def _bind(model: Model) -> None:
    """Gives this instance, and no class, the methods that scripts call on a loaded model."""
    for method in (_save_merged, _push_merged, _save_gguf, _push_gguf):
        setattr(model, method.__name__.replace("_save_", "save_pretrained_").replace("_push_", "push_to_hub_"),
                MethodType(method, model))  # fmt: skip
    if isinstance(model, PeftModel):
        from oribi.save.one_writer import by_first_process

        model.save_pretrained = MethodType(by_first_process(_save_adapter), model)
        model.load_adapter = MethodType(load_adapter, model)
        model.save_lora = MethodType(save_lora, model)
        model.load_lora = MethodType(load_lora, model)
    model.fast_generate = MethodType(fast_generate, model)
    model.for_inference = MethodType(FastLanguageModel.for_inference, model)
    model.for_training = MethodType(FastLanguageModel.for_training, model)


def _save_adapter(
    self: PeftModel, save_directory: str, safe_serialization: bool = True, **options: Any
) -> None:
    """PEFT's `save_pretrained` of this model, with the record of its base, read back; see `oribi.save.adapter_files`."""
    from oribi.save.adapter_files import write_adapter

    untested = write_adapter(self, save_directory, safe_serialization=safe_serialization, **options)
    say_notes([f"not tested: {line}" for line in untested])


def _save_merged(
    self: Model, save_directory: str, tokenizer: Any = None, save_method: str = "merged_16bit", **options: Any
) -> Any:
    """`oribi.save.save_merged` of this model."""
    from oribi.save import save_merged

    return save_merged(self, save_directory, tokenizer, save_method, **options)


def _push_merged(
    self: Model, repo_id: str, tokenizer: Any = None, save_method: str = "merged_16bit", **options: Any
) -> Any:
    """`oribi.save.push_merged` of this model."""
    from oribi.save import push_merged

    return push_merged(self, repo_id, tokenizer, save_method, **options)


def _save_gguf(
    self: Model, save_directory: str, tokenizer: Any = None, quantization_method: Any = "q8_0", **options: Any
) -> Any:
    """`oribi.save.save_gguf` of this model into `<save_directory>_gguf`, where scripts that make this call look."""
    from oribi.save import save_gguf

    folder = f"{os.path.normpath(save_directory)}_gguf"
    written = save_gguf(self, folder, tokenizer, quantization_method=quantization_method, **options)
    if written is None:
        return None
    if tokenizer is not None and written.get("modelfile_location"):
        tokenizer._ollama_modelfile = Path(written["modelfile_location"]).read_text(encoding="utf-8")
    return {**written, "save_directory": str(save_directory)}


def _push_gguf(
    self: Model, repo_id: str, tokenizer: Any = None, quantization_method: Any = "q8_0", **options: Any
) -> Any:
    """`oribi.save.push_gguf` of this model."""
    from oribi.save import push_gguf

    return push_gguf(self, repo_id, tokenizer, quantization_method=quantization_method, **options)
