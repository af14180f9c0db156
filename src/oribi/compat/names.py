"""Every name of Unsloth's public API, and what it is in oribi: one table, which the converter and the documentation read.

Source: names and places as Unsloth 2026.10 exports them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Name:
    """A public name. `home` is the module that has it here, "" where it is refused; `note` says what differs, or why it is refused."""

    home: str
    note: str = ""


# modules of Unsloth's whose names scripts reach through the package; all of oribi's names are in each
PLACES = ("chat_templates", "trainer", "dataprep")

_MODEL = "oribi.compat.language_model"
_TEXT = "text models only; a vision tower is not loaded"
_CLASS = "the same as FastLanguageModel: the checkpoint says its family"
_NOTHING = "nothing to do: TRL's trainers run on oribi's models as they are"
_ENGINE = "there is no vLLM engine; the model's own generate answers"

NAMES = {
    "FastLanguageModel": Name("oribi"),
    "FastModel": Name("oribi"),
    "FastSentenceTransformer": Name("oribi", "needs sentence-transformers: pip install 'oribi[embeddings]'"),
    "FastTextModel": Name(_MODEL, "the same as FastModel"),
    "FastVisionModel": Name(_MODEL, _TEXT),
    **dict.fromkeys(
        ("FastLlamaModel", "FastMistralModel", "FastGemmaModel", "FastGemma2Model", "FastQwen2Model", "FastQwen3Model", "FastQwen3MoeModel", "FastGraniteModel", "FastCohereModel", "FastFalconH1Model"),
        Name(_MODEL, _CLASS),
    ),
    "is_bfloat16_supported": Name("oribi"),
    "is_bf16_supported": Name("oribi"),
    "is_vLLM_available": Name("oribi.compat.reinforcement", "False: " + _ENGINE),
    "vLLMSamplingParams": Name("oribi.compat.reinforcement"),
    "PatchDPOTrainer": Name("oribi.compat.reinforcement", _NOTHING),
    "PatchKTOTrainer": Name("oribi.compat.reinforcement", _NOTHING),
    "PatchFastRL": Name("oribi.compat.reinforcement", _NOTHING),
    "get_chat_template": Name("oribi"),
    "CHAT_TEMPLATES": Name("oribi.compat.reshape", "the names are the same; the templates are oribi's"),
    "standardize_sharegpt": Name("oribi"),
    "standardize_data_formats": Name("oribi"),
    "to_sharegpt": Name("oribi"),
    "apply_chat_template": Name("oribi"),
    "train_on_responses_only": Name("oribi"),
    "add_new_tokens": Name("oribi"),
    "UnslothTrainer": Name("oribi.compat.trainer_names", "the same as SFTTrainer"),
    "UnslothTrainingArguments": Name("oribi.compat.trainer_names", "the same as SFTConfig"),
    "unsloth_train": Name("oribi.compat.trainer_names"),
    "execute_with_time_limit": Name("oribi", "the function runs in this process and raises TimeoutError"),
    "check_python_modules": Name("oribi"),
    "create_locked_down_function": Name("oribi", "the code runs in a process of its own, within limits of time and memory"),
    "print_quantization_methods": Name("oribi"),
    "__version__": Name("oribi"),
    "UnslothVisionDataCollator": Name("", "pictures are not trained on"),
    "QGaloreConfig": Name("", "GaLore is not supported; LoRA with adamw_8bit needs less memory"),
    "remove_special_tokens": Name("", "tokenizer.decode(ids, skip_special_tokens=True) does it"),
    "test_chat_templates": Name("", "`oribi inspect data` shows what a template makes of rows"),
    "test_hf_gguf_equivalence": Name("", "save_pretrained_gguf compares its files with the trained model"),
    "load_correct_tokenizer": Name("", "from_pretrained repairs the tokenizer"),
    "check_tokenizer": Name("", "from_pretrained repairs the tokenizer"),
    "get_tokenizer_info": Name("", "from_pretrained repairs the tokenizer"),
    "fix_sentencepiece_tokenizer": Name("", "from_pretrained repairs the tokenizer"),
    "unsloth_save_model": Name("", "call model.save_pretrained_merged"),
    "save_to_gguf": Name("", "call model.save_pretrained_gguf"),
    "patch_saving_functions": Name("", "loaded models have the saving functions"),
    "create_huggingface_repo": Name("", "call model.push_to_hub_merged"),
    "RawTextDataLoader": Name("", "give the text files to prepare_dataset; overlong='split' makes blocks of them"),
    "TextPreprocessor": Name("", "texts are trained as they are"),
    "SyntheticDataKit": Name("", "it serves a model with vLLM to write rows; write the rows first"),
    "get_gpu_memory_stats": Name("", "each log line has the peak memory"),
    "clear_gpu_memory": Name("", "torch.cuda.empty_cache() does it"),
}  # fmt: skip

# method of a loaded model or tokenizer -> why it is refused
REFUSED_METHODS = {
    "save_pretrained_torchao": "there is no torchao export; save_pretrained_merged with save_method='fp8' or 'w4a16' writes quantised checkpoints for servers, and save_pretrained_gguf GGUF files",
    "save_pretrained_ggml": "call save_pretrained_gguf with save_method='lora', or oribi export --to gguf-adapter",
    "push_to_hub_ggml": "call push_to_hub_gguf",
}

# keyword of from_pretrained -> why nothing comes of it
IGNORED_KEYWORDS = {
    "fast_inference": _ENGINE,
    "use_exact_model_name": "names are never replaced here",
    "gpu_memory_utilization": "it sizes an inference engine that is not used",
    "max_lora_rank": "it sizes an inference engine that is not used",
    "disable_log_stats": "it belongs to an inference engine that is not used",
    "unsloth_vllm_standby": "it belongs to an inference engine that is not used",
    "enforce_eager": "it belongs to an inference engine that is not used",
    "conservativeness": "it belongs to an inference engine that is not used",
    "float8_kv_cache": "it belongs to an inference engine that is not used",
    "load_in_fp8": "there are no 8-bit float weights; they are 16 bit, or NF4 with load_in_4bit=True",
    "offload_embedding": "use_gradient_checkpointing='memory' moves frozen embeddings to host memory",
    "unsloth_tiled_mlp": "use_gradient_checkpointing='memory' bounds the MLP's memory",
    "unsloth_force_compile": "nothing is compiled at run time",
    "fullgraph": "nothing is compiled at run time",
    "return_logits": "logits are returned except for the training loss",
    "attn_implementation": "the decoder chooses its attention backend",
    "device_map_planner_kwargs": "the model lies on one device",
    "low_cpu_mem_usage": "weights are always streamed",
    "max_memory": "the model lies on one device",
    "offload_folder": "the model lies on one device",
    "offload_state_dict": "the model lies on one device",
    "use_cache": "training keeps no cache, generation does",
    "text_only": "only text decoders are trained",
    "random_state": "loading draws no random numbers",
}
# value of an ignored keyword that scripts of other libraries write by default, about which nothing is said
QUIET_DEFAULTS = {
    "max_lora_rank": 64, "gpu_memory_utilization": 0.5, "disable_log_stats": True, "fullgraph": True,
    "random_state": 3407, "use_cache": True,
}  # fmt: skip
# keyword of from_pretrained -> why it is refused when set
REFUSED_KEYWORDS = {
    "qat_scheme": "quantisation-aware training is not supported",
    "target_parameters": "give it to get_peft_model, which trains LoRA on parameters",
    "whisper_language": "speech models are not supported",
    "whisper_task": "speech models are not supported",
    "config": "the checkpoint's config.json is read; change it with rope_scaling and max_seq_length",
    "variant": "weights of a variant are not used",
}
