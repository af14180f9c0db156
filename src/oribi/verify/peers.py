"""What can be asked of whatever answers: a file in llama.cpp, a folder in transformers or PEFT, a server."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from oribi.save.probe_file import Messages, Place, Probe, ProbeFile, Said

_RESUMED = 12  # times that an answer is continued behind a token that differs


class PeerError(Exception):
    """The peer refuses a request or does not answer it; the message is its own."""


@dataclass(frozen=True)
class ChatAnswer:
    """The answer to a conversation.

    Args:
        text: of the answer.
        places: of its tokens, as far as they are the expected ones; [] where the peer gives no log-probabilities.
        prompt_tokens: of the prompt; None where the peer does not say.
        stopped: whether it ended by itself.
    """

    text: str
    places: list[Place]
    prompt_tokens: int | None
    stopped: bool


class Peer(Protocol):
    """Whatever answers. None stands for what it cannot be asked."""

    name: str
    vocabulary: int | None
    by_text: bool  # whether it shows tokens as texts alone

    def said(self, probes: Sequence[Probe]) -> Said | None:
        """The likeliest tokens along each answer, behind the prompt's ids; a place that is not known is {}."""

    def prompt_ids(self, messages: Messages) -> list[int] | None:
        """The ids that it makes of a conversation."""

    def chat(self, probe: Probe) -> ChatAnswer | None:
        """Its answer to a probe's conversation."""

    def ends(self, token: int, prompt: list[int]) -> bool | None:
        """Whether a token ends an answer."""

    def takes(self, token: int) -> bool | None:
        """Whether it has a token of this id."""

    def close(self) -> None:
        """Ends what it runs in."""


def along_answer(
    ask: Callable[[list[int], int], list[tuple[int, Place]]], probe: Probe, texts: Mapping[int, str]
) -> list[Place]:
    """The places of a probe's answer, from a peer that continues prompts greedily.

    Behind a token that differs it is asked again with the expected one in its place.

    Args:
        ask: a prompt's ids and most new tokens -> the tokens and their places.
        probe: its answer is followed.
        texts: as for `shared_places`.
    """
    places: list[Place] = []
    count = len(probe.answer)
    for _ in range(_RESUMED):
        done = len(places)
        if done >= len(probe.answer):
            break
        said = ask(probe.ids + probe.answer[:done], min(count, len(probe.answer) - done))
        # none: it ended at once and does not show the token, or left the first one out
        found = shared_places(said, probe.answer[done:], texts) or [{}]
        places += found
        count = (
            2 * count if len(found) == count else 1
        )  # of an answer that differs, further tokens are of no use
    return places + [{}] * (len(probe.answer) - len(places))


def shown_as_text(said: Said, texts: Mapping[int, str]) -> Said:
    """What a peer that shows tokens as texts can show of what is expected."""
    return [[{id: p for id, p in place.items() if id in texts} for place in places] for places in said]


def shared_places(
    said: Sequence[tuple[int, Place]], expected: Sequence[int], texts: Mapping[int, str]
) -> list[Place]:
    """The places of a reply up to the first token that is not the expected one, that place included.

    Peers leave out tokens that are a part of a character. Where such a token is expected, another that is said may stand behind
    it, so its place is not known.

    Args:
        said: tokens and their places.
        expected: tokens.
        texts: of tokens that are not left out.
    """
    places = []
    for (token, place), wanted in zip(said, expected):
        if token == wanted or wanted in texts:
            places.append(place)
        if token != wanted:
            break
    return places


class TokensByText:
    """Ids of tokens that a peer gives as texts.

    Args:
        probes: knows the texts of all tokens that it names; others get a number below 0.
    """

    def __init__(self, probes: ProbeFile) -> None:
        self._ids: dict[str, int] = {}
        for id, text in probes.texts.items():
            self._ids.setdefault(text, id)

    def place(self, logprobs: Mapping[str, float]) -> Place:
        """A place by ids; parts of characters, which all have the same text, are left out."""
        return {self.id_of(text): p for text, p in logprobs.items() if "\ufffd" not in text}

    def id_of(self, text: str) -> int:
        """The id of a token; the same text has the same number."""
        marked = text.removeprefix("token_id:")
        if marked != text and marked.isdigit():
            return int(marked)
        return self._ids.setdefault(text, -1 - len(self._ids))
