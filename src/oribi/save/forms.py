"""Which forms a model with experts is saved in: a run asks before it loads the model, and the save itself asks again."""

from transformers import PretrainedConfig

from oribi.errors import ConfigError
from oribi.families import family_of

COMPRESSED = ("fp8", "w4a16")
PER_EXPERT = "lora_per_expert"  # as some servers read experts: a pair for each
GROUPS = (
    128,
    64,
    32,
)  # columns that share a scale of w4a16: sizes that vLLM's kernels take, the usual one first
# how configs of models outside the family table say how many experts they have
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def require_form(config: PretrainedConfig, form: str) -> None:
    """Raise unless the experts of a model, if it has any, can be saved so.

    Args:
        config: of the model, or of its text decoder. form: of `save.merged.METHODS`.

    Raises:
        ConfigError: no program reads them so; says what to take instead.
    """
    config = config.get_text_config()
    family = family_of(config)
    rules = None if family is None else family.experts
    count = max(getattr(config, name, 0) or 0 for name in (_COUNTS if rules is None else (rules.count,)))
    if count < 2:
        return
    if form == "merged_4bit" and rules is not None:
        raise ConfigError(
            "save_method = 'merged_4bit': transformers packs no stacks of experts, which are most of this model; give "
            "'merged_16bit', which oribi packs while it loads, or write a GGUF file"
        )
    if form == PER_EXPERT and (rules is None or rules.stored != "each"):
        raise ConfigError(
            "save_method = 'lora_per_expert': it is for models with one adapter whose checkpoints hold each expert by itself; "
            "programs read other models' experts as 'lora' writes them"
        )
    if form in COMPRESSED and rules is None:
        raise ConfigError(
            f"save_method = {form!r}: {config.model_type} is outside oribi's family table, and its experts lie in stacks that are not "
            "quantised for servers here; give 'merged_16bit', or 'lora'"
        )
    if form in COMPRESSED and rules.biases:
        raise ConfigError(
            f"save_method = {form!r}: vLLM and SGLang read {config.model_type}'s experts in MXFP4 or in 16 bits alone; give "
            "'merged_16bit', or 'lora' and serve the adapter on the MXFP4 checkpoint"
        )
    if form == "w4a16":
        odd = [n for n in (config.hidden_size, getattr(config, rules.size)) if n % GROUPS[-1]]
        if odd:
            raise ConfigError(
                f"save_method = 'w4a16': the experts have rows of {odd[0]} values, which are no whole groups of {GROUPS[-1]}; give 'fp8'"
            )
