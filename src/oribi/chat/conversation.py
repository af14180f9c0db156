"""A conversation as chat templates take it, and roles that a template does not know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

Span = tuple[int, int]  # [start, end) of characters
# of a message: trained, not trained, as the run's train_on says, or trained except for these spans of its content
Trained = bool | None | tuple[Span, ...]

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
INSTRUCTIONS = ("system", "developer")
REASONING_FIELDS = (
    "reasoning_content",
    "reasoning",
    "thinking",
)  # the keys under which templates read thoughts
# role -> roles that mean the same, the nearest first
NEAREST = {
    "function": ("tool", "ipython"),
    "ipython": ("tool", "function"),
    "tool": ("ipython", "function"),
    "developer": ("system",),
    "system": ("developer",),
}


@dataclass(slots=True, kw_only=True)
class Remarks:
    """What a report says about a row besides its example.

    `unused` are columns that nothing was read from, `notes` what was changed, `message_keys` keys of messages that only some
    chat templates read.
    """

    unused: list[str] = field(default_factory=list, compare=False)
    notes: list[str] = field(default_factory=list, compare=False)
    message_keys: list[str] = field(default_factory=list, compare=False)


@dataclass(slots=True)
class Conversation(Remarks):
    """Messages as a chat template takes them.

    `trained` has one entry per message: True or False where the row says so, None where the run's `train_on` decides, or the
    spans of the content that are not trained. `marked`: at least one entry comes from the row. `completes`: the row is a prompt
    with a completion.
    """

    messages: list[dict[str, Any]]
    trained: list[Trained]
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    marked: bool = field(default=False, compare=False)
    completes: bool = field(default=False, compare=False)


def with_known_roles(
    conversation: Conversation, writes_role: Callable[[str, Any, str], bool]
) -> tuple[Conversation, list[str]]:
    """Replace roles that a template does not write by the nearest role that it writes.

    Instructions that the template does not write after other instructions are joined with those.

    Args:
        conversation: as the row has it.
        writes_role: `ChatTemplate.writes_role` of the template.

    Returns:
        The conversation, and a note for each message that was changed.
    """
    messages: list[dict[str, Any]] = []
    trained: list[Trained] = []
    notes = []
    for message, mark in zip(conversation.messages, conversation.trained):
        role = message["role"]
        before = messages[-1]["role"] if messages else ""
        after = before if len(messages) < 2 and before in ("", *INSTRUCTIONS) else "user"
        if role in NEAREST and not writes_role(role, conversation.tools, after):
            if role in INSTRUCTIONS and after in INSTRUCTIONS:
                notes.append(
                    f"the chat template takes no {role} message behind a {after} message; they are joined"
                )
                texts = messages[-1]["content"], message["content"]
                messages[-1] = {**messages[-1], "content": "\n\n".join(filter(None, texts))}
                trained[-1] = trained[-1] or mark
                continue
            known = next((r for r in NEAREST[role] if writes_role(r, conversation.tools, after)), role)
            if known != role:
                notes.append(f"the chat template does not know the role {role!r}; it is written as {known!r}")
                message = {**message, "role": known}
        messages.append(message)
        trained.append(mark)
    return (replace(conversation, messages=messages, trained=trained) if notes else conversation), notes
