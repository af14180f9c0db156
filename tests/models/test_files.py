"""A name on the hub brings only the files that are needed, and what the hub refuses is said in its own words."""

import json
import shutil
import sys
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path

import pytest
from huggingface_hub import errors

from oribi.errors import ModelError
from oribi.memory.architecture import architecture_of
from oribi.models import download as module
from oribi.models.files import HubOptions, locate, weight_files
from oribi.models.load import load_model
from oribi.models.open import open_model
from tests.models.tiny_checkpoint import checkpoint


class Hub:
    """A hub of one repository: `snapshot_download` copies what the patterns ask for and remembers it."""

    def __init__(self, remote: Path, local: Path) -> None:
        self.remote, self.local = remote, local
        self.calls: list[dict] = []

    def __call__(self, name: str, allow_patterns, ignore_patterns, **keywords) -> str:
        self.calls.append({"name": name, **keywords})
        for path in self.remote.rglob("*"):
            relative = str(path.relative_to(self.remote))
            wanted = any(fnmatch(relative, p) for p in allow_patterns)
            refused = any(fnmatch(relative, p) for p in ignore_patterns or ())
            if path.is_file() and wanted and not refused:
                (self.local / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, self.local / relative)
        return str(self.local)

    def files(self) -> set[str]:
        return {str(p.relative_to(self.local)) for p in self.local.rglob("*") if p.is_file()}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    (tmp_path / "remote").mkdir()
    (tmp_path / "local").mkdir()
    made = Hub(tmp_path / "remote", tmp_path / "local")
    monkeypatch.setattr(module, "snapshot_download", made)
    return made


def load(name: str, **arguments):
    return load_model(name, dtype="float32", device_map="cpu", max_seq_length=64, **arguments)


def test_only_the_needed_files_of_a_repository_are_fetched(hub):
    checkpoint(hub.remote, shard_size="200KB")
    for extra in (
        "consolidated.safetensors",
        "pytorch_model.bin",
        "original/params.json",
        "model.gguf",
        "code.py",
    ):
        (hub.remote / extra).parent.mkdir(exist_ok=True)
        (hub.remote / extra).write_bytes(b"large")
    load("owner/name", token="secret", revision="v2")
    shards = {path.name for path in hub.remote.glob("model-*.safetensors")}
    assert len(shards) > 1
    assert hub.files() == shards | {
        "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    assert all((c["name"], c["token"], c["revision"]) == ("owner/name", "secret", "v2") for c in hub.calls)


def test_code_is_fetched_only_when_it_may_run(hub):
    checkpoint(hub.remote)
    (hub.remote / "modeling.py").write_text("")
    load("owner/name", trust_remote_code=True)
    assert "modeling.py" in hub.files()


def test_a_subfolder_is_a_model_of_its_own(hub):
    checkpoint(hub.remote / "inner")
    (hub.remote / "config.json").write_text("{}")
    model, _ = load("owner/name", subfolder="inner")
    assert model.config.model_type == "llama"
    assert all(name.startswith("inner/") for name in hub.files())


def test_pickles_are_fetched_only_on_request(hub):
    import torch

    theirs = checkpoint(hub.remote)
    (hub.remote / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), hub.remote / "pytorch_model.bin")
    with pytest.raises(ModelError, match="use_safetensors=False"):
        load("owner/name")
    assert "pytorch_model.bin" not in hub.files()
    assert load("owner/name", use_safetensors=False)[0].oribi.kind == "pickle"


def test_a_config_beside_a_gguf_file_alone_does_not_hide_it(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "m.gguf").touch()
    assert locate(str(tmp_path), HubOptions()).file == tmp_path / "m.gguf"
    (tmp_path / "model.safetensors").touch()
    assert locate(str(tmp_path), HubOptions()).kind == "checkpoint"


def test_parts_of_one_gguf_file_are_not_offered_for_a_choice(tmp_path):
    for part in (1, 2):
        (tmp_path / f"m-0000{part}-of-00002.gguf").touch()
    assert locate(str(tmp_path), HubOptions()).file == tmp_path / "m-00001-of-00002.gguf"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hf.co/owner/name-GGUF:Q4_K_M", r"use for 'owner/name-GGUF'.*hf download owner/name-GGUF --include '\*Q4_K_M\*.gguf'"),
        ("owner/name-GGUF:Q4_K_M", "use for 'owner/name-GGUF'.*gguf_file="),
        ("https://huggingface.co/owner/name", "use for 'owner/name'$"),
    ],
)  # fmt: skip
def test_names_of_other_programs_are_answered_with_the_one_here(name, words):
    with pytest.raises(ModelError, match=words):
        locate(name, HubOptions())


def test_the_ending_of_a_gguf_file_may_be_in_capitals(tmp_path):
    (tmp_path / "M.GGUF").touch()
    assert locate(str(tmp_path / "M.GGUF"), HubOptions()).kind == "gguf"


def test_one_gguf_file_of_a_repository_is_fetched_by_name(hub):
    for name in ("a.gguf", "b.gguf"):
        (hub.remote / name).write_bytes(b"GGUF")
    location = locate("owner/name", HubOptions(), gguf_file="b.gguf")
    assert (location.kind, location.name, location.file.name) == ("gguf", "owner/name", "b.gguf")
    assert hub.files() == {"b.gguf"}
    with pytest.raises(ModelError, match=r"has no file c.gguf"):
        locate("owner/name", HubOptions(), gguf_file="c.gguf")


def refusal(kind: type[Exception]) -> Exception:
    if issubclass(kind, errors.HfHubHTTPError):
        web = import_module(errors.Response.__module__.partition(".")[0])  # httpx, later httpx2
        return kind("no", response=web.Response(403, request=web.Request("GET", "https://hub")))
    return kind("no")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            errors.GatedRepoError,
            "owner/name is gated: accept its terms on its page of the hub, then log in with `hf auth login`",
        ),
        (errors.RepositoryNotFoundError, "the hub has no model 'owner/name', or it is private"),
        (errors.RevisionNotFoundError, "owner/name has no revision 'v9'"),
        (errors.LocalEntryNotFoundError, "is not in the hub's cache, and the hub could not be reached"),
        (errors.HfHubHTTPError, "could not be fetched from the hub: no"),
        (OSError, "could not be fetched from the hub: no"),
    ],
)
def test_what_the_hub_refuses_is_said(kind, words, monkeypatch):
    def refuse(*arguments, **keywords):
        raise refusal(kind)

    monkeypatch.setattr(module, "snapshot_download", refuse)
    with pytest.raises(ModelError, match=words):
        load("owner/name", revision="v9")


def test_a_local_directory_is_never_looked_up_on_the_hub(tmp_path, monkeypatch):
    checkpoint(tmp_path)
    monkeypatch.setattr(module, "snapshot_download", lambda *a, **k: pytest.fail("the hub was asked"))
    load(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no .safetensors weights"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content"), [("model.safetensors.index.json", "{}"), ("config.json", "{oops")]
)
def test_damaged_json_is_named(name, content, tmp_path):
    checkpoint(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match=r"is not an index of shards|config.json:1: no valid JSON"):
        load(str(tmp_path))


def test_the_last_checkpoint_of_a_run_is_taken(tmp_path):
    for step in (5, 40, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}/adapter_config.json").write_text("{}")
    location = locate(str(tmp_path), HubOptions())
    assert (location.kind, location.directory.name) == ("adapter", "checkpoint-100")
    assert "is a run: loading its checkpoint-100" in location.notes[0]


def test_weight_files_of_a_single_file_with_another_name(tmp_path):
    checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    (tmp_path / "consolidated.safetensors").write_bytes(b"")
    assert [p.name for p in weight_files(locate(str(tmp_path), HubOptions()), HubOptions())] == [
        "weights.safetensors"
    ]


@pytest.fixture
def adapter(tmp_path) -> Path:
    """A saved adapter on the model in tmp_path/models/llama."""
    from oribi.lora.attach import attach_lora

    checkpoint(tmp_path / "models/llama")
    model, _ = load(str(tmp_path / "models/llama"))
    attach_lora(model, r=4, lora_alpha=4).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def no_hub(monkeypatch) -> list[str]:
    """Names that the hub was asked for, while it cannot be reached."""
    asked = []

    def refuse(name, **keywords):
        asked.append(name)
        raise errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(module, "snapshot_download", refuse)
    return asked


@pytest.mark.parametrize(
    ("base", "words", "names"),
    [
        ("/home/someone/llama", "there is no folder /home/someone/llama", []),
        ("C:\\models\\llama", r"there is no folder C:\\models", []),
        ("../llama", r"there is no folder \.\./llama", []),
        ("./models/llama", r"there is no folder \./models/llama", []),
        ("someone/llama", "is not in the hub's cache, and the hub could not be reached", ["someone/llama"]),
        ("", "names no base_model_name_or_path", []),
        (None, "names no base_model_name_or_path", []),
        (["llama"], "names no base_model_name_or_path", []),
    ],
)
def test_a_base_that_is_not_here_is_named_with_what_to_do(adapter, no_hub, base, words, names):
    edit(adapter / "adapter_config.json", base_model_name_or_path=base)
    for attempt in (load, open_model, architecture_of):
        with pytest.raises(ModelError, match=words) as caught:
            attempt(str(adapter))
        assert str(adapter / "adapter_config.json") in str(caught.value)
        assert "on the hub" in str(caught.value)
    assert no_hub == 3 * names


def test_an_adapter_on_an_adapter_is_refused(adapter):
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(adapter))
    with pytest.raises(ModelError, match="which is an adapter itself"):
        load(str(adapter))


def test_a_folder_with_a_name_like_the_hubs_is_kept_as_a_folder(adapter, no_hub, tmp_path, monkeypatch):
    from oribi.lora.attach import attach_lora

    monkeypatch.chdir(tmp_path)
    model, _ = load("models/llama")
    attach_lora(model, r=4, lora_alpha=4).save_pretrained("mine")
    model, _ = load("mine")
    note = f"mine is an adapter on ./models/llama, found at {tmp_path / 'models/llama'}"
    assert note in model.oribi.notes
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="there is no folder ./models/llama"):
        load(str(tmp_path / "mine"))
    assert no_hub == []


TEXTS = [
    "config.json",
    "tokenizer.json",
    "chat_template.jinja",
    "additional_chat_templates/x.jinja",
    "code.py",
]


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")
@pytest.mark.parametrize("name", TEXTS)
def test_a_linked_text_of_a_model_must_lie_in_its_folder_or_the_hubs_cache(tmp_path, name):
    folder = tmp_path / "model"
    checkpoint(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    content = (folder / name).read_text() if (folder / name).exists() else "{{ messages }}"
    (tmp_path / "secret").write_text(content)

    def link(target: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content)
        (folder / name).symlink_to(target)

    link(tmp_path / "secret")
    with pytest.raises(ModelError, match=r"a link to .*secret, outside its folder"):
        load(str(folder))
    link(tmp_path / "hub/models--a--b/blobs/1234")
    load(str(folder))
    link(folder / "inner/own")
    load(str(folder))
    (tmp_path / "short").symlink_to(folder)
    load(str(tmp_path / "short"))


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")
def test_linked_weights_may_lie_anywhere_and_must_be_weights(tmp_path):
    checkpoint(tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    (tmp_path / "large").mkdir()
    weights.rename(tmp_path / "large/weights")
    weights.symlink_to(tmp_path / "large/weights")
    load(str(tmp_path / "model"))
    (tmp_path / "large/weights").write_text("secret:x:0:0\n" * 10)
    with pytest.raises(ModelError, match="model.safetensors") as caught:
        load(str(tmp_path / "model"))
    assert "secret" not in str(caught.value)


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
