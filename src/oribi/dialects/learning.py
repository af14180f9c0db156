"""Other programs' words for how pairs begin, how the learning rate falls, and when a training ends."""

import re
from typing import Any

from oribi.config import SETTINGS, STARTS
from oribi.dialects.converted import Converted, Handler, is_off, names, names_of, refusing

_SWITCHES = "the learning rate follows lr_scheduler_type alone, with lr_scheduler_kwargs"


def _plain(setting: str) -> Handler:
    """A key that says what a setting says, and nothing where it is off."""

    def handle(found: Converted, key: str, value: Any) -> None:
        if value is not None and (not is_off(value) or SETTINGS[setting].kind in (bool, float)):
            found.put(setting, value, key)

    return handle


def least_rate(found: Converted, key: str, value: Any) -> None:
    """Axolotl's floor under the cosine, as a share of the peak."""
    if not value:
        return
    if (found.entries.get("lr_scheduler") or "cosine") != "cosine":
        found.idle[key] = "Axolotl reads it with lr_scheduler: cosine alone"
        return
    found.values["lr_scheduler_type"] = "cosine_with_min_lr"
    found.notes.append(f"{key} = {value} read as lr_scheduler_type = cosine_with_min_lr")
    found.put("lr_scheduler_kwargs", {"min_lr_rate": value}, key)


def start_of_pairs(found: Converted, key: str, value: Any) -> None:
    """How pairs begin, in PEFT's words."""
    word = str(value).lower() if isinstance(value, bool) else str(value)
    if value is None:
        return
    if word in STARTS or re.fullmatch(SETTINGS["init_lora_weights"].pattern, word):
        found.put("init_lora_weights", value, key)
    else:
        found.refuse(
            key, "oribi starts no pairs so; eva begins with your rows, loftq with what NF4 rounds off"
        )


def optimizer_arguments(found: Converted, key: str, value: Any) -> None:
    """Arguments of the optimizer, as a mapping or as transformers writes them."""
    if not is_off(value):
        found.put("optim_args", SETTINGS["optim_args"].check(value)[0], key)


def smoothing(found: Converted, key: str, value: Any) -> None:
    """Smoothing of labels, which the trainers of other stages leave out."""
    if value and found.values.get("stage", "sft") == "sft":
        found.put("label_smoothing_factor", value, key)
    elif value:
        found.idle[key] = "this stage does not use it"


def pissa(found: Converted, key: str, value: Any) -> None:
    """LLaMA-Factory's PiSSA, with its number of iterations."""
    if value:
        passes = found.entries.get("pissa_iter", 16)
        found.put(
            "init_lora_weights", "pissa" if passes == -1 else f"pissa_niter_{passes}", f"{key} = {value}"
        )
        packed = found.entries.get("quantization_bit") == 4
        if not packed and not found.entries.get("pissa_convert"):
            found.differences.append(
                "PiSSA: the adapter is PEFT's, which takes its part out of the base wherever it is loaded; LLaMA-Factory saves the "
                "changed base beside it"
            )


def loftq(found: Converted, key: str, value: Any) -> None:
    """LoftQ: pairs that begin with what packing rounds off."""
    if is_off(value):
        return
    given = value if isinstance(value, dict) else {}
    if given.get("loftq_bits", 4) != 4 or given.get("loftq_iter", 1) != 1:
        found.refuse(key, "oribi's LoftQ is one iteration over NF4, which leaves the base as it is")
        return
    found.put("load_in_4bit", True, key)
    found.put("init_lora_weights", "loftq", key)


def new_tokens(found: Converted, key: str, value: Any) -> None:
    """Tokens that are added to the tokenizer."""
    if not is_off(value):
        found.put("new_tokens", names_of(value), key)
        whole = {"embed_tokens", "lm_head"} & set(found.values.get("modules_to_save") or ())
        if not whole:
            found.differences.append("new_tokens: their rows are trained and saved with the adapter")


HANDLERS: dict[str, Handler] = {
    "load_best_model_at_end": _plain("load_best_model_at_end"),
    "early_stopping_patience": _plain("early_stopping_patience"),
    "early_stopping_steps": _plain("early_stopping_patience"),
    "lr_scheduler_kwargs": _plain("lr_scheduler_kwargs"),
    "optim_args": optimizer_arguments,
    "label_smoothing_factor": smoothing,
    "loraplus_lr_ratio": _plain("loraplus_lr_ratio"),
    "adam_beta1": _plain("adam_beta1"),
    "adam_beta2": _plain("adam_beta2"),
    "adam_epsilon": _plain("adam_epsilon"),
    "cosine_min_lr_ratio": least_rate,
    "lora_rank_pattern": _plain("rank_pattern"),
    "lora_alpha_pattern": _plain("alpha_pattern"),
    "lora_target_parameters": names("target_parameters"),
    "loftq_config": loftq,
    "use_loftq": loftq,
    "chat_template_kwargs": _plain("chat_template_kwargs"),
    **refusing(("cosine_constant_lr_ratio", "lr_quadratic_warmup", "lr_groups", "embedding_lr_scale"), _SWITCHES),
}  # fmt: skip
