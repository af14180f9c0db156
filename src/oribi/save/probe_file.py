"""probes.json, beside every checked export: prompts, what the exported model must answer, and what other models would.

`oribi verify` asks a file or a server the same and compares. A place is one token of an answer: the log-probabilities of its
likeliest tokens, by id.
"""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import oribi
from oribi.errors import ConfigError
from oribi.text import write_whole

PROBES_FILE = "probes.json"
# of adapter_config.json: what decides how strongly an adapter acts
STRENGTH_SETTINGS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
_SCHEMA = 1
_DIGITS = 4  # of a log-probability
_LEAST = 1e-7  # a probability

Place = dict[int, float]
Said = list[list[Place]]  # by probe, by token of its answer
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Probe:
    """One prompt and the trained model's greedy answer.

    Args:
        ids: of the prompt.
        answer: of the answer, the token that ends it included.
        text: the answer without that token.
        stopped: whether the model ended it by itself.
        messages: the conversation that the chat template renders to `ids`; None where the prompt is none.
    """

    ids: list[int]
    answer: list[int]
    text: str
    stopped: bool
    messages: Messages | None = None


@dataclass(frozen=True)
class ExportedFile:
    """A file of the export.

    Args:
        form: what it is: the dtype of its tensors, "4-bit", or the quantisation method of a GGUF file.
        says: at every place of the probes, by oribi's own reading of the file.
        samples: a few values of each tensor, see `save.samples`; {} where there are none.
        settings: of an adapter: what its strength is computed from.
        stored: how most of its values are stored, see `save.samples`; "" where it has no samples.
    """

    form: str
    says: Said
    samples: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    stored: str = ""


@dataclass
class ProbeFile:
    """What an export must say.

    Args:
        kind: of the export, as in its report.
        base: name of the model that was trained.
        shape: vocab_size, hidden_size and num_hidden_layers, and how many tokens the tokenizer has.
        bos: id of the token that begins a text; None if there is none.
        stops: ids of the tokens that end an answer.
        probes: prompts and answers.
        says: what is said at their places: "trained" by the trained model; "base" without its adapter; "x0.5" and the like with
            the adapter at that strength; and, of prompts that are conversations, "bos twice", "no bos" and "no template".
        files: by name; "." is the folder itself.
        texts: text of each token that occurs; one that is a part of a character is left out.
        template: Jinja text of the chat template; None if there is none, or several.
        template_values: its variables: the special tokens.
        dated: whether the template writes today's date.
        renderings: further conversations and the ids that the template renders them to.
    """

    kind: str
    base: str
    shape: dict[str, int]
    bos: int | None
    stops: list[int]
    probes: list[Probe]
    says: dict[str, Said]
    files: dict[str, ExportedFile]
    texts: dict[int, str] = field(default_factory=dict)
    template: str | None = None
    template_values: dict[str, Any] = field(default_factory=dict)
    dated: bool = False
    renderings: list[dict[str, Any]] = field(default_factory=list)

    def text(self, token: int) -> str:
        """A token's text, as it is named in findings."""
        return self.texts.get(token, f"token {token}")

    def write(self, folder: Path) -> None:
        """Write the file into an export's folder."""
        values = {"oribi": oribi.__version__, "schema": _SCHEMA, **asdict(self)}
        values["says"] = {name: _packed(said) for name, said in self.says.items()}
        for name, file in self.files.items():
            values["files"][name]["says"] = _packed(file.says)
        write_whole(
            folder / PROBES_FILE, json.dumps(values, ensure_ascii=False, separators=(",", ":")) + "\n"
        )


def read_probes(path: Path) -> ProbeFile:
    """The probes of an export.

    Args:
        path: probes.json, or a folder that holds it.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    path = path / PROBES_FILE if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}): it is written by `oribi export` and by runs, beside the files that they "
            "check. Export the model again, without --no-verify, or give --probes FILE"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON ({error}); export the model again") from error
    schema = values.get("schema") if isinstance(values, dict) else None
    if schema != _SCHEMA:
        raise ConfigError(
            f"{path}: schema {schema!r}; this oribi reads schema {_SCHEMA}. Export the model again, or use the oribi that wrote it"
        )
    try:
        given = {field.name: values[field.name] for field in fields(ProbeFile)}
        given["probes"] = [Probe(**probe) for probe in given["probes"]]
        given["says"] = {name: _unpacked(said) for name, said in given["says"].items()}
        given["texts"] = {int(id): text for id, text in given["texts"].items()}
        given["files"] = {
            name: ExportedFile(**{**file, "says": _unpacked(file["says"])})
            for name, file in given["files"].items()
        }
        return ProbeFile(**given)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{path} is damaged ({type(error).__name__}: {error}); export the model again"
        ) from error


def mean_divergence(expected: Said, found: Said) -> float:
    """Mean KL divergence in nats of what was said from what was expected, over the places that both have.

    Of each place only the likeliest tokens are known. One that the other side does not name is there at most as likely as
    the least likely that is named; all others count as one. NaN where no place is shared.
    """
    parts = [
        divergence(place, other)
        for places, others in zip(expected, found)
        for place, other in zip(places, others)
        if place and other
    ]
    return sum(parts) / len(parts) if parts else math.nan


def divergence(expected: Place, found: Place) -> float:
    """KL divergence in nats of a place from the expected one; see `mean_divergence`."""
    count = min(len(expected), len(found))
    expected, found = (dict(sorted(p.items(), key=lambda one: -one[1])[:count]) for p in (expected, found))
    tokens = list(dict.fromkeys([*expected, *found]))
    p, q = _shares(expected, tokens), _shares(found, tokens)
    return max(sum(a * math.log(a / b) for a, b in zip(p, q) if a > 0), 0.0)


def _shares(place: Place, tokens: list[int]) -> list[float]:
    """Probabilities of the tokens and of all others together, which sum to 1."""
    known = {id: math.exp(p) for id, p in place.items()}
    rest = max(1.0 - sum(known.values()), _LEAST)
    missing = sum(token not in known for token in tokens)
    each = min(min(known.values()), rest / (missing + 1))
    shares = [max(known.get(token, each), _LEAST) for token in tokens]
    shares.append(max(rest - each * missing, _LEAST))
    return [share / sum(shares) for share in shares]


def _packed(said: Said) -> list:
    return [[[[id, round(p, _DIGITS)] for id, p in place.items()] for place in places] for places in said]


def _unpacked(said: list) -> Said:
    return [[{int(id): float(p) for id, p in place} for place in places] for places in said]
