"""The tokenizer in a GGUF file, read: a fast Hugging Face tokenizer rebuilt from llama.cpp's keys.

The rule that splits text into words before the merges is in the file by name alone; see `splits`.
"""

from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from oribi.errors import ModelError
from oribi.families import FAMILIES
from oribi.gguf.file import GGUFFile
from oribi.gguf.splits import NFC, RULES, WHOLE_WORDS, pre_tokenizer

# what "gemma4" splits text by before it merges
_LINES = r"[^\n]+|\n+"


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
