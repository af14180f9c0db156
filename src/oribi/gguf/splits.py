"""How byte-level tokenizers split text into words before they merge: llama.cpp's names of the rules, read and written.

llama.cpp knows pre-tokenizers by name, and the rules themselves are code there. A name is found from what a tokenizer does
(its splits), not from a hash of what it gives, so an extended or a new vocabulary is named like the one it descends from.
Source: the tokenizers' own tokenizer.json files, and the names of llama.cpp's `tokenizer.ggml.pre`.
"""

from typing import Any

from tokenizers import Regex, pre_tokenizers

from oribi.errors import ExportError

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_WITH_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = rf"{_CONTRACTION}|{_START}\p{{L}}+|\p{{N}}{{1,3}}{_REST}"
_QWEN2 = rf"{_CONTRACTION}|{_START}\p{{L}}+|\p{{N}}{_REST}"
_QWEN35 = (
    rf"{_CONTRACTION}|{_START}[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = rf"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*|\p{{N}}{_REST_WITH_SLASH}"
_GPT4O = (
    rf"{_START}{_UPPER}*{_LOWER}+{_CONTRACTION}?|{_START}{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}{_REST_WITH_SLASH}"
)

# names in tokenizer.ggml.pre -> regular expressions that split one after the other
RULES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("gpt-2", "phi-2", "olmo", "mpt", "jais", "granite-docling", "exaone4"): (_GPT2,),
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"): (r"\p{N}", _GPT2),
    (
        "llama-bpe",
        "llama3",
        "llama-v3",
        "falcon3",
        "dbrx",
        "smaug-bpe",
        "lfm2",
        "pixtral",
        "falcon-h1",
        "midm-2.0",
        "glm4",
        "chatglm-bpe",
    ): (_CL100K,),
    ("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez"): (_QWEN2,),
    ("qwen35",): (_QWEN35,),
    ("tekken",): (_TEKKEN,),
    ("gpt-4o",): (_GPT4O,),
    ("default",): (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
# a word that is in the vocabulary is taken whole, whatever the merges say; and BOS is added unless the file says otherwise
WHOLE_WORDS = (
    "llama-bpe", "llama3", "llama-v3", "falcon3", "tekken", "lfm2", "pixtral", "falcon-h1", "midm-2.0",
)  # fmt: skip
NFC = ("qwen2", "deepseek-r1-qwen", "qwen35")  # text is normalised first
# llama.cpp's own form of these rules knows no case and no combining marks of letters beyond ASCII
CUT_BY_CASE = ("tekken", "gpt-4o")
# ways of writing a rule that split alike: OpenAI's own form of cl100k
ALIKE = {
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+": _CL100K,
    r"\d": r"\p{N}",
}
# what splits the text, and whether whole words are looked up before merging -> the first of llama.cpp's names
_NAMES: dict[tuple[tuple[str, ...], bool], str] = {}
for _names, _rules in RULES.items():
    for _name in _names:
        _NAMES.setdefault((_rules, _name in WHOLE_WORDS), _name)


def pre_tokenizer_steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The pre-tokenizers of a tokenizer.json one after the other."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [inner for part in step["pretokenizers"] for inner in pre_tokenizer_steps(part)]
    return [step]


def pre_tokenizer_name(spec: dict[str, Any]) -> str:
    """llama.cpp's name of a byte-level BPE's pre-tokenizer.

    Args:
        spec: the parsed tokenizer.json.

    Raises:
        ExportError: none does the same.
    """
    rules: list[str] = []
    for step in pre_tokenizer_steps(spec["pre_tokenizer"]):
        if step["type"] == "Digits" and step["individual_digits"]:
            rules.append(r"\p{N}")
        elif step["type"] == "Split":
            pattern = step["pattern"].get("Regex", step["pattern"].get("String"))
            rules.append(ALIKE.get(pattern, pattern))
        elif step["type"] == "ByteLevel":
            rules += [_GPT2] * step.get("use_regex", True)
        else:
            rules.append(step["type"])
    whole_words = bool(spec["model"].get("ignore_merges", False))
    name = _NAMES.get((tuple(rules), whole_words))
    if name is None:
        raise ExportError(
            f"llama.cpp has no pre-tokenizer that splits text by {rules} with ignore_merges={whole_words}, "
            "as far as oribi knows; save merged_16bit and convert that folder with llama.cpp's own script"
        )
    return name


def pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer | None:
    """What splits text as llama.cpp's rule of that name; None if the name is unknown."""
    rules = next((rules for names, rules in RULES.items() if name in names), None)
    if rules is None:
        return None
    if rules == (_GPT2,):
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if rules == (r"\p{N}", _GPT2):  # as the tokenizers of this lineage are saved
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    splits = [pre_tokenizers.Split(Regex(rule), behavior="isolated") for rule in rules]
    return pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
