"""Loads a tokenizer and repairs what breaks training: padding, a missing chat template, a missing end token.

The vocabulary never changes here. Every repair is reported as one line.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from oribi.chat.ends import stop_ids, turn_end_id
from oribi.chat.template import render_chat, slot
from oribi.errors import ModelError, OribiError

# tokens that models reserve for padding, the most specific first
_PAD_NAMES = (
    "<|finetune_right_pad_id|>", "<|finetune_right_pad|>", "<|pad|>", "<pad>", "[PAD]", "<|padding|>",
    "<|PAD_TOKEN|>", "<|vision_pad|>", "<|endoftext|>", "<|reserved_special_token_0|>", "<|dummy_0|>",
    "<unused0>", "<unk>",
)  # fmt: skip
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# put before a template of a processor, whose contents are lists of parts: texts become such lists
TEXTS_AS_PARTS = (
    "{%- set listed = namespace(messages=[]) -%}{%- for message in messages -%}{%- if message['content'] is string -%}"
    "{%- set message = dict(message, content=[{'type': 'text', 'text': message['content']}]) -%}{%- endif -%}"
    "{%- set listed.messages = listed.messages + [message] -%}{%- endfor -%}{%- set messages = listed.messages -%}"
)
# where a processor keeps its chat template when its tokenizer has none
PROCESSOR_FILES = ("chat_template.json", "processor_config.json")
# those of a tokenizer's files that hold JSON objects
OBJECTS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", *OBJECTS,
    "chat_template.jinja",
)  # fmt: skip
# text on which pre-tokenizers differ; some classes add the leading space themselves
_CUTS = " Hello world's  1234567 naïve\n\n\tx=(y+1); 你好ですか? I'LL 👍🏽"


@dataclass
class Repaired:
    """A tokenizer ready for training, and what generation stops at.

    Args:
        tokenizer: pads on the left, as batched generation needs.
        eos_token_ids: every token that ends an answer, the tokenizer's own eos first.
        notes: one line per repair.
    """

    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: list[int]
    notes: list[str] = field(default_factory=list)


def load_tokenizer(
    directory: Path,
    *,
    trust_remote_code: bool = False,
    notes: list[str] | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory.

    Args:
        directory: with tokenizer.json or what the tokenizer's class reads.
        trust_remote_code: whether a class of the directory's own may run.
        notes: gets a line if tokenizer.json is taken and not the class that transformers chose.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=trust_remote_code, local_files_only=True
        )
        _try(tokenizer)
        if _cuts_as_stored(tokenizer, directory / "tokenizer.json"):
            return tokenizer
        stored = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # tokenizers raises bare exceptions, and values of other types end anywhere
        names = [name for name in _FILES if (directory / name).is_file()]
        reason = " ".join(str(error).split())[:600] or type(error).__name__
        raise ModelError(
            f"no tokenizer can be loaded from {directory} ({', '.join(names) or 'it has no tokenizer.json'}): {reason}"
        ) from error
    if notes is not None:
        notes.append(
            f"tokenizer: transformers takes it for a {type(tokenizer).__name__}, which splits text differently from its "
            "tokenizer.json; the file is used as it is"
        )
    return stored


def _try(tokenizer: PreTrainedTokenizerBase) -> None:
    """Call what every user of a tokenizer calls, so that a broken one fails while it loads."""
    tokenizer.decode(tokenizer(_CUTS)["input_ids"])
    len(tokenizer), tokenizer.all_special_ids, tokenizer.get_vocab()


def _cuts_as_stored(tokenizer: PreTrainedTokenizerBase, file: Path) -> bool:
    """Whether a byte-level tokenizer gives the ids of its own tokenizer.json; others are not compared.

    transformers 5 rebuilds a tokenizer by the rules of the class it is saved under. Checkpoints that name LlamaTokenizer
    and hold a byte-level BPE (DeepSeek-R1-Distill) get other ids than they were trained with.
    """
    if not (tokenizer.is_fast and file.is_file()):
        return True
    stored = Tokenizer.from_file(str(file))
    if not isinstance(stored.decoder, decoders.ByteLevel):
        return True
    ids = tokenizer(_CUTS, add_special_tokens=False)["input_ids"]
    return ids == stored.encode(_CUTS, add_special_tokens=False).ids


def repair(
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    generation: GenerationConfig | None = None,
    *,
    max_seq_length: int | None = None,
) -> Repaired:
    """Makes a tokenizer fit to train and generate with; changes it in place.

    Args:
        tokenizer: as loaded.
        vocab_size: rows of the model's embeddings; ids beyond are no candidates for padding.
        generation: the checkpoint's generation settings, for the tokens that end an answer.
        max_seq_length: becomes the tokenizer's `model_max_length`.

    Raises:
        ModelError: no token ends a text.
    """
    notes: list[str] = []
    _repair_chat_template(tokenizer, notes)
    known = stop_ids(None, generation.eos_token_id if generation is not None else None)
    end_of_turn = turn_end_id(tokenizer)
    if tokenizer.eos_token_id is None:
        eos = next((i for i in (*known, end_of_turn) if i is not None and i < vocab_size), None)
        if eos is None:
            raise ModelError(
                "the tokenizer has no eos token and the checkpoint names none; set tokenizer.eos_token"
            )
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos)
        notes.append(
            f"tokenizer: eos was missing, now {tokenizer.eos_token!r} as the checkpoint generates with"
        )
    ends = stop_ids(tokenizer, [tokenizer.eos_token_id, *known])
    if end_of_turn not in (None, tokenizer.eos_token_id, *known):
        notes.append(
            f"tokenizer: the chat template ends a turn with {tokenizer.convert_ids_to_tokens(end_of_turn)!r}, not with "
            f"eos {tokenizer.eos_token!r}; generation stops at both"
        )
    _repair_padding(tokenizer, vocab_size, {tokenizer.eos_token_id, end_of_turn}, notes)
    tokenizer.padding_side = "left"
    if max_seq_length is not None:
        tokenizer.model_max_length = max_seq_length
    return Repaired(tokenizer, ends, notes)


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts before every text (BOS, if anything)."""
    bare, full = (tokenizer(["a"], add_special_tokens=flag)["input_ids"][0] for flag in (False, True))
    at = next((i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), 0)
    return full[:at]


def _repair_chat_template(tokenizer: PreTrainedTokenizerBase, notes: list[str]) -> None:
    if tokenizer.chat_template:
        if _drops_texts(tokenizer):
            tokenizer.chat_template = TEXTS_AS_PARTS + tokenizer.chat_template
            notes.append(
                "tokenizer: its chat template reads contents as lists of parts, as for images; texts are given to it as such"
            )
        return
    vocab = tokenizer.get_vocab()
    if "<|im_start|>" in vocab and "<|im_end|>" in vocab:
        tokenizer.chat_template = CHATML
        notes.append("tokenizer: it had no chat template, now ChatML, whose markers are in its vocabulary")
    else:
        notes.append(
            "tokenizer: it has no chat template; get_chat_template(tokenizer, ...) sets one for chats"
        )


def _drops_texts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat template leaves out contents that are texts, and writes those that are lists of parts."""
    if not isinstance(tokenizer.chat_template, str):
        return False
    text = slot(0)

    def writes(content: Any) -> bool:
        try:
            return text in render_chat(tokenizer, [{"role": "user", "content": content}])
        except OribiError:
            return False

    return not writes(text) and writes([{"type": "text", "text": text}])


def _repair_padding(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, ends: set[int | None], notes: list[str]
) -> None:
    pad = tokenizer.pad_token_id
    if pad is not None and pad not in ends and pad < vocab_size:
        return
    if pad is None:
        problem = "pad was missing"
    elif pad >= vocab_size:
        problem = f"pad {tokenizer.pad_token!r} has no row in the embeddings"
    else:
        problem = f"pad was {tokenizer.pad_token!r}, which ends a text"
    vocab = tokenizer.get_vocab()
    candidates = [name for name in _PAD_NAMES if name in vocab]
    candidates += [
        token.content
        for _, token in sorted(tokenizer.added_tokens_decoder.items())
        if "pad" in token.content.lower()
    ]
    taken = ends | {tokenizer.bos_token_id}
    for name in candidates:
        if vocab[name] < vocab_size and vocab[name] not in taken:
            tokenizer.pad_token = name
            notes.append(f"tokenizer: {problem}, now {name!r}")
            return
    tokenizer.pad_token = tokenizer.eos_token
    notes.append(
        f"tokenizer: {problem}, and its vocabulary has no unused token; padding is recognised by position"
    )
