"""A run's settings: what each means, what it may be, and its default in a config file and in Python.

This is the one table of defaults: files and flags (`config_file.py`), `SFTConfig`, `get_peft_model`, `prepare_dataset` and
docs/config.md read it. Keys are Hugging Face's where they exist.
"""

from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, get_args, get_origin, get_type_hints

from oribi.config_advice import OTHER_NAMES
from oribi.config_setting import KEPT_CODES, OTHER_CODES, SFT_ONLY, STAGES, Setting
from oribi.errors import ConfigError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def setting(default: Any, help: str, **limits: Any) -> Any:
    """A field of `RunConfig`: its default in a config file, what it means, and further fields of `Setting`."""
    metadata = {"help": help, "python": default, **limits}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def of_stages(help: str, defaults: dict[str, Any], **limits: Any) -> Any:
    """A field of `RunConfig` that only these stages use: its default in each, what it means, and further fields of `Setting`."""
    return setting(None, help, stages=defaults, used_by=tuple(defaults), **limits)


def as_source(written: Any) -> dict[str, Any]:
    """A data set with its settings, of `dataset` or `eval_dataset`: a name, or a mapping with the settings."""
    return dict(written) if isinstance(written, dict) else {"path": written}


# of transformers 5.17
SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "polynomial", "constant",
    "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay", "reduce_lr_on_plateau",
)  # fmt: skip
# how a LoRA pair begins; on 16-bit weights pissa and olora move a part of the base into the pair
STARTS = ("true", "false", "gaussian", "eva", "loftq", "orthogonal", "pissa", "olora")
OPTIMIZERS = (
    "adamw_8bit", "adamw_torch", "adamw_torch_fused", "adamw_torch_4bit", "adamw_torch_8bit", "adamw_bnb_8bit",
    "paged_adamw_32bit", "paged_adamw_8bit", "adafactor", "sgd", "adagrad", "rmsprop", "rmsprop_bnb",
    "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit",
    "ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit", "schedule_free_adamw",
    "schedule_free_radam", "schedule_free_sgd", "stable_adamw", "grokadamw",
)  # fmt: skip
# what layers keep between forward and backward, and older names for it; YAML writes true and false in several ways
CHECKPOINTING = ("auto", "memory", "balanced", "speed", "off")
OLDER_CHECKPOINTING = {
    **dict.fromkeys(("oribi", "unsloth", "true", "yes", "on"), "auto"), **dict.fromkeys(("false", "no"), "off"),
}  # fmt: skip
# of TRL 1.15 and 1.16: losses that need no argument of their own
LOSSES = {
    "dpo": ("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
            "apo_zero", "apo_down", "discopop", "sft"),
    "kto": ("kto", "apo_zero_unpaired"),
    "grpo": ("dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo"),
}  # fmt: skip
WRITES = tuple(stage for stage in STAGES if stage != "reward")  # stages whose model writes answers
TRACKERS = ("none", "tensorboard", "wandb", "mlflow", "trackio")


@dataclass
class RunConfig:
    """Every setting of a run; `read_run_config` makes one from a file and flags."""

    # what is trained
    stage: str = setting(
        "sft", "Supervised fine-tuning, or with TRL: preferences (dpo, orpo, kto), a reward model, or rewards (grpo)",
        choices=STAGES, same={"rm": "reward"},
    )  # fmt: skip
    # the model
    model: str = setting("", "Hub name, local folder or GGUF file of the model")
    revision: str | None = setting(None, "Branch, tag or commit of the model on the hub")
    trust_remote_code: bool = setting(False, "Run code that the model's repository ships")
    max_seq_length: int = setting(2048, "Longest example in tokens", low=1, high=2**24)
    load_in_4bit: bool = setting(True, "Keep frozen weights in NF4 (QLoRA)")
    keep_in_16bit: list[str] = setting(
        [], "Linear layers not packed in NF4, as down_proj or layers.0; auto measures which", joined=True
    )
    train_for: str | None = setting(
        None, "GGUF quantisation that will be served: frozen weights are the codes that its files have",
        choices=KEPT_CODES, same=OTHER_CODES,
    )  # fmt: skip
    dtype: str = setting(
        "auto", "Data type of the computation", choices=("auto", "bfloat16", "float16", "float32"),
        same={"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"},
    )  # fmt: skip
    full_finetuning: bool = setting(False, "Train every weight instead of an adapter")
    # the adapter
    lora_r: int = setting(16, "Rank of the adapter", low=1, high=65536)
    lora_alpha: int = setting(16, "Scale of the adapter: alpha / r, with rsLoRA alpha / sqrt(r)", low=0)
    lora_dropout: float = setting(0.0, "Dropout before the adapter", low=0, below=1)
    target_modules: list[str] = setting(
        ["all-linear"], "Layers that get an adapter, or all-linear", python=PROJECTIONS, joined=True
    )
    modules_to_save: list[str] = setting([], "Modules trained in full beside the adapter", joined=True)
    use_rslora: bool = setting(False, "Scale by sqrt(r) instead of r")
    use_dora: bool = setting(False, "Weight-decomposed LoRA")
    rank_pattern: dict[str, int] | None = setting(
        None, "Ranks of single layers, by their names or regular expressions, e.g. {down_proj: 32}", low=1, high=65536
    )  # fmt: skip
    alpha_pattern: dict[str, float] | None = setting(
        None, "Alphas of single layers, by their names or regular expressions", low=0
    )
    layers_to_transform: list[int] | None = setting(
        None, "The only layers that get an adapter, by number", low=0
    )
    finetune_last_n_layers: int | None = setting(None, "Only the last so many layers get an adapter", low=1)
    exclude_modules: list[str] = setting([], "Named layers that get no adapter all the same", joined=True)
    target_parameters: list[str] = setting(
        [], "Parameters that get an adapter but are no layers, as mlp.experts.down_proj is", joined=True
    )
    init_lora_weights: str = setting(
        "true", "How pairs begin: true with B = 0; eva from your rows; loftq from what NF4 rounded off; pissa and olora from the weights",
        python=True, choices=STARTS, pattern=r"pissa_niter_\d+",
    )  # fmt: skip
    new_tokens: list[str] = setting([], "Tokens added to the tokenizer, whose rows are trained")
    trainable_tokens: list[str] = setting(
        [], "Tokens of the tokenizer whose rows are trained beside the adapter"
    )
    gradient_checkpointing: str = setting(
        "auto", "Activations: auto keeps what fits in free memory, memory the least, speed and off all of them",
        choices=CHECKPOINTING, same=OLDER_CHECKPOINTING,
    )  # fmt: skip
    # the data
    dataset: list[str] = setting(
        [], "Files or hub data sets to train on; one may have settings of its own, e.g. {path: a.csv, weight: 2}", sources=True
    )  # fmt: skip
    split: str = setting("train", "Split of a hub data set")
    dataset_text_field: str | None = setting(
        None,
        "Column of plain text to train on, whatever else the rows hold; none takes text if they hold nothing better",
    )
    eval_dataset: list[str] = setting([], "Files or hub data sets to evaluate on", sources=True)
    eval_split: str | None = setting(
        None, "Split of eval_dataset; none takes split, but validation or test of what is in dataset as well"
    )
    eval_fraction: float = setting(0.0, "Fraction of the training rows kept for evaluation", low=0, below=1)
    chat_template: str | None = setting(None, "Name of a chat template in place of the model's own")
    train_on_responses_only: bool = setting(True, "Train on the assistant's words only", used_by=SFT_ONLY)
    overlong: str | None = setting(
        None, "Examples above max_seq_length; none splits text files and truncates otherwise",
        choices=("truncate", "drop", "split", "error"),
    )  # fmt: skip
    turns: str = setting(
        "whole", "Conversations as whole examples, or split into one example per assistant turn, each with its thought",
        choices=("whole", "split"), used_by=SFT_ONLY,
    )  # fmt: skip
    columns: dict[str, str] | None = setting(
        None, "Your columns by oribi's names, e.g. {question: task, answer: solution}"
    )
    role_aliases: dict[str, str] | None = setting(None, "Further names of roles, e.g. {coach: assistant}")
    chat_template_kwargs: dict[str, Any] | None = setting(
        None, "Values that the chat template reads, e.g. {enable_thinking: false}"
    )
    malformed: str = setting(
        "error", "Rows that cannot be read stop the run, or are left out and named", choices=("error", "drop")
    )
    packing: bool = setting(
        True, "Fill rows of max_seq_length with several examples each", python=False,
        stages=dict.fromkeys(STAGES[1:], False), used_by=SFT_ONLY,
    )  # fmt: skip
    dataset_num_proc: int | None = setting(None, "Processes that prepare the data", low=1, high=1024)
    # the training
    output_dir: str = setting("runs/latest", "Folder of the run", python="outputs")
    num_train_epochs: float = setting(1.0, "Passes over the data", python=3.0, low=0, high=1e6)
    max_steps: int = setting(-1, "Optimizer steps; overrides num_train_epochs if positive", low=-1)
    per_device_train_batch_size: int = setting(
        2, "Batch size per device", low=1, stages={"kto": 4, "grpo": 8}
    )
    per_device_eval_batch_size: int = setting(8, "Batch size of evaluation per device", low=1)
    gradient_accumulation_steps: int = setting(
        4, "Micro-batches per optimizer step", low=1, stages={"kto": 2, "grpo": 1}
    )
    total_batch_size: int | None = setting(
        None, "Rows per optimizer step over all GPUs, from which gradient_accumulation_steps follows", low=1
    )
    learning_rate: float = setting(
        2e-4, "Peak learning rate", low=0, below=1,
        stages={"dpo": 1e-5, "orpo": 1e-5, "kto": 1e-5, "reward": 5e-5, "grpo": 5e-6},
    )  # fmt: skip
    embedding_learning_rate: float | None = setting(
        None, "Learning rate of embeddings and head trained whole", low=0, below=1
    )
    loraplus_lr_ratio: float | None = setting(
        None, "LoRA+: how many times faster B learns than A, e.g. 16", low=0.01
    )
    lr_scheduler_type: str = setting("linear", "How the learning rate falls", choices=SCHEDULES)
    lr_scheduler_kwargs: dict[str, Any] | None = setting(
        None, "Arguments of the schedule, e.g. {min_lr_rate: 0.1} of cosine_with_min_lr"
    )
    warmup_steps: float = setting(
        5, "Warm-up steps; a value below 1 is a fraction of all steps", python=0, low=0
    )
    optim: str = setting("adamw_8bit", "Optimizer", choices=OPTIMIZERS)
    optim_args: dict[str, Any] | None = setting(
        None, "Further arguments of the optimizer, e.g. {momentum: 0.9} of sgd", joined=True
    )
    adam_beta1: float = setting(0.9, "AdamW: decay of the gradient's running mean", low=0, below=1)
    adam_beta2: float = setting(0.999, "AdamW: decay of the squared gradient's running mean", low=0, below=1)
    adam_epsilon: float = setting(1e-8, "AdamW: added to the divisor", low=0)
    weight_decay: float = setting(0.01, "Weight decay", python=0.0, low=0)
    max_grad_norm: float = setting(1.0, "Maximum gradient norm; 0 disables clipping", low=0)
    label_smoothing_factor: float = setting(
        0.0, "Share of the probability that is spread over all tokens; forms whole logits", low=0, below=1, used_by=SFT_ONLY
    )  # fmt: skip
    neftune_noise_alpha: float | None = setting(None, "NEFTune noise on embeddings", low=0, used_by=SFT_ONLY)
    seed: int = setting(3407, "Seed of the data order, dropout and the adapter's start", low=0)
    fp8: bool = setting(
        False,
        "Compute products of frozen weights in 8-bit floating point while training (approximate; NVIDIA GPUs from 8.9 on)",
        used_by=SFT_ONLY,
    )
    deterministic: bool = setting(False, "Make two runs bit-equal; slower on a GPU")
    gpus: str | None = setting(
        None, "GPUs to train on, a process each: all, a number, or indices such as 0,2; none trains on one"
    )
    fsdp: bool = setting(
        False,
        "Split the frozen weights over the GPUs, for a model that is too large for one",
        used_by=SFT_ONLY,
    )
    context_parallel: int = setting(
        1,
        "GPUs that share each row, for rows that are too long for one; the number of GPUs is a multiple of it",
        low=1, high=1024, used_by=SFT_ONLY,
    )  # fmt: skip
    ddp_timeout: int = setting(1800, "Seconds that a process waits for the others before it gives up", low=1)
    logging_steps: int = setting(1, "Steps between two log lines", low=1)
    eval_steps: int | None = setting(None, "Steps between two evaluations; none takes each epoch", low=1)
    sample_prompts: str | None = setting(
        None,
        "Prompts answered at every evaluation, base beside tuned: a file (.txt has one on each line), or held_out rows",
        used_by=WRITES,
    )
    sample_tokens: int = setting(128, "Longest of these answers in tokens", low=1, used_by=WRITES)
    save_steps: int | None = setting(
        None, "Steps between two checkpoints; none saves only at the end", python=500, low=1
    )
    save_strategy: str | None = setting(
        None, "When checkpoints are written: every save_steps, at each epoch, or when an evaluation is the best so far",
        choices=("steps", "epoch", "best", "no"), python="steps",
    )  # fmt: skip
    save_total_limit: int | None = setting(None, "Checkpoints kept", low=1)
    load_best_model_at_end: bool = setting(
        False, "Keep the weights of the best evaluation, not the last ones"
    )
    early_stopping_patience: int | None = setting(
        None, "Stop after so many evaluations without improvement; the best weights are kept", low=1
    )
    resume: str = setting(
        "false", "Go on from the newest whole checkpoint in output_dir; weights takes its weights alone",
        choices=("true", "false", "weights"),
    )  # fmt: skip
    report_to: list[str] = setting(["none"], "Trackers", python="none", choices=TRACKERS)
    # the stage
    beta: float | None = of_stages(
        "How close the model is kept to its reference; of orpo the weight of the odds ratio", low=0,
        defaults={"dpo": 0.1, "orpo": 0.1, "kto": 0.1, "grpo": 0.0},
    )  # fmt: skip
    loss_type: list[str] | None = of_stages(
        "The loss, by TRL's name; of dpo also several, which are added",
        {"dpo": ["sigmoid"], "kto": ["kto"], "grpo": ["dapo"]},
    )
    loss_weights: list[float] | None = of_stages(
        "Weight of each loss_type; none weighs them alike", {"dpo": None}
    )
    label_smoothing: float | None = of_stages(
        "Share of pairs that may be labelled the wrong way round, for the losses that know it",
        {"dpo": 0.0},
        low=0,
        below=0.5,
    )
    desirable_weight: float | None = of_stages("Weight of good answers", {"kto": 1.0}, low=0)
    undesirable_weight: float | None = of_stages("Weight of bad answers", {"kto": 1.0}, low=0)
    center_rewards_coefficient: float | None = of_stages(
        "How strongly the mean of all rewards is kept at 0, e.g. 0.01", {"reward": 0.0}, low=0
    )
    reward_funcs: list[str] | None = of_stages(
        "Functions that score answers: file.py:function, beside the config file, or module:function",
        {"grpo": None},
    )
    reward_weights: list[float] | None = of_stages(
        "Weight of each reward function; none adds them", {"grpo": None}
    )
    num_generations: int | None = of_stages(
        "Answers per prompt, which are compared with each other", {"grpo": 8}, low=2
    )
    max_prompt_length: int | None = of_stages(
        "Longest prompt in tokens; longer ones are left out", {"grpo": 512}, low=1
    )
    max_completion_length: int | None = of_stages("Longest answer in tokens", {"grpo": 512}, low=1)
    temperature: float | None = of_stages(
        "Temperature of the answers that are drawn", {"grpo": 1.0}, low=1e-3
    )
    top_p: float | None = of_stages("Nucleus of the answers that are drawn", {"grpo": 1.0}, low=1e-6, high=1)
    top_k: int | None = of_stages("Candidates per token of an answer; 0 takes all", {"grpo": 0}, low=0)
    min_p: float | None = of_stages(
        "Least probability of a token, as a share of the likeliest one's", {"grpo": None}, low=0, high=1
    )
    epsilon: float | None = of_stages(
        "How far one step may move a token's probability ratio from 1", {"grpo": 0.2}, low=0
    )
    scale_rewards: str | None = of_stages(
        "Divide rewards by their deviation within a prompt's group, within the batch, or not",
        {"grpo": "group"},
        choices=("group", "batch", "none"),
    )
    mask_truncated_completions: bool | None = of_stages(
        "Leave answers out of the loss that max_completion_length cut off", {"grpo": False}
    )
    # what is saved
    save_method: list[str] = setting(
        ["lora"], "Forms in which the model is saved", choices=("lora", "lora_per_expert", "merged_16bit", "merged_4bit", "fp8", "w4a16", "gguf-adapter"),
        same={"adapter": "lora", "merged": "merged_16bit"}, instead={"gguf": "names no GGUF file; write quantization_method: q4_k_m"},
    )  # fmt: skip
    quantization_method: list[str] = setting([], "GGUF files to write, e.g. q8_0 or q4_k_m")
    report: bool = setting(True, "Measure the model before and after, and write report.html and report.md")

    def sources(self) -> list[dict[str, Any]]:
        """The data sets of `dataset`, each as `oribi.data.sources.open_source` takes a source."""
        return [as_source(one) for one in self.dataset]

    def shared_by(self, processes: int) -> "RunConfig":
        """The settings with the micro-batches per step that make `total_batch_size` on so many processes.

        Raises:
            ConfigError: it is no multiple of the rows that they take at once.
        """
        total, groups = self.total_batch_size, max(processes // self.context_parallel, 1)
        if total is None:
            return self
        rows = groups * self.per_device_train_batch_size
        if total % rows:
            raise ConfigError(
                f"total_batch_size = {total} is no multiple of the {rows} rows that {processes} GPUs take at once; give "
                f"{-(-total // rows) * rows}, or another per_device_train_batch_size than {self.per_device_train_batch_size}"
            )
        return replace(self, gradient_accumulation_steps=total // rows)

    def row_settings(self) -> dict[str, Any]:
        """What is said of the rows, by the names of `prepare_dataset`, or of `prepare_preferences` where a stage is not sft."""
        of_stage = {} if self.stage == "sft" else {"stage": self.stage}
        return {
            **of_stage,
            "max_seq_length": self.max_prompt_length if self.stage == "grpo" else self.max_seq_length,
            "split": self.split,
            "train_on": "responses" if self.train_on_responses_only else "everything",
            "overlong": self.overlong,
            "turns": self.turns,
            "text_field": self.dataset_text_field,
            "columns": self.columns,
            "role_aliases": self.role_aliases,
            "chat_template_kwargs": self.chat_template_kwargs,
            "malformed": self.malformed,
        }


def _settings() -> dict[str, Setting]:
    kinds, found = get_type_hints(RunConfig), {}
    for one in fields(RunConfig):
        kind = kinds[one.name]
        optional = type(None) in get_args(kind)
        kind = get_args(kind)[0] if optional else kind
        container = get_origin(kind)
        default = one.default if one.default is not MISSING else one.default_factory()
        found[one.name] = Setting(
            one.name, get_args(kind)[-1] if container else kind, container, optional, default, **one.metadata
        )
    return found


SETTINGS = _settings()


ALIASES = {alias: name for name, aliases in OTHER_NAMES.items() for alias in aliases.split()}


def json_schema() -> dict[str, Any]:
    """The settings as a JSON schema, by which editors complete keys and mark mistakes; aliases are allowed too."""
    shapes = {name: setting.schema() for name, setting in SETTINGS.items()}
    properties = {
        name: {"description": f"{setting.help}.", **shapes[name], "default": setting.default}
        for name, setting in SETTINGS.items()
    }
    aliases = {
        alias: {"description": f"Read as {name}.", "deprecated": True, **shapes[name]}
        for alias, name in ALIASES.items()
        if alias not in properties
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "oribi run config",
        "type": "object",
        "properties": {**properties, **aliases},
        "additionalProperties": False,
    }
