"""The tokenizer in a GGUF file, written: tokens, types, merges or scores, special tokens, chat template.

A fast Hugging Face tokenizer becomes llama.cpp's keys, and is rebuilt from them in `tokenizer_reading`. The rule that splits text
into words before the merges is in the file by name alone; see `splits`.
"""

import json
import re
from dataclasses import dataclass, field

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerFast

from oribi.chat.ends import renders, template_starts_with_bos, turn_end_id
from oribi.errors import ExportError
from oribi.gguf.splits import pre_tokenizer_name, pre_tokenizer_steps

# special tokens: their names here -> in the keys
# tokens that a model never says, such as those that stand for pictures in its input
SUPPRESSED = "tokenizer.ggml.suppress_tokens"
_SPECIAL = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "sep": "seperator",
    "pad": "padding",
    "mask": "mask",
}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# of "gemma4": llama.cpp's parser of answers must see these, and prints no token that is marked as control
_SEEN_BY_PARSER = (
    "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>',
)  # fmt: skip


@dataclass
class Vocabulary:
    """A tokenizer in llama.cpp's words.

    Args:
        model: "gpt2" (byte-level BPE), "llama" (SentencePiece BPE) or "gemma4" (the same by its merges, always with BOS).
        pre: name of the pre-tokenizer; "" where `model` says it.
        tokens, types: text and kind of every row of the embeddings.
        merges: of "gpt2" and "gemma4", by rank.
        scores: of "llama", the higher is merged first.
        space_prefix: whether a space is put before the text; only "llama" asks.
        adds_bos: whether the file tells llama.cpp to put BOS before every prompt.
        bos_removed: whether the tokenizer does so and the file does not, as conversations were trained without.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    space_prefix: bool = False
    adds_bos: bool = False
    bos_removed: bool = False


def read_vocabulary(tokenizer: PreTrainedTokenizerFast, rows: int, pieces: str = "llama") -> Vocabulary:
    """Translate a tokenizer.

    Args:
        tokenizer: backed by the tokenizers library.
        rows: rows of the embeddings; rows without a token get a name that no text contains.
        pieces: the kind that it is written as where it is SentencePiece's: "llama" or "gemma4".

    Raises:
        ExportError: llama.cpp has no tokenizer that does the same, or there are more tokens than rows.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(f"{type(tokenizer).__name__} is not a fast tokenizer; load it with use_fast=True")
    spec = json.loads(backend.to_str())
    model = spec["model"]
    if model["type"] != "BPE":
        raise ExportError(
            f"llama.cpp has no tokenizer of type {model['type']} for decoders; it has BPE and SentencePiece BPE"
        )
    texts: dict[int, str] = {id: text for text, id in model["vocab"].items()}
    added = {token["id"]: token for token in spec["added_tokens"]}
    texts.update({id: token["content"] for id, token in added.items()})
    if max(texts) >= rows:
        raise ExportError(
            f"the tokenizer has ids up to {max(texts)} and the model {rows} embedding rows; "
            "resize the model's embeddings to the tokenizer"
        )
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    byte_level = any(step["type"] == "ByteLevel" for step in pre_tokenizer_steps(spec["pre_tokenizer"]))
    kinds = [_kind(texts.get(id), added.get(id), model, byte_level) for id in range(rows)]
    tokens = [texts.get(id, f"[PAD{id}]") for id in range(rows)]
    if not byte_level and pieces == "gemma4":
        kinds = [TokenType.USER_DEFINED if t in _SEEN_BY_PARSER else k for t, k in zip(tokens, kinds)]
    elif not byte_level:
        tokens = [t.replace("▁", " ") if k == TokenType.USER_DEFINED else t for t, k in zip(tokens, kinds)]
    if len(set(tokens)) < len(tokens):
        repeated = next(t for t in tokens if tokens.count(t) > 1)
        raise ExportError(f"the tokenizer has the token {repeated!r} twice; llama.cpp needs every token once")
    if byte_level:
        if not merges:
            raise ExportError("the tokenizer has no merges; llama.cpp loads no BPE tokenizer without")
        pre = pre_tokenizer_name(spec)
        return Vocabulary("gpt2", pre, tokens, kinds, merges=_in_lines(merges))
    # Gemma has a token of its own for the tab and none for its byte: llama.cpp takes either
    lacking = {byte for byte in range(256) if not {f"<0x{byte:02X}>", chr(byte)} & model["vocab"].keys()}
    if not model.get("byte_fallback") or lacking:
        raise ExportError(
            "llama.cpp's SentencePiece tokenizer needs byte_fallback and byte tokens <0x00>..<0xFF>; this one lacks them"
        )
    scores = _scores(tokens, kinds, merges)
    if pieces == "gemma4":
        return Vocabulary("gemma4", "", tokens, kinds, merges=_in_lines(merges), scores=scores)
    return Vocabulary("llama", "default", tokens, kinds, scores=scores, space_prefix=_prefixes_space(spec))


def _in_lines(merges: list[tuple[str, str]]) -> list[str]:
    return [f"{left} {right}" for left, right in merges]


def _kind(text: str | None, added: dict | None, model: dict, byte_level: bool) -> int:
    if text is None:
        return TokenType.UNUSED
    if not byte_level and text == model.get("unk_token"):
        return TokenType.UNKNOWN
    if not byte_level and _BYTE.fullmatch(text):
        return TokenType.BYTE
    if added is None:
        return TokenType.NORMAL
    # some tokenizers do not mark their own control tokens
    looks_special = text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or re.fullmatch(
        r"<\|.*\|>|<｜.*｜>|<unused.*>", text, flags=re.DOTALL
    )
    return TokenType.CONTROL if added["special"] or looks_special else TokenType.USER_DEFINED


def _scores(tokens: list[str], kinds: list[int], merges: list[tuple[str, str]]) -> list[float]:
    """Score of a piece: minus the rank of the first merge that gives it, which is the order SentencePiece merged in."""
    rank: dict[str, int] = {}
    for position, (left, right) in enumerate(merges):
        rank.setdefault(left + right, position)
    last = len(merges)
    return [
        -float(rank.get(token, last))
        if kind == TokenType.NORMAL
        else -1000.0
        if kind != TokenType.UNUSED
        else -1e4
        for token, kind in zip(tokens, kinds)
    ]


def _prefixes_space(spec: dict) -> bool:
    normalizer = spec["normalizer"] or {"type": "Sequence", "normalizers": []}
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    if any(step["type"] == "Prepend" for step in steps):
        return True
    return any(
        step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never"
        for step in pre_tokenizer_steps(spec["pre_tokenizer"])
    )


def add_tokenizer(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerFast, rows: int, pieces: str = "llama"
) -> Vocabulary:
    """Write a tokenizer's keys.

    Args:
        writer: of a file that is not yet opened.
        tokenizer: backed by the tokenizers library.
        rows: rows of the embeddings.
        pieces: as for `read_vocabulary`.

    Raises:
        ExportError: as `read_vocabulary`.
    """
    probe = tokenizer("a")["input_ids"]
    adds_bos = tokenizer.bos_token_id is not None and probe[0] == tokenizer.bos_token_id
    # llama.cpp renders the template and then tokenises as for any text: a template without BOS must get none
    bos_removed = adds_bos and template_starts_with_bos(tokenizer) is False
    if not adds_bos or bos_removed:
        pieces = "llama"  # llama.cpp puts BOS before every text of the other
    vocabulary = read_vocabulary(tokenizer, rows, pieces)
    vocabulary.bos_removed, vocabulary.adds_bos = bos_removed, adds_bos and not bos_removed
    writer.add_tokenizer_model(vocabulary.model)
    if vocabulary.pre:
        writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    writer.add_add_space_prefix(vocabulary.space_prefix)
    for name, key in _SPECIAL.items():
        id = getattr(tokenizer, f"{name}_token_id", None)
        if id is not None:
            writer.add_uint32(f"tokenizer.ggml.{key}_token_id", id)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(
        tokenizer.eos_token_id is not None and len(probe) > 1 and probe[-1] == tokenizer.eos_token_id
    )
    if renders(tokenizer):  # llama.cpp loads no file whose template fails
        end = turn_end_id(tokenizer)
        if end is not None and end != tokenizer.eos_token_id:
            writer.add_eot_token_id(end)
        templates = tokenizer.chat_template
        if isinstance(templates, dict):
            templates = [{"name": name, "template": text} for name, text in templates.items()]
        writer.add_chat_template(templates)
    return vocabulary
