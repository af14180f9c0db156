"""A model is opened in one way: what is shown without weights is what is trained, and what loading refuses is refused everywhere."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from oribi.data.prepare import prepare_dataset
from oribi.errors import ModelError
from oribi.lora.attach import attach_lora
from oribi.models.load import load_model
from oribi.models.open import open_model
from oribi.save.adapter_files import write_adapter
from oribi.save.gguf import save_gguf
from tests.models.tiny_checkpoint import checkpoint

LOAD = {"dtype": "float32", "device_map": "cpu", "max_seq_length": 64, "load_in_4bit": False}
ROWS = [
    {"messages": [{"role": "user", "content": "the 12 cats"}, {"role": "assistant", "content": "on the mat"}]}
]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """One folder for each way in which a model can lie on disk."""
    root = tmp_path_factory.mktemp("models")
    checkpoint(root / "checkpoint")
    shutil.copytree(root / "checkpoint", root / "repaired")
    edit(root / "repaired/tokenizer_config.json", eos_token=None, pad_token=None)
    (root / "repaired/chat_template.jinja").unlink()
    checkpoint(root / "wrapper", "gemma3_text", vision_config=None)
    file = root / "wrapper/config.json"
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    outer = {"model_type": "gemma3", "text_config": json.loads(file.read_text()), "vision_config": vision}
    file.write_text(json.dumps(outer))
    model, tokenizer = load_model(str(root / "checkpoint"), **LOAD)
    save_gguf(model, root / "gguf", tokenizer, "f32", verify=False)
    model = attach_lora(model, r=2)
    write_adapter(model, root / "adapter")
    write_adapter(model, root / "adapter of another template", chat_template=TEMPLATE)
    write_adapter(model, root / "adapter with a tokenizer")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(root / "adapter with a tokenizer")
    (root / "run").mkdir()
    shutil.copytree(root / "adapter", root / "run/adapter")
    return root


@pytest.mark.parametrize(
    "kind",
    ["checkpoint", "repaired", "wrapper", "gguf", "adapter", "adapter of another template",
     "adapter with a tokenizer", "run"],
)  # fmt: skip
def test_tokens_shown_without_weights_are_those_that_training_sees(models, kind):
    shown = open_model(str(models / kind)).tokenizer()
    trained = load_model(str(models / kind), **LOAD)[1]
    for field in ("eos_token", "pad_token", "bos_token", "chat_template", "padding_side"):
        assert getattr(shown, field) == getattr(trained, field), field
    assert shown.get_vocab() == trained.get_vocab()
    one, other = (
        prepare_dataset(ROWS, t, max_seq_length=64, announce=None, progress=False).dataset[0]
        for t in (shown, trained)
    )
    assert one["input_ids"] == other["input_ids"]
    assert one["labels"] == other["labels"]


def test_an_adapters_chat_template_is_the_one_that_it_was_trained_with(models):
    for kind in ("adapter of another template", "adapter with a tokenizer"):
        assert open_model(str(models / kind)).tokenizer().chat_template == TEMPLATE


def link_out(folder: Path) -> None:
    (folder / "generation_config.json").rename(folder.parent / "secret")
    (folder / "generation_config.json").symlink_to(folder.parent / "secret")


def write_index(weight_map: object):
    def write(folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return write


HOSTILE = {
    "a link to a file elsewhere": (link_out, "outside its folder"),
    "a shard elsewhere": (write_index({"model.norm.weight": "../secret.safetensors"}), "is refused"),
    "an absolute shard": (write_index({"model.norm.weight": "/etc/passwd"}), "is refused"),
    "no names of shards": (write_index({"model.norm.weight": 3}), "is not an index of shards"),
    "a config of a billion layers": (
        lambda folder: edit(folder / "config.json", num_hidden_layers=10**9), "num_hidden_layers"
    ),
}  # fmt: skip
CONFIG = "model: {model}\ndataset: {data}\noutput_dir: {model}-run\n"
COMMANDS = {
    "chat": "chat {model}",
    "inspect model": "inspect model {model}",
    "inspect data": "inspect data {data} --model {model}",
    "init": "init {model} {data}",
    "estimate": "estimate {config}",
    "train": "train {config}",
    "export": "export {model} --to gguf:f32",
    "eval": "eval {model} --dataset {data}",
}


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")
@pytest.mark.parametrize("way", [*COMMANDS, "load", "load an adapter"])
@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_folder_is_refused_on_every_way_in(models, oribi, data_file, tmp_path, case, way):
    folder = shutil.copytree(models / "checkpoint", tmp_path / "model")
    harm, says = HOSTILE[case]
    harm(folder)
    if way in COMMANDS:
        names = {"model": folder, "data": data_file, "config": tmp_path / "config.yaml"}
        names["config"].write_text(CONFIG.format(**names))
        result = oribi(*COMMANDS[way].format(**names).split())
        assert result.code == 1
        said = " ".join(result.err.split())
    else:
        if way == "load an adapter":
            shutil.copytree(models / "adapter", tmp_path / "adapter")
            edit(tmp_path / "adapter/adapter_config.json", base_model_name_or_path=str(folder))
            folder = tmp_path / "adapter"
        with pytest.raises(ModelError) as caught:
            load_model(str(folder), **LOAD)
        said = str(caught.value)
    assert says in said
