"""What comes with a model or a data set runs no code, reads no other file and reaches no network unless asked."""

import json
import logging
import os
import pickle
import shutil
import socket
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from oribi.errors import OribiError
from oribi.models.load import load_model
from oribi.selftest.subject import Subject, write_small_model


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_small_model(tmp_path / "model")


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def load(path: Path | str, **options):
    return load_model(str(path), dtype="float32", device_map="cpu", max_seq_length=64, **options)


def test_pickled_weights_are_refused_and_run_nothing_even_when_asked_for(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Bomb(tmp_path / "boom")}))
    with pytest.raises(OribiError, match="read only on request"):
        load(folder)
    with pytest.raises(OribiError, match="no file of tensors alone"):
        load(folder, use_safetensors=False)
    torch.save({"model.norm.weight": Bomb(tmp_path / "boom")}, folder / "pytorch_model.bin")
    with pytest.raises(OribiError, match="no file of tensors alone"):
        load(folder, use_safetensors=False)
    assert not (tmp_path / "boom").exists()


def test_a_pickled_adapter_is_refused_and_runs_nothing(folder, tmp_path):
    model, _ = Subject(str(folder), "cpu").load()
    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({**weights, "x": Bomb(tmp_path / "boom")}, adapter / "adapter_model.bin")
    with pytest.raises(OribiError, match=r"no adapter_model\.safetensors"):
        load(adapter)
    assert not (tmp_path / "boom").exists()


def test_code_that_comes_with_a_model_does_not_run(folder, tmp_path):
    boom = f"import os; os.mkdir({str(tmp_path / 'boom')!r})\n"
    (folder / "configuration_x.py").write_text(boom + "from transformers import LlamaConfig as XConfig\n")
    (folder / "modeling_x.py").write_text(boom + "from transformers import LlamaForCausalLM as XModel\n")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "no-such-model"
    config["auto_map"] = {
        "AutoConfig": "configuration_x.XConfig",
        "AutoModelForCausalLM": "modeling_x.XModel",
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(OribiError, match="trust_remote_code"):
        load(folder)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/../../secret.safetensors", "..\\secret"]
)
def test_an_index_cannot_name_files_elsewhere(folder, name):
    shutil.copy(folder / "model.safetensors", folder.parent / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": name}})
    )
    with pytest.raises(OribiError, match="is refused"):
        load(folder)


@pytest.mark.parametrize(
    "text",
    [
        '{"weight_map": {"model.norm.weight": 3}}',
        "[]",
        "{",
        '{"weight_map": []}',
        '{"weight_map": {"a": ["b"]}}',
        "[" * 100_000,
    ],
)
def test_a_damaged_index_is_an_error(folder, text):
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(OribiError):
        load(folder)


@pytest.mark.parametrize("name", ["rows.pkl", "rows.zip", "rows.tar.gz", "rows.jsonl.pkl"])
def test_archives_and_pickles_of_data_are_refused_unopened(tmp_path, name):
    from oribi.data.sources import open_source

    bomb = pickle.dumps(Bomb(tmp_path / "boom"))
    if name.endswith("zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("../escaped.jsonl", '{"text": "a"}')
    elif name.endswith("tar.gz"):
        (tmp_path / "inner").write_bytes(bomb)
        with tarfile.open(tmp_path / name, "w:gz") as archive:
            archive.add(tmp_path / "inner", arcname="../escaped")
    else:
        (tmp_path / name).write_bytes(bomb)
    with pytest.raises(OribiError, match="cannot read"):
        open_source(str(tmp_path / name))
    assert not (tmp_path / "boom").exists()
    assert not list(tmp_path.parent.glob("escaped*"))


def test_a_link_out_of_a_folder_of_data_is_not_followed(tmp_path):
    from oribi.data.sources import open_source

    (tmp_path / "secret.jsonl").write_text('{"text": "secret"}\n')
    data = tmp_path / "data"
    data.mkdir()
    (data / "own.jsonl").write_text('{"text": "own"}\n')
    (data / "link.jsonl").symlink_to(data / "own.jsonl")
    assert len(list(open_source(str(data))[0].rows())) == 2
    (data / "out.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(OribiError, match=r"out\.jsonl: a link to .*secret\.jsonl, outside its folder"):
        open_source(str(data))
    # as the hub's cache lays them out
    snapshot = tmp_path / "datasets--a--b/snapshots/1"
    snapshot.mkdir(parents=True)
    blob = tmp_path / "datasets--a--b/blobs/x"
    blob.parent.mkdir()
    blob.write_text('{"text": "own"}\n')
    (snapshot / "rows.jsonl").symlink_to(blob)
    assert len(list(open_source(str(snapshot))[0].rows())) == 1


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.mkdir('boom') }}",
        "{{ messages.__class__.__base__ }}{{ (messages|attr('__class__')).__mro__ }}",
        "{% for m in messages %}{{ m.__init__.__globals__ }}{% endfor %}",
    ],
)
def test_templates_cannot_reach_python(folder, tmp_path, monkeypatch, template):
    from datasets import Dataset

    from oribi.data.prepare import prepare_dataset

    monkeypatch.chdir(tmp_path)
    _, tokenizer = load(folder)
    tokenizer.chat_template = template
    rows = Dataset.from_list(
        [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    )
    with pytest.raises(OribiError):
        prepare_dataset(rows, tokenizer, max_seq_length=64, announce=None, progress=False)
    assert not (tmp_path / "boom").exists()


def test_offline_means_no_connection_and_a_token_is_never_shown(monkeypatch, caplog, capfd):
    tried = []

    def refuse(*arguments, **keywords):
        tried.append(arguments)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    secret = "hf_" + "s" * 34
    with caplog.at_level(logging.DEBUG), pytest.raises(OribiError) as caught:
        load("someone/no-such-model", token=secret)
    assert tried == []
    shown = str(caught.value) + repr(caught.value) + caplog.text + "".join(capfd.readouterr())
    assert secret not in shown


def test_a_damaged_checkpoint_is_an_error(folder):
    whole = (folder / "model.safetensors").read_bytes()
    for damaged in (whole[:100], b"version https://git-lfs", b"", whole[:-1000]):
        (folder / "model.safetensors").write_bytes(damaged)
        with pytest.raises(OribiError, match="model.safetensors"):
            load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(OribiError, match=r"config\.json"):
        load(folder)
