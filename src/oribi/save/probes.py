"""What an export is checked on: held-out rows if there are some, else a few conversations and texts of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from oribi.errors import ConfigError

_MAX_TOKENS = 384  # of all rows together
_MAX_LOGITS = 50_000_000  # 200 MB of float32
_MAX_ROW = 96

CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for question, answer in (
        ("What is the capital of France?", "The capital of France is Paris."),
        ("Sort these numbers: 42, 7, 1999, 3.", "In ascending order: 3, 7, 42, 1999."),
        ("Write a Python line that reverses a string s.", "reversed_s = s[::-1]"),
        ("Wie spät ist es, wenn es Viertel nach drei ist?", "Es ist 15:15 Uhr – oder 3:15 nachts."),
        ("Say hello in three languages.", "Hello! ¡Hola! 你好！"),
    )
]
TEXTS: list[str] = [
    "The quick brown fox jumps over the lazy dog, and then it rests for 3.5 hours.\n\nNobody minds.",
    "def mean(values):\n    total = sum(values)\n    return total / len(values)\n",
    "In 1969, Apollo 11 landed on the Moon; Neil Armstrong was the first person to walk on it.",
]


@dataclass(frozen=True)
class Rows:
    """Token rows packed one after the other.

    Args:
        ids, positions: [1, S] int64; positions restart at 0 at each row.
        origin: where they come from, in words.
        held_out: whether they are of the data that was trained on, and not general texts.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    origin: str
    held_out: bool = False

    @property
    def documents(self) -> list[list[int]]:
        """The rows apart."""
        starts = (self.positions[0] == 0).nonzero().flatten().tolist()
        return [part.tolist() for part in self.ids[0].tensor_split(starts[1:])]

    def targets(self) -> torch.Tensor:
        """Next token at every place [S], -100 at the last of each row."""
        following = torch.full_like(self.ids[0], -100)
        following[:-1] = self.ids[0, 1:].masked_fill(self.positions[0, 1:] == 0, -100)
        return following


def rows_of(tokenizer: Any, held_out: Sequence[Any] | None, vocab_size: int) -> Rows:
    """Rows to check an export on.

    Args:
        tokenizer: None if there is none; then `held_out` must hold token ids.
        held_out: texts, lists of messages, rows with "input_ids", "messages" or "text", or lists of ids.
        vocab_size: of the model; without rows and tokenizer, random ids serve.

    Raises:
        ConfigError: a row is of another kind, or none has two tokens.
    """
    given = held_out is not None and len(held_out) > 0
    if given:
        rows, origin = [_ids(tokenizer, row) for row in list(held_out)[:32]], f"{len(held_out)} held-out rows"
    elif tokenizer is not None:
        conversations = CONVERSATIONS if tokenizer.chat_template else []
        rows = [_ids(tokenizer, row) for row in [*conversations, *TEXTS]]
        origin = f"oribi's own {len(rows)} conversations and texts (no held-out rows were given)"
    else:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(vocab_size, (4, 48), generator=generator).tolist()
        origin = "4 rows of random tokens (neither held-out rows nor a tokenizer were given)"
    kept: list[list[int]] = []
    most = min(_MAX_TOKENS, _MAX_LOGITS // vocab_size)
    for row in rows:
        room = most - sum(map(len, kept))
        if len(row) > 1 and room > 1:
            kept.append(row[: min(_MAX_ROW, room)])
    if not kept:
        raise ConfigError("the held-out rows have no row of two tokens or more")
    return pack(kept, origin, held_out=given)


def pack(rows: list[list[int]], origin: str, *, held_out: bool = False) -> Rows:
    """Rows of ids one after the other."""
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    return Rows(torch.tensor([id for row in rows for id in row])[None], positions[None], origin, held_out)


def _ids(tokenizer: Any, row: Any) -> list[int]:
    if isinstance(row, dict):
        for key in ("input_ids", "messages", "text"):
            if key in row:
                row = row[key]
                break
    if isinstance(row, str):
        return list(tokenizer(row, verbose=False)["input_ids"])
    if isinstance(row, torch.Tensor):
        row = row.tolist()
    if isinstance(row, list) and row and isinstance(row[0], dict):
        return rendered_ids(tokenizer, row)
    if isinstance(row, list) and all(isinstance(id, int) for id in row):
        return row
    raise ConfigError(f"a held-out row is {str(row)[:80]!r}; expected a text, messages, or token ids")


def rendered_ids(tokenizer: Any, messages: list[dict[str, str]], *, prompt: bool = False) -> list[int]:
    """Token ids of a conversation in the tokenizer's template; `prompt` adds the start of an answer."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
