"""The tokenizer in a GGUF file, written and read: tokens, types, merges or scores, special tokens, chat template.

A fast Hugging Face tokenizer becomes llama.cpp's keys, and is rebuilt from them. The rule that splits text into words
before the merges is in the file by name alone; see `splits`.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from oribi.chat.ends import renders, template_starts_with_bos, turn_end_id
from oribi.errors import ExportError, ModelError
from oribi.families import FAMILIES
from oribi.gguf.file import GGUFFile
from oribi.gguf.splits import NFC, RULES, WHOLE_WORDS, pre_tokenizer, pre_tokenizer_name, pre_tokenizer_steps

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
# what "gemma4" splits text by before it merges
_LINES = r"[^\n]+|\n+"


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


def rebuild_tokenizer(file: GGUFFile) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file.

    Raises:
        ModelError: the file has no tokenizer, or one of an unknown kind or splitting rule.
    """
    kind = file.value("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama", "gemma4"):
        raise ModelError(
            f"{file.path} has a tokenizer of kind {kind!r}; oribi rebuilds gpt2 (BPE), llama and gemma4 (SentencePiece). "
            "Put the model's tokenizer.json beside the file and it is used instead"
        )
    tokens, types = tokens_of(file)
    backend = _byte_level(file, tokens) if kind == "gpt2" else _sentencepiece(file, tokens, types)
    # by the model's name, as llama.cpp does: the file has no key for it
    called = str(file.value("general.name", "")).lower()
    rows = [family.gguf for family in FAMILIES.values() if family.gguf is not None]
    strip = any(name in called for row in rows for name in row.stripping_names)
    backend.add_tokens(
        [
            AddedToken(
                token,
                normalized=False,
                special=what == TokenType.CONTROL,
                rstrip=strip and what == TokenType.CONTROL and token not in ("<unk>", "<s>", "<|endoftext|>"),
            )
            for token, what in zip(tokens, types)
            if what in (TokenType.CONTROL, TokenType.USER_DEFINED) and token
        ]
    )
    _add_ends(backend, file, tokens, kind)

    def named(key: str) -> str | None:
        index = file.value(f"tokenizer.ggml.{key}_token_id")
        if index is None or not 0 <= index < len(tokens):
            return None
        # id 0, where a converter wrote it for want of another, is a word; as a special token it would be cut out of every text
        word = key in ("unknown", "padding") and types[index] == TokenType.NORMAL
        return None if word else tokens[index]

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=named("bos"),
        eos_token=named("eos"),
        unk_token=named("unknown"),
        pad_token=named("padding"),
        chat_template=_chat_template(file),
        clean_up_tokenization_spaces=False,
        add_bos_token=_adds_bos(file, kind),
        add_eos_token=bool(file.value("tokenizer.ggml.add_eos_token", False)),
    )


def tokens_of(file: GGUFFile) -> tuple[list[str], list[int]]:
    """Text and type of each token.

    Raises:
        ModelError: the lists are missing or contradict each other.
    """
    tokens = file.value("tokenizer.ggml.tokens")
    types = file.value("tokenizer.ggml.token_type", [TokenType.NORMAL] * len(tokens or []))
    if not isinstance(tokens, list) or not isinstance(types, list) or len(tokens) != len(types) or not tokens:
        counts = [len(one) if isinstance(one, list) else 0 for one in (tokens, types)]
        raise _damaged(file, f"{counts[0]} tokens and {counts[1]} types of tokens")
    return tokens, types


def require_same_tokens(file: GGUFFile, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """Raise if the tokenizer beside a file is another model's: the ids of one would be other words to the other.

    Args:
        file: of the model; one without a tokenizer is not compared. tokenizer: the one beside it. name: its file.

    Raises:
        ModelError: a word of the file has another id there.
    """
    if file.value("tokenizer.ggml.tokens") is None:
        return
    tokens, types = tokens_of(file)
    theirs = tokenizer.convert_ids_to_tokens(range(min(len(tokens), len(tokenizer))))
    theirs += [None] * (len(tokens) - len(theirs))
    # the others are written in several ways, or stand for nothing
    different = [
        index
        for index, (ours, kind, other) in enumerate(zip(tokens, types, theirs))
        if kind == TokenType.NORMAL and ours != other and not (other is None and ours.startswith("[PAD"))
    ]
    if different:
        first = different[0]
        raise ModelError(
            f"{name} beside {file.path.name} is the tokenizer of another model: {len(different)} of {len(tokens)} tokens differ, the "
            f"first is {first} ({tokens[first]!r} in the GGUF file, {theirs[first]!r} there). Move the GGUF file to a folder of its own, "
            "and its own tokenizer is read"
        )


def _damaged(file: GGUFFile, what: object) -> ModelError:
    return ModelError(
        f"{file.path}: its tokenizer is damaged ({what}). Download the file again, or put the model's tokenizer.json beside it, which "
        "is used instead"
    )


def _byte_level(file: GGUFFile, tokens: list[str]) -> Tokenizer:
    name = file.value("tokenizer.ggml.pre", "default")
    split = pre_tokenizer(name)
    if split is None:
        known = ", ".join(sorted(name for names in RULES for name in names))
        raise ModelError(
            f"{file.path} splits words by the rule {name!r} (tokenizer.ggml.pre); known are {known}. "
            "Put the model's tokenizer.json beside the file and it is used instead"
        )
    if not (merges := _merges(file)):
        raise _damaged(file, "it has no merges")
    backend = _bpe(file, tokens, merges, ignore_merges=name in WHOLE_WORDS)
    if name in NFC:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = split
    backend.decoder = decoders.ByteLevel()
    return backend


def _bpe(file: GGUFFile, tokens: list[str], merges: list[tuple[str, str]], **options: Any) -> Tokenizer:
    vocab = {token: index for index, token in enumerate(tokens)}
    try:
        return Tokenizer(BPE(vocab, merges, **options))
    except Exception as error:  # the tokenizers library raises nothing more exact
        raise _damaged(file, error) from error


def _merges(file: GGUFFile) -> list[tuple[str, str]]:
    merges = file.value("tokenizer.ggml.merges", [])
    if bad := next((merge for merge in merges if " " not in str(merge)), None):
        raise _damaged(file, f"{bad!r} is no merge of two tokens")
    return [tuple(merge.split(" ", 1)) for merge in merges]


def _merges_by_score(file: GGUFFile, tokens: list[str], types: list[int]) -> list[tuple[str, str]]:
    """SentencePiece merges the pair whose piece has the highest score."""
    scores: list[float] = file.value("tokenizer.ggml.scores", [])
    if len(scores) != len(tokens):
        raise _damaged(file, f"{len(tokens)} tokens and {len(scores)} scores")
    mergeable = {
        token: score
        for token, score, what in zip(tokens, scores, types)
        if what in (TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED)
    }
    merges = []
    for piece, score in mergeable.items():
        halves = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        merges += [
            (-score, len(merges), pair) for pair in halves if pair[0] in mergeable and pair[1] in mergeable
        ]
    return [pair for _, _, pair in sorted(merges)]


def _sentencepiece(file: GGUFFile, tokens: list[str], types: list[int]) -> Tokenizer:
    by_merges = file.value("tokenizer.ggml.model") == "gemma4"
    merges = _merges(file) if by_merges else _merges_by_score(file, tokens, types)
    unknown = file.value("tokenizer.ggml.unknown_token_id")
    if unknown is not None and not 0 <= unknown < len(tokens):
        raise _damaged(file, f"unknown_token_id is {unknown} of {len(tokens)}")
    word = None if unknown is None else tokens[unknown]
    backend = _bpe(file, tokens, merges, unk_token=word, fuse_unk=True, byte_fallback=True)
    prefix = not by_merges and file.value("tokenizer.ggml.add_space_prefix", True)
    if by_merges:
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(_LINES), behavior="isolated")
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * bool(prefix))
    return backend


def _adds_bos(file: GGUFFile, kind: str) -> bool:
    if kind == "gemma4":  # whatever the file says
        return True
    default = kind == "llama" or file.value("tokenizer.ggml.pre") in WHOLE_WORDS
    return bool(file.value("tokenizer.ggml.add_bos_token", default))


def _add_ends(backend: Tokenizer, file: GGUFFile, tokens: list[str], kind: str) -> None:
    """Add BOS before and EOS after every text where the file asks for it."""
    ends = {}
    if _adds_bos(file, kind):
        ends["bos"] = file.value("tokenizer.ggml.bos_token_id")
    if file.value("tokenizer.ggml.add_eos_token", False):
        ends["eos"] = file.value("tokenizer.ggml.eos_token_id")
    ends = {name: index for name, index in ends.items() if index is not None}
    if beyond := [
        f"{name}_token_id is {i} of {len(tokens)}" for name, i in ends.items() if not 0 <= i < len(tokens)
    ]:
        raise _damaged(file, beyond[0])
    if not ends:
        if kind == "gpt2":
            backend.post_processor = processors.ByteLevel(trim_offsets=False)
        return
    before = [tokens[ends["bos"]]] if "bos" in ends else []
    after = [tokens[ends["eos"]]] if "eos" in ends else []
    # a list, not a string: a token may hold characters that the template's grammar reserves
    backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[
            *before,
            "$A",
            *after,
            *[f"{token}:1" for token in before],
            "$B:1",
            *[f"{token}:1" for token in after],
        ],
        special_tokens=[(tokens[index], index) for index in ends.values()],
    )


def _chat_template(file: GGUFFile) -> str | dict[str, str] | None:
    default = file.value("tokenizer.chat_template")
    others = file.value("tokenizer.chat_templates", [])
    if not others:
        return default
    named = {name: file.value(f"tokenizer.chat_template.{name}") for name in others}
    return {"default": default, **named} if default else named
