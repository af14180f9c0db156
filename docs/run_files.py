"""The run files of examples/configs: for each size of card the models that people train on it, with sizes that fit."""

from model_sizes import architecture

from oribi.config import RunConfig
from oribi.config_file import commented_yaml
from oribi.memory.estimate import Training
from oribi.memory.gpus import gpu_named

# GB of a card -> the GPU of the table that stands for it, GiB of host memory that its machine has free, the longest row
CARDS = {
    8: ("RTX 4060", 12, 2048),
    12: ("RTX 3060", 12, 2048),
    16: ("T4", 10, 2048),
    24: ("RTX 4090", 24, 4096),
    48: ("L40S", 48, 4096),
    80: ("H100", 64, 8192),
}
MODELS = {
    8: ("meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-3B-Instruct", "Qwen/Qwen3-4B", "google/gemma-3-4b-it"),
    12: ("meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen3-8B", "mistralai/Mistral-7B-Instruct-v0.3", "google/gemma-3-4b-it"),
    16: ("meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen3-8B", "Qwen/Qwen3-14B", "google/gemma-3-12b-it", "microsoft/phi-4"),
    24: (
        "meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen3-8B", "Qwen/Qwen3-14B", "google/gemma-3-12b-it", "microsoft/phi-4",
        "mistralai/Mistral-Small-24B-Instruct-2501",
    ),
    48: (
        "meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen3-14B", "Qwen/Qwen3-32B", "google/gemma-3-27b-it",
        "mistralai/Mistral-Small-24B-Instruct-2501",
    ),
    80: (
        "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.3-70B-Instruct", "Qwen/Qwen2.5-72B-Instruct",
        "Qwen/Qwen3-32B", "google/gemma-3-27b-it",
    ),
}  # fmt: skip
TOKENS, BATCH = 4096, 8  # of a micro-batch at most, and rows of a step: as `oribi init` chooses them
LARGE = 20e9  # parameters from which a lower learning rate is usual


def training_on(card: int, config: RunConfig) -> tuple[Training, int]:
    """A run as the estimate sees it on a card's machine, and the card's memory in bytes."""
    gpu, host, _ = CARDS[card]
    return Training(architecture(config.model), config, host * 2**30), gpu_named(gpu).memory_bytes


def fits(card: int, config: RunConfig) -> bool:
    """Whether a run file fits the card and the memory of its machine."""
    training, memory = training_on(card, config)
    rows = config.per_device_train_batch_size
    return training.fits(rows * config.max_seq_length, config.max_seq_length, memory)


def run_file(name: str, card: int) -> str:
    """The text of one run file: the longest row that the card allows, up to what people use on it."""
    length = CARDS[card][2]
    while not fits(card, RunConfig(model=name, max_seq_length=length, per_device_train_batch_size=1)):
        length //= 2
    rows = max(TOKENS // length, 1)
    while not fits(card, RunConfig(model=name, max_seq_length=length, per_device_train_batch_size=rows)):
        rows //= 2
    short = name.rpartition("/")[2].lower()
    values = {
        "model": name,
        "max_seq_length": length,
        "dataset": ["examples/data/chat.jsonl"],
        "eval_fraction": 0.2,
        "output_dir": f"runs/{short}",
        "num_train_epochs": 1.0,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": BATCH // rows,
        "learning_rate": 1e-4 if architecture(name).parameters > LARGE else 2e-4,
        "quantization_method": ["q4_k_m"],
    }
    notes = [
        "Put your own rows in place of dataset; those in examples/data only show the format. 0.05 of a larger file is enough to evaluate on.",
    ]
    return commented_yaml(values, f"{name} on a GPU with {card} GB: oribi train examples/configs/{file_name(name, card)}",
                          notes=notes, shown=("lora_r", "lora_alpha"))  # fmt: skip


def file_name(name: str, card: int) -> str:
    return f"{name.rpartition('/')[2].lower()}-{card}gb.yaml"


def run_files() -> dict[str, str]:
    """File name -> text."""
    return {file_name(name, card): run_file(name, card) for card, names in MODELS.items() for name in names}
