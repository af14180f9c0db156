"""Axolotl's preference and reward training: `rl`, `reward_model`, the `trl` block, and the forms of rows.

Checked against axolotl-ai-cloud/axolotl (2026-11-25): core/builders/rl.py, core/trainers/dpo, core/trainers/grpo,
utils/schemas/trl.py, prompt_strategies/{dpo,kto,orpo,bradley_terry}.
"""

from typing import Any

from oribi.dialects import preferences
from oribi.dialects.converted import Converted, Handler, idle, is_off, read_elsewhere, refusing, sources_of

STAGES = {"dpo": "dpo", "ipo": "dpo", "orpo": "orpo", "kto": "kto", "grpo": "grpo"}
# the first half of a type -> the template whose words it writes; the second half says which columns
STYLES = {"chatml": "chatml", "llama3": "llama3", "chat_template": None, "bradley_terry": None}
FORMS = (
    "intel",
    "argilla",
    "argilla_chat",
    "icr",
    "prompt_pairs",
    "ultra",
    "default",
    "chat_template",
    "load",
)
# forms whose prompt is in a column that may hold something else elsewhere
PROMPTS = {"intel": "question", "icr": "input", "chat_template": "input"}
# field of an entry -> the column of oribi's that it names, and its name in rows if the entry does not say
FIELDS = {
    "field_prompt": ("prompt", "prompt"), "field_system": ("system", "system"), "field_chosen": ("chosen", "chosen"),
    "field_rejected": ("rejected", "rejected"), "field_completion": ("completion", "completion"),
    "field_label": ("label", "label"),
}  # fmt: skip
FORMATS = ("prompt_format", "chosen_format", "rejected_format", "completion_format")
CHATML = {
    "prompt_format": "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n", "chosen_format": "{chosen}<|im_end|>",
    "rejected_format": "{rejected}<|im_end|>", "completion_format": "{completion}<|im_end|>",
}  # fmt: skip
CHATML_SYSTEM = "<|im_start|>system\n{system}<|im_end|>\n"
OWN_FORM = (
    "write the rows as prompt, chosen and rejected, or prompt, completion and label (docs/data-formats.md)"
)


def put_stage(found: Converted) -> None:
    """The stage that `rl` and `reward_model` ask for, with the loss and the keys of the `trl` block."""
    entries = found.entries
    kind = entries.get("rl")
    if kind in STAGES:
        found.put("stage", STAGES[kind], f"rl = {kind}")
        if kind == "ipo":
            found.put("loss_type", ["ipo"], "rl = ipo")
    elif kind == "simpo":
        found.refuse("rl", preferences.NO_REFERENCE)
    elif not is_off(kind):
        found.refuse("rl", preferences.NO_STAGE)
    elif entries.get("reward_model"):
        found.put("stage", "reward", "reward_model = True")
        if entries.get("num_labels") == 1:
            del entries["num_labels"]
    if preferences.stage_of(found) != "sft":
        _require_one_form(found)
    block = entries.get("trl")
    if isinstance(block, dict):
        entries.pop("trl")
        if block.get("beta") is not None:
            entries.pop("rl_beta", None)
        found.entries = entries = entries | {key: value for key, value in block.items() if value is not None}
    betas = [key for key in ("beta", "rl_beta", "orpo_alpha") if entries.get(key) is not None]
    for key in betas[1:]:
        found.idle[key] = f"{betas[0]} wins"
        del entries[key]


def _require_one_form(found: Converted) -> None:
    """A run writes the prompts of all its data sets in one form."""
    given = found.entries.get("datasets")
    forms: dict[tuple[Any, ...], Any] = {}
    for entry in sources_of(given if isinstance(given, list) else [given] if given else []):
        kind = entry.get("type")
        if isinstance(kind, dict):
            forms.setdefault(("user_defined", *(kind.get(key) for key in FORMATS)), kind)
        else:
            style, _, form = str(kind or "").partition(".")
            own = [entry.get(key) for key in FORMATS]
            forms.setdefault(("llama3" if form == "llama3" else STYLES.get(style, style), *own), kind)
    if len(forms) > 1:
        found.refuse(
            "datasets: type",
            f"one form of prompts for all data sets; {', '.join(map(str, forms.values()))} are several",
        )


def row_entry(found: Converted, entry: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """An entry of `datasets` without what it says of prompts and answers, and the column map that says the same."""
    stage, kind = preferences.stage_of(found), entry.get("type")
    fields = kind if isinstance(kind, dict) else entry
    rest = {key: value for key, value in entry.items() if key not in (*FIELDS, *FORMATS, "type")}
    columns = {
        ours: fields[key] for key, (ours, usual) in FIELDS.items() if fields.get(key) not in (None, usual)
    }
    style, _, form = ("user_defined" if isinstance(kind, dict) else str(kind or "")).partition(".")
    if stage == "grpo" and style:
        found.refuse(
            f"datasets: type = {kind}",
            "a function that rewrites rows; save what it makes as a file, with a column prompt",
        )
    elif style == "user_defined":
        _put_formats(found, fields)
    elif style == "passthrough":
        found.put("dataset_text_field", "prompt", f"type = {kind}")
    elif style in STYLES and (form in FORMS or (style == "bradley_terry" and form == "llama3")):
        template = "llama3" if form == "llama3" else STYLES[style]
        if template:
            found.put("chat_template", template, f"type = {kind}")
        column = PROMPTS.get("icr" if form == "llama3" else form)
        if column == "input":
            columns.setdefault("prompt", column)
    elif style:
        found.refuse(f"datasets: type = {kind}", f"no such form of rows here; {OWN_FORM}")
    return rest, columns


def _put_formats(found: Converted, fields: dict[str, Any]) -> None:
    """Texts as they are, or in ChatML's form; others have no template here."""
    given = {key: str(fields[key]) for key in FORMATS if fields.get(key)}
    plain = {}
    for key, text in given.items():
        ours, usual = FIELDS[f"field_{key.removesuffix('_format')}"]
        plain[key] = text in (f"{{{ours}}}", f"{{{fields.get(f'field_{ours}', usual)}}}")
    chatml = all(text.replace(CHATML_SYSTEM, "") == CHATML[key] for key, text in given.items())
    if all(plain.values()):
        found.put("dataset_text_field", "prompt", "type = user_defined")
    elif chatml:
        found.put("chat_template", "chatml", "type = user_defined, in ChatML's form")
    else:
        found.refuse("datasets: type", f"a prompt format of its own; {OWN_FORM}")


def _only_with_rl(found: Converted, key: str, value: Any) -> None:
    """Keys of TRL's trainers, without one of which they say nothing."""
    if preferences.stage_of(found) == "sft":
        if not is_off(value):
            found.idle[key] = "rl does not ask for such a training"
    else:
        preferences.HANDLERS[key](found, key, value)


HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(preferences.HANDLERS, _only_with_rl),
    **read_elsewhere(("rl", "reward_model")),
    "rl_beta": preferences.of_stage("beta"),
    "orpo_alpha": preferences.of_stage("beta"),
    "kto_desirable_weight": preferences.of_stage("desirable_weight"),
    "kto_undesirable_weight": preferences.of_stage("undesirable_weight"),
    "dpo_label_smoothing": preferences.of_stage("label_smoothing"),
    "dpo_loss_type": preferences.loss_types,
    "dpo_loss_weights": preferences.of_stage("loss_weights"),
    "max_prompt_len": idle(("max_prompt_len",), "prompts are not cut")["max_prompt_len"],
    **refusing(("process_reward_model", "num_labels"), preferences.NO_STAGE),
    **refusing(("dpo_use_weighting", "dpo_norm_loss", "reward_processing_classes"), "oribi's config has nothing like it"),
    **refusing(("rl_adapter_ref_model",), preferences.REFERENCE),
    **idle(("vllm",), preferences.ENGINE),
    **idle(
        ("dpo_generate_during_eval", "dpo_padding_free", "dpo_use_logits_to_keep", "dpo_use_liger_kernel", "simpo_gamma", "cpo_alpha"),
        "it is how oribi works, or what another setting says already",
    ),
}  # fmt: skip
