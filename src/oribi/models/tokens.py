"""A model's tokenizer alone, repaired as the loader repairs it; no weights are read."""

from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from oribi.chat.tokenizer import load_tokenizer, repair
from oribi.gguf.source import GGUFSource
from oribi.gguf.tokenizer import rebuild_tokenizer
from oribi.models.config_file import read_generation
from oribi.models.files import HubOptions, locate, locate_base, read_json


def tokenizer_of(
    name: str, *, revision: str | None = None, token: Any = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer that `load_model` would return.

    Args:
        name: a directory, GGUF file, adapter, run or hub name.
        revision, token: for the hub.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        ModelError: there is none.
    """
    location = locate(name, HubOptions(token=token, revision=revision))
    if location.kind == "adapter" and not any(location.directory.glob("tokenizer*")):
        location = locate_base(location, HubOptions(token=token))
    generation = GenerationConfig()
    if location.kind == "gguf":
        source = GGUFSource(location.file)
        config = source.config
        if (location.directory / "tokenizer.json").is_file():
            tokenizer = load_tokenizer(location.directory, trust_remote_code=trust_remote_code)
        else:
            tokenizer = rebuild_tokenizer(source.file)
        ends = [config.eos_token_id, source.value("tokenizer.ggml.eot_token_id")]
        generation.eos_token_id = [end for end in dict.fromkeys(ends) if end is not None]
        repair(tokenizer, config.vocab_size, generation, max_seq_length=config.max_position_embeddings)
        return tokenizer
    tokenizer = load_tokenizer(location.directory, trust_remote_code=trust_remote_code)
    generation = read_generation(location.directory) or generation
    file = location.directory / "config.json"
    config = read_json(file) if file.is_file() else {}
    if isinstance(text := config.get("text_config"), dict):
        config = text
    vocab_size, positions = config.get("vocab_size"), config.get("max_position_embeddings")
    vocab_size = vocab_size if type(vocab_size) is int and vocab_size > 0 else len(tokenizer)
    positions = positions if type(positions) is int and positions > 0 else 2048
    repair(tokenizer, vocab_size, generation, max_seq_length=positions)
    return tokenizer
