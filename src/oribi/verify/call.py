"""The sequence of `oribi verify`: probes are read, the target is opened and asked, and what it said becomes findings."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from oribi.errors import ConfigError, ExportError
from oribi.gguf import llama_cpp
from oribi.gguf.source import GGUFSource
from oribi.models.decoder import build
from oribi.models.expert_tensors import unstacked
from oribi.models.files import HubOptions, open_weights, read_json
from oribi.models.open import open_model
from oribi.models.wrapper import renaming, wrapper_names
from oribi.save.check import Check, Outcome
from oribi.save.nf4_checkpoint import Nf4Source
from oribi.save.probe_file import PROBES_FILE, STRENGTH_SETTINGS, ExportedFile, ProbeFile, read_probes
from oribi.save.samples import sample_all, stored_as
from oribi.tensors import SafetensorsSource, TensorSource
from oribi.text import one_of
from oribi.verify.local import InLlamaCpp, InTransformers
from oribi.verify.peers import Peer, PeerError, shown_as_text
from oribi.verify.prompts import check_chat, check_prompts, check_stops
from oribi.verify.samples import check_samples
from oribi.verify.server import Server
from oribi.verify.weights import check_weights

_SERVED = ("http://", "https://")


def verify_target(
    target: str,
    *,
    probes: str | Path | None = None,
    file: str | None = None,
    model: str | None = None,
    base: str | None = None,
    api_key: str | None = None,
) -> list[Check]:
    """Whether a file, a folder or a server answers as the trained model; if not, the findings say what is wrong.

    Args:
        target: a GGUF file, the folder of one, of a checkpoint or of an adapter, or a server's address with /v1.
        probes: probes.json of the export, or its folder; None takes the one beside the target.
        file: name of the exported file that answers, where the export has several; None takes the target's own.
        model: the server's name of the model; None takes its only one.
        base: of an adapter: folder of the base, or its GGUF file; None takes the one that the adapter names.
        api_key: of the server.

    Raises:
        ConfigError: the target, the probes or a name does not exist.
        ModelError, ExportError: the target cannot be loaded.
    """
    found = read_probes(_probes_of(target, probes))
    if not found.probes:
        raise ConfigError("probes.json has no probes: the export had no prompt to answer")
    target = _gguf_within(target, found, file) or target
    expected = _expected_file(found, target, file)
    if target.startswith(_SERVED):
        return _ask(found, expected, lambda: Server(target, model, found, api_key))
    path = Path(target)
    if not path.exists():
        raise ConfigError(
            f"{target} does not exist; give a GGUF file, a folder, or an address such as http://localhost:8000/v1"
        )
    if path.suffix == ".gguf":
        return _verify_gguf(found, expected, path, base)
    checks = _check_strength(expected, path)
    if (sampled := _stored_tensors(path)) is not None:
        checks += _sampled(expected, sampled)
    return checks + _ask(found, expected, lambda: InTransformers(path, base))


def _gguf_within(target: str, probes: ProbeFile, asked: str | None) -> str | None:
    """The GGUF file that a folder of nothing else means; None where the target is something else.

    Raises:
        ConfigError: the folder has several, and none is named.
    """
    folder = Path(target)
    files = {path.name: path for path in sorted(folder.glob("*.gguf"))} if folder.is_dir() else {}
    if not files or any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return None
    forms = {file.form: name for name, file in probes.files.items() if name in files}
    asked = forms.get(asked, asked)
    if asked not in files and len(files) > 1:
        raise ConfigError(
            f"{target} has {len(files)} GGUF files; verify one of them, by its path or with --file: {', '.join(files)}"
        )
    return str(files.get(asked) or next(iter(files.values())))


def _verify_gguf(probes: ProbeFile, expected: ExportedFile, path: Path, base: str | None) -> list[Check]:
    if probes.kind == "gguf-adapter":
        if base is None:
            raise ConfigError(f"{path} is an adapter; give the GGUF file that it acts on with --base FILE")
        return _ask(probes, expected, lambda: InLlamaCpp(Path(base), probes, path))
    checks = _sampled(expected, GGUFSource(path))
    if not llama_cpp.is_installed():
        says = "xllamacpp is not installed (pip install xllamacpp)"
        return [*checks, Check("answers in llama.cpp", Outcome.NOT_RUN, says)]
    return checks + _ask(probes, expected, lambda: InLlamaCpp(path, probes))


def _probes_of(target: str, given: str | Path | None) -> Path:
    if given is not None:
        return Path(given)
    if target.startswith(_SERVED):
        near = sorted(Path().glob(f"runs/*/*/{PROBES_FILE}"), key=lambda path: path.stat().st_mtime)
        if Path(PROBES_FILE).is_file():
            return Path(PROBES_FILE)
        if near:
            return near[-1]
        raise ConfigError(
            f"no {PROBES_FILE} is here or in runs/; give that of the export that is served: --probes FOLDER"
        )
    path = Path(target)
    return path if path.is_dir() else path.parent


def _expected_file(probes: ProbeFile, target: str, asked: str | None) -> ExportedFile:
    """The exported file that should answer: as named, the target's own, the only one, or else the trained model itself."""
    named = {**probes.files, **{file.form: file for file in probes.files.values()}}
    if asked is not None:
        if asked not in named:
            raise ConfigError(f"--file {asked}: {PROBES_FILE} has no such file; it {one_of(asked, named)}")
        return named[asked]
    own = probes.files.get(Path(target).name)
    if own is None and len(probes.files) == 1:
        own = next(iter(probes.files.values()))
    if own is None and len(probes.files) > 1:
        raise ConfigError(
            f"the export has {len(probes.files)} files; name the one that answers with --file: {', '.join(probes.files)}"
        )
    return own or ExportedFile("trained", probes.says["trained"])


def _stored_tensors(folder: Path) -> TensorSource | None:
    """A folder's tensors as the export's samples name them; None where they are others."""
    adapter = sorted(folder.glob("adapter_model*.safetensors"))
    if adapter:
        return SafetensorsSource(adapter, any_dtype=True)
    if not any(folder.glob("model*.safetensors")):
        return None
    opened = open_model(str(folder), HubOptions(local_files_only=True))
    names = wrapper_names(opened.whole) if opened.fused and opened.is_part else None
    source = open_weights(opened.location, opened.hub, renaming(names))
    return Nf4Source(unstacked(source, build(opened.config)) if opened.fused else source)


def _sampled(expected: ExportedFile, source: TensorSource) -> list[Check]:
    if not expected.samples or not set(expected.samples) & set(source.shapes()):
        return []
    stored, found = stored_as(source), []
    other_form = bool(expected.stored) and stored != expected.stored
    if other_form:
        says = f"its tensors are stored as {stored}, those of the export as {expected.stored}"
        advice = "verify it against its own export, or serve the file of this one"
        found.append(Check("quantisation", Outcome.DIFFERENT, says, {}, advice))
    finding = check_samples(expected.samples, sample_all(source), rounded_otherwise=other_form)
    source.close()
    return found + [finding] * (finding is not None)


def _check_strength(expected: ExportedFile, folder: Path) -> list[Check]:
    """Whether an adapter's settings give it the strength that it was trained with."""
    settings = folder / "adapter_config.json"
    if not settings.is_file() or not expected.settings:
        return []
    found = {name: read_json(settings).get(name) for name in STRENGTH_SETTINGS}
    other = {name: value for name, value in expected.settings.items() if found[name] != value}
    if not other:
        return [
            Check(
                "adapter's strength", Outcome.EQUAL, "r, lora_alpha and use_rslora are those of the training"
            )
        ]
    says = ", ".join(f"{name} is {found[name]}, was {value} in training" for name, value in other.items())
    advice = f"restore {settings.name} of the export"
    return [Check("adapter's strength", Outcome.DIFFERENT, says, {}, advice)]


def _ask(probes: ProbeFile, expected: ExportedFile, connect: Callable[[], Peer]) -> list[Check]:
    """Open what answers, ask it everything, and say what is wrong."""
    try:
        peer = connect()
    except ExportError as error:
        return [Check("loads", Outcome.DIFFERENT, str(error), {}, "serve the export beside probes.json")]
    try:
        return _findings(probes, expected, peer)
    finally:
        peer.close()


def _findings(probes: ProbeFile, expected: ExportedFile, peer: Peer) -> list[Check]:
    said, why = None, "it continues no prompts of token ids, or gives no log-probabilities"
    try:
        said = peer.said(probes.probes)
    except PeerError as error:
        why = str(error)
    if peer.by_text:
        probes = replace(
            probes, says={name: shown_as_text(one, probes.texts) for name, one in probes.says.items()}
        )
        expected = replace(expected, says=shown_as_text(expected.says, probes.texts))
    weights = (
        Check("weights", Outcome.NOT_TESTED, why) if said is None else check_weights(probes, expected, said)
    )
    prompts, stops = check_prompts(probes, peer), check_stops(probes, peer)
    # where anything else is wrong, so are the answers, for a reason that is known
    compares = all(check.passed for check in (weights, *prompts, *stops))
    chat = check_chat(probes, expected, peer, by_ids=bool(prompts)) if compares else []
    return [weights, *prompts, *chat, *stops]
