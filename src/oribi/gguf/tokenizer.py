"""The tokenizer in a GGUF file: tokens, types, merges or scores, the pre-tokenizer's id, special tokens, chat template.

llama.cpp knows pre-tokenizers by name. The name is found from what the tokenizer does (its splits), not from a hash of
what it gives, so an extended or a new vocabulary is named like the one it descends from.
"""

import json
import re
from dataclasses import dataclass, field

import gguf
from transformers import PreTrainedTokenizerFast

from oribi.chat.ends import renders, template_starts_with_bos, turn_end_id
from oribi.errors import ExportError
from oribi.gguf.rebuild_tokenizer import RULES, WHOLE_WORDS


def _row(name: str) -> tuple[str, ...]:
    return next(rules for names, rules in RULES.items() if name in names)


_GPT2 = _row("gpt-2")[0]
# ways of writing a rule that cut alike: OpenAI's own form of cl100k
_ALIKE = {
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+": (
        _row("dbrx")[0]
    ),
    r"\d": r"\p{N}",
}
# what cuts the text, and whether whole words are looked up before merging -> llama.cpp's name
_PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {}
for _names, _rules in RULES.items():
    for _name in _names:
        _PRE_TOKENIZERS.setdefault((_rules, _name in WHOLE_WORDS), _name)
# llama.cpp's own form of these rules knows no case and no combining marks of letters beyond ASCII
CUT_BY_CASE = ("tekken", "gpt-4o")
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "mask")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass
class Vocabulary:
    """A tokenizer in llama.cpp's words.

    Args:
        model: "gpt2" (byte-level BPE) or "llama" (SentencePiece BPE).
        pre: name of the pre-tokenizer.
        tokens, types: text and kind of every row of the embeddings.
        merges: of "gpt2", by rank.
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


def read_vocabulary(tokenizer: PreTrainedTokenizerFast, rows: int) -> Vocabulary:
    """Translate a tokenizer.

    Args:
        tokenizer: backed by the tokenizers library.
        rows: rows of the embeddings; rows without a token get a name that no text contains.

    Raises:
        ExportError: llama.cpp has no tokenizer that does the same, or there are more tokens than rows.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(f"{type(tokenizer).__name__} is no fast tokenizer; load it with use_fast=True")
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
    byte_level = _uses(spec["pre_tokenizer"], "ByteLevel")
    kinds = [_kind(texts.get(id), added.get(id), model, byte_level) for id in range(rows)]
    tokens = [texts.get(id, f"[PAD{id}]") for id in range(rows)]
    if not byte_level:
        tokens = [
            t.replace("▁", " ") if k == gguf.TokenType.USER_DEFINED else t for t, k in zip(tokens, kinds)
        ]
    if len(set(tokens)) < len(tokens):
        repeated = next(t for t in tokens if tokens.count(t) > 1)
        raise ExportError(f"the tokenizer has the token {repeated!r} twice; llama.cpp needs every token once")
    if byte_level:
        if not merges:
            raise ExportError("the tokenizer has no merges; llama.cpp loads no BPE tokenizer without")
        pre = pre_tokenizer_name(spec)
        return Vocabulary("gpt2", pre, tokens, kinds, merges=[f"{left} {right}" for left, right in merges])
    # Gemma has a token of its own for the tab and none for its byte: llama.cpp takes either
    lacking = {byte for byte in range(256) if not {f"<0x{byte:02X}>", chr(byte)} & model["vocab"].keys()}
    if not model.get("byte_fallback") or lacking:
        raise ExportError(
            "llama.cpp's SentencePiece tokenizer needs byte_fallback and byte tokens <0x00>..<0xFF>; this one lacks them"
        )
    scores = _scores(tokens, kinds, merges)
    return Vocabulary("llama", "default", tokens, kinds, scores=scores, space_prefix=_prefixes_space(spec))


def _kind(text: str | None, added: dict | None, model: dict, byte_level: bool) -> int:
    kinds = gguf.TokenType
    if text is None:
        return kinds.UNUSED
    if not byte_level and text == model.get("unk_token"):
        return kinds.UNKNOWN
    if not byte_level and _BYTE.fullmatch(text):
        return kinds.BYTE
    if added is None:
        return kinds.NORMAL
    # some tokenizers do not mark their own control tokens
    looks_special = text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or re.fullmatch(
        r"<\|.*\|>|<｜.*｜>|<unused.*>", text, flags=re.DOTALL
    )
    return kinds.CONTROL if added["special"] or looks_special else kinds.USER_DEFINED


def _scores(tokens: list[str], kinds: list[int], merges: list[tuple[str, str]]) -> list[float]:
    """Score of a piece: minus the rank of the first merge that gives it, which is the order SentencePiece merged in."""
    rank: dict[str, int] = {}
    for position, (left, right) in enumerate(merges):
        rank.setdefault(left + right, position)
    last = len(merges)
    return [
        -float(rank.get(token, last))
        if kind == gguf.TokenType.NORMAL
        else -1000.0
        if kind != gguf.TokenType.UNUSED
        else -1e4
        for token, kind in zip(tokens, kinds)
    ]


def pre_tokenizer_name(spec: dict) -> str:
    """llama.cpp's name of a byte-level BPE's pre-tokenizer.

    Args:
        spec: the parsed tokenizer.json.

    Raises:
        ExportError: none does the same.
    """
    steps: list[str] = []
    for step in _steps(spec["pre_tokenizer"]):
        if step["type"] == "Digits" and step["individual_digits"]:
            steps.append(r"\p{N}")
        elif step["type"] == "Split":
            pattern = step["pattern"].get("Regex", step["pattern"].get("String"))
            steps.append(_ALIKE.get(pattern, pattern))
        elif step["type"] == "ByteLevel":
            steps += [_GPT2] * step.get("use_regex", True)
        else:
            steps.append(step["type"])
    whole_words = bool(spec["model"].get("ignore_merges", False))
    name = _PRE_TOKENIZERS.get((tuple(steps), whole_words))
    if name is None:
        raise ExportError(
            f"llama.cpp has no pre-tokenizer that splits text by {steps} with ignore_merges={whole_words}, "
            "as far as oribi knows; save merged_16bit and convert that folder with llama.cpp's own script"
        )
    return name


def _steps(step: dict | None) -> list[dict]:
    if step is None:
        return []
    return (
        [s for inner in step["pretokenizers"] for s in _steps(inner)]
        if step["type"] == "Sequence"
        else [step]
    )


def _uses(step: dict | None, kind: str) -> bool:
    return any(inner["type"] == kind for inner in _steps(step))


def _prefixes_space(spec: dict) -> bool:
    normalizer = spec["normalizer"] or {"type": "Sequence", "normalizers": []}
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    if any(step["type"] == "Prepend" for step in steps):
        return True
    return any(
        step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never"
        for step in _steps(spec["pre_tokenizer"])
    )


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast, rows: int) -> Vocabulary:
    """Write a tokenizer's keys.

    Args:
        writer: of a file that is not yet opened.
        tokenizer: backed by the tokenizers library.
        rows: rows of the embeddings.

    Raises:
        ExportError: as `read_vocabulary`.
    """
    vocabulary = read_vocabulary(tokenizer, rows)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "gpt2":
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
    writer.add_add_space_prefix(vocabulary.space_prefix)
    for name in _SPECIAL:
        id = getattr(tokenizer, f"{name}_token_id", None)
        if id is not None:
            getattr(writer, f"add_{name}_token_id")(id)
    probe = tokenizer("a")["input_ids"]
    adds_bos = tokenizer.bos_token_id is not None and probe[0] == tokenizer.bos_token_id
    # llama.cpp renders the template and then tokenises as for any text: a template without BOS must get none
    vocabulary.bos_removed = adds_bos and template_starts_with_bos(tokenizer) is False
    vocabulary.adds_bos = adds_bos and not vocabulary.bos_removed
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(
        tokenizer.eos_token_id is not None and len(probe) > 1 and probe[-1] == tokenizer.eos_token_id
    )
    end = turn_end_id(tokenizer)
    if end is not None and end != tokenizer.eos_token_id:
        writer.add_eot_token_id(end)
    if tokenizer.chat_template is not None and renders(
        tokenizer
    ):  # llama.cpp loads no file whose template fails
        templates = tokenizer.chat_template
        if isinstance(templates, dict):
            templates = [{"name": name, "template": text} for name, text in templates.items()]
        writer.add_chat_template(templates)
    return vocabulary
