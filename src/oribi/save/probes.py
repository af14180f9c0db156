"""What an export is checked on: held-out rows if there are any, otherwise a few conversations and texts of oribi's own."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from oribi.chat.ends import renders
from oribi.chat.template import render_chat
from oribi.errors import ConfigError

_MAX_TOKENS = 384  # of all rows together
_MAX_LOGITS = 50_000_000  # 200 MB of float32
_MAX_ROW = 96
_MAX_PROMPTS = 20
_MAX_PROMPT = 512  # tokens of one prompt
_MAX_PROMPT_TOKENS = 2048  # of all prompts together

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
# asked in addition to the conversations' questions
QUESTIONS: list[str] = [
    "How many days does a week have?",
    "Translate to Spanish: Good morning.",
    "What is 12 + 30?",
    "Name the largest planet of the solar system.",
    "Is a whale a fish? Answer yes or no.",
    "Complete the list: Monday, Tuesday, Wednesday,",
    "What is the opposite of hot?",
    "Write the SQL query that counts the rows of the table users.",
    "Who wrote Romeo and Juliet?",
    "Return as JSON with the keys name and age: Anna is 31 years old.",
    "Spell the word banana backwards.",
    "What color do blue and yellow make when mixed?",
    "Give one word that rhymes with light.",
    "At what temperature in Celsius does water boil?",
    "Correct the spelling: I recieved teh letter yesterdy.",
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
        answers: [S] bool, the tokens that a model is to say; None where every token counts. A prompt is given, so its
            tokens say nothing about a model's answers.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    origin: str
    held_out: bool = False
    answers: torch.Tensor | None = None

    @property
    def documents(self) -> list[list[int]]:
        """The rows apart."""
        starts = (self.positions[0] == 0).nonzero().flatten().tolist()
        return [part.tolist() for part in self.ids[0].tensor_split(starts[1:])]

    def targets(self) -> torch.Tensor:
        """Next token at every place [S]; -100 at the last of each row, and where the next token is given."""
        compared = self.positions[0] != 0
        if self.answers is not None:
            compared = compared & self.answers
        following = torch.full_like(self.ids[0], -100)
        following[:-1] = self.ids[0, 1:].masked_fill(~compared[1:], -100)
        return following


@dataclass(frozen=True)
class _Row:
    """Token ids, and where the answer begins; 0 where every token counts."""

    ids: list[int]
    answer: int = 0
    labels: list[int] | None = None

    def cut(self, tokens: int) -> "_Row":
        """The row up to `tokens` compared tokens."""
        if self.labels is not None:
            labelled = [i for i, label in enumerate(self.labels) if label != -100 and i]
            end = labelled[:tokens][-1] + 1 if labelled else 0
            return _Row(self.ids[:end], self.answer, self.labels[:end])
        return _Row(self.ids[: self.answer + tokens], self.answer)

    def answers(self) -> list[bool]:
        if self.labels is not None:
            return [label != -100 for label in self.labels]
        return [i >= self.answer for i in range(len(self.ids))]


def rows_of(tokenizer: Any, held_out: Sequence[Any] | None, vocab_size: int) -> Rows:
    """Rows to check an export on.

    Args:
        tokenizer: None if there is none; then `held_out` must hold token ids.
        held_out: texts, lists of messages, rows with "input_ids" (and "labels"), "messages" or "text", or lists of ids. Of
            rows with labels or messages, the answers are compared.
        vocab_size: of the model; without rows and tokenizer, random ids serve.

    Raises:
        ConfigError: a row is of another kind, or none has two tokens.
    """
    given = held_out is not None and len(held_out) > 0
    if given:
        rows, origin = [_row(tokenizer, row) for row in list(held_out)[:32]], f"{len(held_out)} held-out rows"
    elif tokenizer is not None:
        conversations = CONVERSATIONS if renders(tokenizer) else []
        rows = [_Row(_ids(tokenizer, row)) for row in [*conversations, *TEXTS]]
        origin = f"oribi's own {len(rows)} conversations and texts (no held-out rows were given)"
    else:
        rows = [_Row(row) for row in _random_rows(vocab_size)]
        origin = "4 rows of random tokens (neither held-out rows nor a tokenizer were given)"
    kept: list[_Row] = []
    most, context = min(_MAX_TOKENS, _MAX_LOGITS // vocab_size), _MAX_PROMPT_TOKENS
    for row in rows:
        row = row.cut(min(_MAX_ROW, most))
        count = sum(row.answers()[1:])
        if len(row.ids) > 1 and count and context - (len(row.ids) - count) >= 0:
            kept.append(row)
            most, context = most - count, context - (len(row.ids) - count)
        if not most:
            break
    if not kept:
        raise ConfigError("the held-out rows have no row of two tokens or more")
    packed = pack_rows([row.ids for row in kept], origin, held_out=given)
    return replace(packed, answers=torch.tensor([answer for row in kept for answer in row.answers()]))


def prompts_of(tokenizer: Any, held_out: Sequence[Any] | None, vocab_size: int) -> list[list[int]]:
    """Prompts to compare greedy answers to: what comes before the first answer of each held-out row.

    Of a row without an answer of its own (a text) the first half is the prompt. Many short prompts tell more than a few
    long ones, so the shortest are taken.

    Args:
        tokenizer, held_out, vocab_size: as for `rows_of`.

    Returns:
        Token ids of at most 20 prompts.
    """
    if held_out is not None and len(held_out) > 0:
        found = [_prompt(tokenizer, row) for row in list(held_out)[:200]]
    elif tokenizer is None:
        found = [row[: len(row) // 2] for row in _random_rows(vocab_size)]
    else:
        questions = [messages[0]["content"] for messages in CONVERSATIONS] + QUESTIONS
        found = [_question(tokenizer, question) for question in questions]
    found = [prompt[:_MAX_PROMPT] for prompt in found if prompt]
    chosen: list[int] = []
    tokens = 0
    for index in sorted(range(len(found)), key=lambda index: len(found[index]))[:_MAX_PROMPTS]:
        tokens += len(found[index])
        if chosen and tokens > _MAX_PROMPT_TOKENS:
            break
        chosen.append(index)
    return [found[index] for index in sorted(chosen)]


def pack_rows(rows: list[list[int]], origin: str, *, held_out: bool = False) -> Rows:
    """Rows of ids one after the other."""
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    return Rows(torch.tensor([id for row in rows for id in row])[None], positions[None], origin, held_out)


def _random_rows(vocab_size: int) -> list[list[int]]:
    return torch.randint(vocab_size, (4, 48), generator=torch.Generator().manual_seed(0)).tolist()


def _question(tokenizer: Any, question: str) -> list[int]:
    if renders(tokenizer):
        return rendered_ids(tokenizer, [{"role": "user", "content": question}], prompt=True)
    return list(tokenizer(question, verbose=False)["input_ids"])


def _row(tokenizer: Any, row: Any) -> _Row:
    """A held-out row; labels or messages show where the answer begins.

    Behind a prompt that is too long to compare on, nothing is compared: its beginning is a text.
    """
    found = _whole_row(tokenizer, row)
    return found if found.answer <= _MAX_PROMPT else _Row(found.ids[:_MAX_PROMPT])


def _whole_row(tokenizer: Any, row: Any) -> _Row:
    ids = _ids(tokenizer, row)
    if isinstance(row, dict) and "input_ids" in row and row.get("labels") is not None:
        labels = list(row["labels"])
        return _Row(ids, _first_label(labels), labels)
    messages = row.get("messages") if isinstance(row, dict) and "input_ids" not in row else row
    if isinstance(messages, list) and messages and isinstance(messages[0], dict) and renders(tokenizer):
        answered = next((i for i, m in enumerate(messages) if m.get("role") == "assistant"), 0)
        prompt = rendered_ids(tokenizer, messages[:answered], prompt=True) if answered else []
        if ids[: len(prompt)] == prompt and len(prompt) < len(ids):
            return _Row(ids, len(prompt))
    return _Row(ids)


def _first_label(labels: list[int]) -> int:
    return next((i for i, label in enumerate(labels) if label != -100), 0)


def _prompt(tokenizer: Any, row: Any) -> list[int]:
    """Token ids of the prompt in a held-out row; of a row without an answer, the first half."""
    found = _row(tokenizer, row)
    return found.ids[: found.answer] if found.answer > 1 else found.ids[: len(found.ids) // 2]


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


def rendered_ids(
    tokenizer: Any, messages: list[dict[str, str]], *, prompt: bool = False, **values: str
) -> list[int]:
    """Token ids of a rendered conversation; `prompt` adds the start of an answer, and the template sees `values`."""
    text = render_chat(tokenizer, messages, add_generation_prompt=prompt, **values)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
