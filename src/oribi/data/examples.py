"""What a row becomes: a Conversation, a Document or Tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from oribi.data.messages import Trained


@dataclass(slots=True, kw_only=True)
class Remarks:
    """What is to be said about a row beside its example.

    `unused` are its columns that nothing was read from, `notes` what was changed, `message_keys` what stands in messages that
    only some chat templates read.
    """

    unused: list[str] = field(default_factory=list, compare=False)
    notes: list[str] = field(default_factory=list, compare=False)
    message_keys: list[str] = field(default_factory=list, compare=False)


@dataclass(slots=True)
class Conversation(Remarks):
    """Messages as a chat template takes them.

    `trained` has one entry per message: True or False where the row says so, None where the run's `train_on` decides, and
    spans of characters of the content that are not trained where the rest of the message is. `marked`: some entry is the row's.
    `completes`: the row is a prompt with a completion.
    """

    messages: list[dict[str, Any]]
    trained: list[Trained]
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    marked: bool = field(default=False, compare=False)
    completes: bool = field(default=False, compare=False)


@dataclass(slots=True)
class Document(Remarks):
    """Plain text, or a block of one that began in an earlier row or goes on in the next; trained from a character on."""

    text: str
    trained_from: int = 0
    begins: bool = True
    ends: bool = True
    from_text_file: bool = field(default=False, compare=False)


@dataclass(slots=True)
class Tokens(Remarks):
    """A row that was tokenised before; labels are not shifted, -100 is untrained."""

    ids: list[int]
    labels: list[int]


Example = Conversation | Document | Tokens
