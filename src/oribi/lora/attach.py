"""STEP 3: LoRA on a loaded model, through PEFT: which layers, which arguments, in float32, the same on every run."""

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

import torch
from peft import LoftQConfig, LoraConfig, PeftModel, TaskType
from peft import get_peft_model as peft_get_peft_model
from transformers import PreTrainedModel

from oribi.config import CHECKPOINTING, OLDER_CHECKPOINTING, PROJECTIONS
from oribi.errors import ConfigError
from oribi.families import family_of
from oribi.lora.eva import PENDING, eva_settings
from oribi.lora.expert_targets import resolve_all, why_layers_only
from oribi.lora.settings import refuse_settings
from oribi.lora.starts import packed_settings, start_on_packed
from oribi.lora.targets import has_head, is_tied, resolve_layers
from oribi.models.identity import AS_IN_FILE
from oribi.models.labels import HEADS
from oribi.models.load_adapter import train_in_float32, without_word_on_ties
from oribi.models.unwrap import base_model
from oribi.text import did_you_mean

_NEEDS_DATA = ("corda", "lora_ga")
_MOVES_BASE = ("pissa", "olora", "loftq")


def attach_lora(
    model: PreTrainedModel | PeftModel,
    r: int = 16,
    target_modules: Sequence[str] | str | None = PROJECTIONS,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    bias: str = "none",
    layers_to_transform: Sequence[int] | int | None = None,
    layers_pattern: str | Sequence[str] | None = None,
    finetune_last_n_layers: int | None = None,
    use_gradient_checkpointing: bool | str = "auto",
    random_state: int = 3407,
    use_rslora: bool = False,
    modules_to_save: Sequence[str] | None = None,
    init_lora_weights: bool | str = True,
    loftq_config: dict[str, Any] | None = None,
    **lora_config: Any,
) -> PreTrainedModel | PeftModel:
    """Puts trainable LoRA pairs on a model's linear layers; the rest is frozen.

    Args:
        model: as loaded. A model loaded for full fine-tuning is returned as it is; one that has LoRA already is returned
            if the arguments are the same.
        r: rank, at least 1.
        target_modules: names of layers, of which those that the model has are taken, a regular expression over full names,
            "all-linear" or None (the seven projections). An MLP's projections are stacks in a model with experts, which get pairs by
            target_parameters. embed_tokens is trained whole (moved to `modules_to_save`).
        lora_alpha: scale is lora_alpha / r, or / sqrt(r) with use_rslora.
        lora_dropout: probability in [0, 1).
        bias: "none", "all" or "lora_only": which biases are trained.
        layers_to_transform, layers_pattern: as in PEFT. finetune_last_n_layers: the last N only.
        use_gradient_checkpointing: which activations are kept: "auto" (what fits in free memory), "memory" (the least),
            "balanced", "speed" or "off" (all). Older names, such as True, False and "unsloth", are read as these.
        random_state: seed of the LoRA matrices; the global random state is left as it was.
        use_rslora: rank-stabilised scaling. modules_to_save: modules trained whole and saved with the adapter, in float32.
        init_lora_weights: True, False, "gaussian"; "eva", from the rows of `SFTTrainer`; "loftq", "pissa" and "pissa_niter_N",
            which leave an NF4 base as it is (`start_on_packed`); on a 16-bit base also "orthogonal" and "olora".
        loftq_config: settings of LoftQ on a 16-bit base.
        lora_config: further fields of `peft.LoraConfig`: use_dora, rank_pattern, alpha_pattern, target_parameters, ...
            A task_type must be that of the model: "SEQ_CLS" of one that was loaded with labels, else "CAUSAL_LM".

    Returns:
        The PeftModel, its LoRA weights float32 and requiring gradients.

    Raises:
        ConfigError: an argument is out of range or unknown, a target names no layer, or the model has another LoRA.
    """
    source, base, notes = model.oribi, base_model(model), []
    if source.full_finetuning:
        source.notes.append("get_peft_model: loaded with full_finetuning=True, so no LoRA is attached")
        return model
    _check_range(r, lora_alpha, lora_dropout, bias, use_gradient_checkpointing)
    _check_fields(lora_config, init_lora_weights, source)
    lora_config |= eva_settings(init_lora_weights, lora_config.pop("eva_config", None))
    start = _start_in_peft(init_lora_weights, loftq_config, source)
    on_packed = None if start == init_lora_weights else str(init_lora_weights)
    task = _task(source, lora_config.pop("task_type", None))
    tied = is_tied(base) and lora_config.get("ensure_weight_tying") is not False
    layers = resolve_layers(base, layers_to_transform, finetune_last_n_layers)
    why = why_layers_only(lora_dropout, lora_config.get("use_dora", False), init_lora_weights)
    targets, saved = resolve_all(base, target_modules, modules_to_save, notes, tied, layers, why, lora_config)
    if task == TaskType.SEQ_CLS:
        saved = _with_heads(base, saved, lora_config)
    refuse_settings(base, targets, lora_config)
    settings = packed_settings(on_packed, {
        "r": r, "lora_alpha": lora_alpha, "target_modules": targets, "lora_dropout": lora_dropout, "bias": bias,
        "layers_to_transform": layers, "layers_pattern": layers_pattern, "use_rslora": use_rslora, "modules_to_save": saved,
        "init_lora_weights": start, "loftq_config": _loftq(start, loftq_config), "task_type": task,
        "revision": source.revision, **lora_config,
    })  # fmt: skip
    if isinstance(model, PeftModel):
        _check_same(model, settings)
    else:
        _train_tables(base, settings, notes)
        model = _attach(base, settings, random_state, notes, on_packed)
        source.notes += notes
    set_checkpointing(base, use_gradient_checkpointing)
    return model


def _task(source: Any, asked: str | None) -> TaskType:
    """The kind of model that PEFT is told.

    Raises:
        ConfigError: the caller names another kind than was loaded.
    """
    task = TaskType.CAUSAL_LM if source.labels is None else TaskType.SEQ_CLS
    if asked not in (None, task):
        raise ConfigError(
            f"get_peft_model: task_type is {str(asked)!r}, and the model is loaded for {task.value!r}; load it with num_labels= "
            "to classify, without to continue texts, and embedding models by FastSentenceTransformer"
        )
    return task


def _with_heads(base: PreTrainedModel, saved: Sequence[str] | None, lora_config: dict[str, Any]) -> list[str]:
    """Modules to save of a classifier: PEFT adds the heads; what else is new would otherwise be random where it is loaded."""
    if any(name.startswith(tuple(f"{head}." for head in HEADS)) for name, _ in base.named_modules()):
        # layers of a head that is trained whole need no pairs of their own
        lora_config.setdefault("exclude_modules", rf"({'|'.join(HEADS)})\..*")
    others = [name for name in base.oribi.new_modules if name.partition(".")[0] not in HEADS]
    return list(dict.fromkeys([*(saved or ()), *others, *reversed(HEADS)]))


def _train_tables(base: PreTrainedModel, settings: dict[str, Any], notes: list[str]) -> None:
    """Adds what PEFT must know of tied embeddings, and of rows that `add_new_tokens` made."""
    saved, tied = {name.rpartition(".")[2] for name in settings["modules_to_save"] or ()}, is_tied(base)
    if tied and saved & {"embed_tokens", "lm_head"} and settings.setdefault("ensure_weight_tying", True):
        notes.append(
            "embed_tokens and lm_head are one matrix in this model (tied): it is trained whole, once, and stays one matrix in "
            "every file"
        )
    elif tied and (saved & {"embed_tokens", "lm_head"} or has_head(settings["target_modules"])):
        family = family_of(base.config.get_text_config())
        no_gguf = family is not None and family.gguf is not None and family.gguf.head == "tied"
        notes.append(
            "embed_tokens and lm_head are one matrix in this model (tied), and only one of them, or each by itself, is trained: "
            "a merged model holds two matrices" + ", and no GGUF file can hold it" * no_gguf
        )
    new_tokens = base.oribi.new_token_ids
    if new_tokens:
        given = settings.get("trainable_token_indices") or {}
        given = given if isinstance(given, dict) else {"embed_tokens": given}
        trained = {*saved, *(("lm_head",) if has_head(settings["target_modules"]) else ())}
        if tied:  # PEFT finds a tied head by itself
            trained |= {"lm_head"} if not settings.get("ensure_weight_tying") else {"embed_tokens", "lm_head"}
        tables = [table for table in ("embed_tokens", "lm_head") if table not in trained]
        rows = {
            table: sorted({*given.get(table, ()), *new_tokens}) for table in dict.fromkeys([*given, *tables])
        }
        settings["trainable_token_indices"] = rows or None
        if tables:
            notes.append(
                f"the rows of the {len(new_tokens)} added tokens are trained and saved with the adapter"
            )
    rows, family = settings.get("trainable_token_indices"), family_of(base.config)
    if rows and (not isinstance(rows, dict) or "embed_tokens" in rows) and family and family.embedding_norm:
        raise ConfigError(
            f"trainable_token_indices: PEFT leaves out the norm that {base.config.model_type} has behind its embeddings as soon as "
            "single rows are trained, so the adapter would act differently there. Train the whole tables: modules_to_save = "
            "[embed_tokens, lm_head]"
        )


def _attach(
    base: PreTrainedModel, settings: dict[str, Any], seed: int, notes: list[str], on_packed: str | None
) -> PeftModel:
    source = base.oribi
    source.changed_before_lora = tuple(source.changed_weights(base))
    tables = {id(m.weight) for m in (base.get_input_embeddings(), base.get_output_embeddings()) if m}
    # rows of embeddings and head travel in the adapter's file
    in_adapter = {name for name, p in base.named_parameters(remove_duplicate=False) if id(p) in tables}
    changed = [name for name in source.changed_before_lora if name not in in_adapter]
    if changed:
        notes.append(
            f"{len(changed)} of the base's tensors were changed after it was loaded, {changed[0]} the first: an adapter on "
            "them cannot be saved alone; write the whole model (save_pretrained_merged) first, or after training"
        )
    devices = [base.device] if base.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), without_word_on_ties():
            torch.manual_seed(seed)
            peft_model = peft_get_peft_model(base, LoraConfig(**settings))
            train_in_float32(peft_model)
            if on_packed is not None:
                notes.append(start_on_packed(peft_model, on_packed))
            elif settings["init_lora_weights"] == "eva":
                notes.append(PENDING)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"PEFT refuses these LoRA settings: {' '.join(str(error).split())}") from error
    if str(settings["init_lora_weights"]).startswith(_MOVES_BASE):
        source.sum_weights(base)  # PEFT moves them by the same rule whenever it loads the adapter
    return peft_model.train()


def set_checkpointing(model: PreTrainedModel, choice: bool | str) -> None:
    """Sets what the model keeps between forward and backward; `choice` as in `attach_lora`."""
    name = OLDER_CHECKPOINTING.get(str(choice).lower(), choice)
    note = f"use_gradient_checkpointing = {choice!r} is read as {name!r}"
    if name != choice and note not in model.oribi.notes:
        model.oribi.notes.append(note)
    keeps_all = name in ("speed", "off")
    if not keeps_all and not model.supports_gradient_checkpointing:  # some classes of transformers
        model.oribi.notes.append(
            f"gradient checkpointing: {type(model).__name__} has none, so all activations are kept"
        )
        name, keeps_all = "off", True
    if not keeps_all and hasattr(model, "set_recompute_policy"):
        model.set_recompute_policy(
            "balanced" if name == "auto" else name
        )  # "auto" is planned when training starts
    else:
        switch_checkpointing(model, not keeps_all)
    model.oribi.checkpointing = name


def switch_checkpointing(model: PreTrainedModel, on: bool) -> None:
    """Switches gradient checkpointing by the name that the installed transformers has for it."""
    # renamed in 5.23, where the older name warns
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{name}_checkpointing_disable")()


def _check_range(r: int, alpha: float, dropout: float, bias: str, checkpointing: bool | str) -> None:
    problems = []
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        problems.append(f"r = {r!r}: must be an integer of at least 1")
    if not alpha > 0:
        problems.append(f"lora_alpha = {alpha!r}: must be above 0")
    if not 0 <= dropout < 1:
        problems.append(f"lora_dropout = {dropout!r}: must be at least 0 and below 1")
    if bias not in ("none", "all", "lora_only"):
        problems.append(f"bias = {bias!r}: must be 'none', 'all' or 'lora_only'")
    if OLDER_CHECKPOINTING.get(str(checkpointing).lower(), checkpointing) not in CHECKPOINTING:
        allowed = ", ".join(map(repr, CHECKPOINTING))
        problems.append(f"use_gradient_checkpointing = {checkpointing!r}: must be one of {allowed}")
    if problems:
        raise ConfigError("get_peft_model: " + "; ".join(problems))


def _check_fields(given: dict[str, Any], start: bool | str, source: Any) -> None:
    _refuse_on_codes(source, start, given)
    known = {f.name for f in fields(LoraConfig)} - {"peft_type", "auto_mapping", "base_model_name_or_path"}
    unknown = [name for name in given if name not in known]
    if unknown:
        hint = did_you_mean(unknown[0], known)
        raise ConfigError(f"get_peft_model: unknown argument {', '.join(unknown)}{hint}")
    if given.get("target_parameters") and start not in (True, False, "gaussian"):
        raise ConfigError(
            f"init_lora_weights={start!r}: PEFT begins pairs on parameters (target_parameters), as of experts, with True, False or "
            "'gaussian' only"
        )


def _loftq(how: bool | str, given: dict[str, Any] | None) -> dict[str, Any]:
    """LoftQ's settings, each with PEFT's default where it is not given."""
    return {**asdict(LoftQConfig()), **(given or {})} if how == "loftq" else {}


def _refuse_on_codes(source: Any, how: bool | str, lora_config: dict[str, Any]) -> None:
    """Raise over settings under which PEFT would read the weights of a GGUF file, which are codes in memory."""
    if source.identity.weights != AS_IN_FILE:
        return
    asked = ["use_dora=True"] * bool(lora_config.get("use_dora")) + ["init_lora_weights='loftq'"] * (
        how == "loftq"
    )
    if asked:
        raise ConfigError(
            f"{' and '.join(asked)}: the base keeps the codes of its GGUF file, which PEFT does not read; load it with "
            "load_in_4bit=False, or take plain LoRA (LoftQ has nothing to make up for: no weight is rounded)"
        )


def _start_in_peft(how: bool | str, loftq_config: dict[str, Any] | None, source: Any) -> bool | str:
    """How PEFT begins the pairs: True where oribi then gives them their values, as the file that is saved must say.

    PEFT would otherwise begin them anew where it loads that file, and move the base.
    """
    packed, name = source.load_in_4bit, str(how)
    if loftq_config and name != "loftq":
        raise ConfigError(f"loftq_config is given but init_lora_weights is {how!r}; LoftQ needs 'loftq'")
    if isinstance(how, bool) or name in ("gaussian", "eva") or (name == "orthogonal" and not packed):
        return how
    if name in _NEEDS_DATA:
        raise ConfigError(
            f"init_lora_weights={how!r} needs gradients or activations of your data before training, which get_peft_model does not "
            "have; 'eva' begins with your rows when SFTTrainer trains"
        )
    if name != "orthogonal" and not name.startswith(_MOVES_BASE):
        raise ConfigError(
            f"init_lora_weights={how!r}: allowed are True, False, 'gaussian', 'eva', 'orthogonal', 'pissa', 'pissa_niter_N', "
            "'olora' and 'loftq'"
        )
    if not packed:
        if name == "loftq" and not (torch.cuda.is_available() or torch.xpu.is_available()):
            raise ConfigError(
                "init_lora_weights='loftq': PEFT computes it on a GPU only, and none was found; use 'pissa', 'olora' or True"
            )
        return how
    if name in ("orthogonal", "olora"):
        raise ConfigError(
            f"init_lora_weights={how!r}: PEFT computes it on 16-bit weights only; load with load_in_4bit=False, or use 'pissa' or "
            "'loftq', which leave packed weights as they are"
        )
    if loftq_config and (loftq_config.get("loftq_iter", 1), loftq_config.get("loftq_bits", 4)) != (1, 4):
        raise ConfigError(
            f"loftq_config = {loftq_config}: on packed weights LoftQ takes one iteration of 4 bits; more would pack the base "
            "anew, which no adapter can say"
        )
    return True


def _check_same(model: PeftModel, settings: dict[str, Any]) -> None:
    """Raises unless the model's active adapter was made from the same settings."""
    wanted, present = LoraConfig(**settings), model.peft_config[model.active_adapter]
    different = []
    for name in settings:
        a, b = getattr(wanted, name), getattr(present, name)
        if name == "target_modules" and wanted.target_modules == "all-linear":
            continue  # PEFT replaced the word by the names it found
        if name in ("target_modules", "modules_to_save", "layers_to_transform", "target_parameters"):
            a, b = (set(x) if isinstance(x, list | tuple | set) else x for x in (a, b))
        if (a or None) != (b or None):
            different.append(f"{name} is {b!r}, asked for {a!r}")
    if different:
        raise ConfigError(
            "the model has a LoRA adapter already, with other settings: "
            + "; ".join(different)
            + ". Load the base model again, or continue with the adapter it has"
        )
