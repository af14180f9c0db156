"""Roles that a chat template does not write: each message of such a role gets the nearest role that the template knows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from oribi.chat.rendering import ChatTemplate
from oribi.data.examples import Conversation

# role -> roles that mean the same, the nearest first
NEAREST = {
    "function": ("tool", "ipython"),
    "ipython": ("tool", "function"),
    "tool": ("ipython", "function"),
    "developer": ("system",),
    "system": ("developer",),
}
INSTRUCTIONS = ("system", "developer")


def with_known_roles(conversation: Conversation, template: ChatTemplate) -> tuple[Conversation, list[str]]:
    """A conversation whose roles the template writes, where a role that means the same is one of these.

    Instructions that the template does not write behind other instructions are joined with these.

    Returns:
        The conversation, and a note for each message that was changed.
    """
    messages: list[dict[str, Any]] = []
    trained: list[Any] = []
    notes = []
    for message, mark in zip(conversation.messages, conversation.trained):
        role = message["role"]
        before = messages[-1]["role"] if messages else ""
        after = before if len(messages) < 2 and before in ("", *INSTRUCTIONS) else "user"
        if role in NEAREST and not template.writes_role(role, conversation.tools, after):
            if role in INSTRUCTIONS and after in INSTRUCTIONS:
                notes.append(
                    f"the chat template takes no {role} message behind a {after} message; they are joined"
                )
                texts = messages[-1]["content"], message["content"]
                messages[-1] = {**messages[-1], "content": "\n\n".join(filter(None, texts))}
                trained[-1] = trained[-1] or mark
                continue
            known = next(
                (r for r in NEAREST[role] if template.writes_role(r, conversation.tools, after)), role
            )
            if known != role:
                notes.append(f"the chat template does not know the role {role!r}; it is written as {known!r}")
                message = {**message, "role": known}
        messages.append(message)
        trained.append(mark)
    if not notes:
        return conversation, notes
    return replace(conversation, messages=messages, trained=trained), notes
