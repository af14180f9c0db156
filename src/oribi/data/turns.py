"""The turns of a rendered prompt, for people who read it; what cannot be taken apart is shown as it is."""

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from oribi.data.messages import ROLE_ALIASES

_ROLES = {"system", "developer", "user", "assistant", "tool"}
_OTHER_ROLES = {**ROLE_ALIASES, "ipython": "tool", "chatbot": "assistant", "inst": "user"}


def turns_of(tokenizer: Any, ids: Sequence[int]) -> list[tuple[str, str]] | None:
    """Role and text of each turn of a prompt that a chat template rendered.

    Roles are found where templates write them: as a special token (<|user|>, [INST]), or as a word behind one
    (<|im_start|>user, <|start_header_id|>user<|end_header_id|>).

    Args:
        tokenizer: of the model. ids: of the prompt, [S].

    Returns:
        The turns without the assistant's one that is still to come; None where the tokens do not tell them.
    """
    special = set(tokenizer.all_special_ids)
    special |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    turns: list[tuple[str, str]] = []
    role, text = "", ""
    parts: list[tuple[bool, str]] = []
    for is_special, run in groupby(ids, special.__contains__):
        run = list(run)
        decoded = [tokenizer.decode([one]) for one in run] if is_special else [tokenizer.decode(run)]
        parts += [(is_special, one) for one in decoded]
    in_channel = False  # gpt-oss names the channel of an answer: <|channel|>final<|message|>
    for is_special, part in parts:
        if is_special and (in_channel or "channel" in part):
            in_channel = not in_channel
        elif in_channel:
            continue
        elif not is_special:
            if not role and part.strip():
                head, _, part = part.lstrip().partition("\n")
                role = _role(head)
                if not role:
                    return None
            text += part
        elif _role(part) or text.strip():  # opens a turn, or closes one
            turns += [(role, text.strip())] if text.strip() else []
            # [/INST] ends the question, and the answer follows it
            role, text = ("assistant" if part.startswith("[/") else _role(part)), ""
    if text.strip():
        turns.append((role, text.strip()))
    return turns or None


def _role(written: str) -> str:
    """The role that a word or a token names; "" where it names none."""
    name = re.sub(r"\W", "", written).lower().removesuffix("_token")
    return name if name in _ROLES else _OTHER_ROLES.get(name, "")
