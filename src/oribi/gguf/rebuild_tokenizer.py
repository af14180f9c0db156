"""The tokenizer that a GGUF file carries, rebuilt as a fast Hugging Face tokenizer.

The file holds the vocabulary, the merges (BPE) or scores (SentencePiece) and the name of the rule that cuts text into
words before the merges; the rules themselves are code in llama.cpp and stand here as a table.
Source: the tokenizers' own tokenizer.json files, and the names of llama.cpp's `tokenizer.ggml.pre`.
"""

from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from oribi.errors import ModelError

Metadata = Callable[..., Any]  # (key, default) -> value

# tokenizer.ggml.token_type
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_WITH_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = rf"{_CONTRACTION}|{_START}\p{{L}}+|\p{{N}}{{1,3}}{_REST}"
_QWEN2 = rf"{_CONTRACTION}|{_START}\p{{L}}+|\p{{N}}{_REST}"
_TEKKEN = rf"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*|\p{{N}}{_REST_WITH_SLASH}"
_GPT4O = (
    rf"{_START}{_UPPER}*{_LOWER}+{_CONTRACTION}?|{_START}{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}{_REST_WITH_SLASH}"
)

# names in tokenizer.ggml.pre -> regular expressions that cut one after the other
RULES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("gpt-2", "phi-2", "olmo", "mpt", "jais", "granite-docling"): (_GPT2,),
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"): (r"\p{N}", _GPT2),
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe"): (_CL100K,),
    ("qwen2", "stablelm2", "deepseek-r1-qwen"): (_QWEN2,),
    ("tekken",): (_TEKKEN,),
    ("gpt-4o",): (_GPT4O,),
    ("default",): (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
# a whole word in the vocabulary is taken as it is, whatever the merges say; and a BOS is added unless the file says no
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")


def rebuild_tokenizer(metadata: Metadata, path: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file.

    Args:
        metadata: looks up a metadata key, with a default.
        path: the file, for messages.

    Raises:
        ModelError: the file has no tokenizer, or one of a kind or cutting rule that is not known.
    """
    kind = metadata("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ModelError(
            f"{path} has a tokenizer of kind {kind!r}; oribi rebuilds gpt2 (BPE) and llama (SentencePiece). "
            "Put the model's tokenizer.json beside the file and it is used instead"
        )
    tokens: list[str] = metadata("tokenizer.ggml.tokens")
    types: list[int] = metadata("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    backend = (
        _byte_level(metadata, tokens, path) if kind == "gpt2" else _sentencepiece(metadata, tokens, types)
    )
    # by the model's name, as llama.cpp does: the file has no key for it
    called = str(metadata("general.name", "")).lower()
    strip = any(name in called for name in ("phi-3", "phi3", "phi 3"))
    backend.add_tokens(
        [
            AddedToken(
                token,
                normalized=False,
                special=what == _CONTROL,
                # Phi-3 was trained with the whitespace after its markers swallowed
                rstrip=strip and what == _CONTROL and token not in ("<unk>", "<s>", "<|endoftext|>"),
            )
            for token, what in zip(tokens, types)
            if what in (_CONTROL, _USER_DEFINED) and token
        ]
    )
    _add_ends(backend, metadata, tokens, kind)

    def named(key: str) -> str | None:
        index = metadata(f"tokenizer.ggml.{key}_token_id")
        return tokens[index] if index is not None and 0 <= index < len(tokens) else None

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=named("bos"),
        eos_token=named("eos"),
        unk_token=named("unknown"),
        pad_token=named("padding"),
        chat_template=_chat_template(metadata),
        clean_up_tokenization_spaces=False,
        add_bos_token=_adds_bos(metadata, kind),
        add_eos_token=bool(metadata("tokenizer.ggml.add_eos_token", False)),
    )


def _byte_level(metadata: Metadata, tokens: list[str], path: str) -> Tokenizer:
    name = metadata("tokenizer.ggml.pre", "default")
    rules = next((rules for names, rules in RULES.items() if name in names), None)
    if rules is None:
        known = ", ".join(sorted(name for names in RULES for name in names))
        raise ModelError(
            f"{path} cuts words by the rule {name!r} (tokenizer.ggml.pre); known are {known}. "
            "Put the model's tokenizer.json beside the file and it is used instead"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in metadata("tokenizer.ggml.merges", [])]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(BPE(vocab, merges, ignore_merges=name in WHOLE_WORDS))
    if name in ("qwen2", "deepseek-r1-qwen"):
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _cutter(rules)
    backend.decoder = decoders.ByteLevel()
    return backend


def _cutter(rules: tuple[str, ...]) -> pre_tokenizers.PreTokenizer:
    if rules == (_GPT2,):
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if rules == (r"\p{N}", _GPT2):  # as the tokenizers of this lineage are saved
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    cuts = [pre_tokenizers.Split(Regex(rule), behavior="isolated") for rule in rules]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _sentencepiece(metadata: Metadata, tokens: list[str], types: list[int]) -> Tokenizer:
    scores: list[float] = metadata("tokenizer.ggml.scores")
    mergeable = {
        token: score
        for token, score, what in zip(tokens, scores, types)
        if what in (_NORMAL, _USER_DEFINED, _UNUSED)
    }
    merges = []
    for piece, score in mergeable.items():
        halves = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        merges += [
            (-score, len(merges), pair) for pair in halves if pair[0] in mergeable and pair[1] in mergeable
        ]
    merges.sort()  # SentencePiece merges the pair whose piece has the highest score
    unknown = metadata("tokenizer.ggml.unknown_token_id")
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(
        BPE(
            vocab,
            [pair for _, _, pair in merges],
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = metadata("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * bool(prefix))
    return backend


def _adds_bos(metadata: Metadata, kind: str) -> bool:
    default = kind == "llama" or metadata("tokenizer.ggml.pre") in WHOLE_WORDS
    return bool(metadata("tokenizer.ggml.add_bos_token", default))


def _add_ends(backend: Tokenizer, metadata: Metadata, tokens: list[str], kind: str) -> None:
    """Makes the backend put BOS before and EOS after a text where the file asks for it."""
    ends = {}
    if _adds_bos(metadata, kind):
        ends["bos"] = metadata("tokenizer.ggml.bos_token_id")
    if metadata("tokenizer.ggml.add_eos_token", False):
        ends["eos"] = metadata("tokenizer.ggml.eos_token_id")
    ends = {name: index for name, index in ends.items() if index is not None}
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


def _chat_template(metadata: Metadata) -> str | dict[str, str] | None:
    default = metadata("tokenizer.chat_template")
    others = metadata("tokenizer.chat_templates", [])
    if not others:
        return default
    named = {name: metadata(f"tokenizer.chat_template.{name}") for name in others}
    return {"default": default, **named} if default else named
