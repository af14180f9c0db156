"""An adapter is whole or it is not read, and it is read on what it was trained on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from oribi.compat.language_model import FastLanguageModel
from oribi.errors import ModelError
from oribi.lora.contents import read_adapter
from oribi.models.adapter_files import RECORD_FILE
from oribi.models.load import load_model
from oribi.train.arguments import SFTConfig
from oribi.train.trainer import SFTTrainer
from tests.models.tiny_checkpoint import checkpoint, edit_config, edit_tensors

IDS = torch.arange(3, 43)[None]
LOAD = {"dtype": "float32", "device_map": "cpu", "max_seq_length": 64}
SOME = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "base"
    checkpoint(folder, num_hidden_layers=2)
    return folder


def trained(base: Path, **arguments):
    """A model with an adapter that does something, and its tokenizer."""
    model, tokenizer = FastLanguageModel.from_pretrained(str(base), **{**LOAD, **arguments})
    model = FastLanguageModel.get_peft_model(model, r=4)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model, tokenizer


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    """An adapter trained on 16-bit weights."""
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    trained(base, load_in_4bit=False)[0].save_pretrained(str(folder))
    return folder


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(IDS).logits


def edit_file(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_settings(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def under_another_prefix(tensors) -> None:
    for name in list(tensors):
        tensors[name.replace("base_model.model.", "base_model.model.text.")] = tensors.pop(name)


DAMAGE = {
    "a missing tensor": (lambda folder: edit_file(folder, lambda t: t.pop(SOME)), "1 missing"),
    "no tensor at all": (lambda folder: save_file({}, folder / "adapter_model.safetensors"), "28 missing"),
    "another prefix": (lambda folder: edit_file(folder, under_another_prefix), "28 missing.*28 belonging"),
    "one layer too many": (
        lambda folder: edit_file(
            folder, lambda t: t.update({SOME.replace("layers.1", "layers.7"): t[SOME].clone()})
        ),
        "1 belonging to no layer",
    ),
    "a wrong shape": (
        lambda folder: edit_file(folder, lambda t: t.update({SOME: t[SOME][:, :32].contiguous()})),
        "1 of another shape",
    ),
    "a value that is no number": (
        lambda folder: edit_file(folder, lambda t: t[SOME].view(-1)[:1].fill_(float("nan"))),
        "not finite",
    ),
    "DoRA switched on": (lambda folder: edit_settings(folder, use_dora=True), "14 missing"),
    "another rank": (lambda folder: edit_settings(folder, r=8), "28 of another shape"),
    "an unknown kind": (lambda folder: edit_settings(folder, peft_type="NONE"), "knows no such adapter"),
    "a list for settings": (
        lambda folder: (folder / "adapter_config.json").write_text("[]"),
        "got a list",
    ),
}  # fmt: skip


def read_by_load(folder: Path, base: Path) -> None:
    load_model(str(folder), **LOAD)


def read_by_inspect(folder: Path, base: Path) -> None:
    read_adapter(str(folder))


def read_as_second_adapter(folder: Path, base: Path) -> None:
    model, _ = trained(base, load_in_4bit=False)
    model.load_adapter(str(folder), "second")


@pytest.mark.parametrize("read", [read_by_load, read_by_inspect, read_as_second_adapter])
@pytest.mark.parametrize("damage", DAMAGE)
def test_an_adapter_that_is_not_whole_is_an_error_wherever_it_is_read(damage, read, adapter, base, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    change, words = DAMAGE[damage]
    change(folder)
    # inspection looks at skeletons of other classes, and says so in other words
    with pytest.raises(ModelError, match=words if read is read_by_load else None):
        read(folder, base)


SAME_SIZE = {  # a checkpoint whose file has another size is refused before it is read
    "another layer": lambda t: t.update({SOME.replace("layers.1", "layers.7"): t.pop(SOME)}),
    "a value that is no number": lambda t: t[SOME].view(-1)[:1].fill_(float("nan")),
}


@pytest.mark.parametrize("damage", SAME_SIZE)
def test_resume_refuses_a_checkpoint_whose_adapter_is_not_whole(damage, base, tmp_path):
    def trainer():
        model, tokenizer = trained(base, load_in_4bit=False)
        args = SFTConfig(
            output_dir=str(tmp_path), max_steps=2, save_steps=1, disable_tqdm=True, save_strategy="steps",
            dataset_kwargs={"skip_prepare_dataset": True}, per_device_train_batch_size=1,
        )  # fmt: skip
        rows = [{"input_ids": list(range(3, 20)), "labels": list(range(3, 20))}] * 4
        from datasets import Dataset

        return SFTTrainer(model, args, train_dataset=Dataset.from_list(rows), tokenizer=tokenizer)

    trainer().train()
    folder = tmp_path / "checkpoint-1"
    assert (folder / RECORD_FILE).is_file()
    edit_file(folder, SAME_SIZE[damage])
    with pytest.raises(ModelError, match=r"1 missing.*1 belonging|not finite"):
        trainer().train(resume_from_checkpoint=str(folder))


def test_an_adapter_loads_on_what_it_was_trained_on_unless_told_otherwise(base, adapter, tmp_path):
    expected = logits(trained(base, load_in_4bit=False)[0])
    found, _ = load_model(str(adapter), **LOAD)
    assert not found.oribi.load_in_4bit
    assert read_adapter(str(adapter)).facts()["trained on"] == "float32 weights"
    assert torch.equal(logits(found), expected)
    packed, _ = load_model(str(adapter), **LOAD, load_in_4bit=True)
    assert packed.oribi.load_in_4bit
    assert any("trained on float32 weights and is loaded on nf4 ones" in note for note in packed.oribi.notes)

    model, _ = trained(base, load_in_4bit=True)
    model.save_pretrained(str(tmp_path / "nf4"))
    again, _ = load_model(str(tmp_path / "nf4"), **LOAD)
    assert again.oribi.load_in_4bit
    assert torch.equal(logits(again), logits(model))


def test_single_quantised_scales_are_part_of_what_it_was_trained_on(base, tmp_path):
    single = {"load_in_4bit": True, "bnb_4bit_use_double_quant": False}
    model, _ = trained(base, quantization_config=single)
    model.save_pretrained(str(tmp_path))
    again, _ = load_model(str(tmp_path), **LOAD)
    assert again.oribi.identity.weights == "nf4, single"
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda folder: edit_tensors(folder, lambda t: t["model.norm.weight"].mul_(2)),
            "model.safetensors: ",
        ),
        (lambda folder: checkpoint(folder, num_hidden_layers=2, intermediate_size=192), "other weights than"),
    ],
)
def test_a_base_that_has_other_weights_now_is_an_error_that_names_both(change, words, base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    trained(tmp_path / "base")[0].save_pretrained(str(tmp_path / "adapter"))
    change(tmp_path / "base")
    with pytest.raises(ModelError, match=words) as refused:
        load_model(str(tmp_path / "adapter"), **LOAD)
    assert RECORD_FILE in str(refused.value)


def test_an_edited_config_of_the_base_is_told_and_no_error(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    trained(tmp_path / "base")[0].save_pretrained(str(tmp_path / "adapter"))
    edit_config(tmp_path / "base", max_window_layers=3)
    model, _ = load_model(str(tmp_path / "adapter"), **LOAD)
    assert any(note.startswith("the base's config.json: ") for note in model.oribi.notes)


def test_of_a_foreign_adapter_it_is_said_that_its_base_is_not_known(base, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    get_peft_model(plain, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), **LOAD)
    assert sum("the weights it was trained on are unknown" in note for note in model.oribi.notes) == 1


def test_stretched_rope_is_stretched_again(base, tmp_path):
    model, _ = trained(base, max_seq_length=512)
    model.save_pretrained(str(tmp_path))
    again, _ = load_model(str(tmp_path), **LOAD)
    assert again.config.rope_parameters["rope_type"] == "yarn"
    assert torch.equal(logits(again), logits(model))


def test_the_template_it_was_trained_with_comes_back_without_a_tokenizer(base, tmp_path):
    model, tokenizer = trained(base)
    model.oribi.chat_template = "{{ messages[0]['content'] }}"
    model.save_pretrained(str(tmp_path))
    assert load_model(str(tmp_path), **LOAD)[1].chat_template == "{{ messages[0]['content'] }}"


def test_the_revision_of_the_base_is_kept_and_asked_for(base, tmp_path, monkeypatch):
    model, _ = FastLanguageModel.from_pretrained(str(base), **LOAD, revision="v2")
    FastLanguageModel.get_peft_model(model, r=4).save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["revision"] == "v2"
    asked = []
    import oribi.models.open as module

    found = module.locate
    monkeypatch.setattr(
        module, "locate", lambda name, hub, g: asked.append(hub.revision) or found(name, hub, g)
    )
    again, _ = load_model(str(tmp_path), **LOAD, revision="of-the-adapter")
    assert asked == ["of-the-adapter", "v2"]
    assert again.peft_config["default"].revision == "v2"


def test_a_record_of_a_later_oribi_or_a_damaged_one_is_named(base, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "a")
    path = tmp_path / "a" / RECORD_FILE
    record = json.loads(path.read_text())
    for damage, words in (({"schema": 99}, "schema 99"), ({"base": {}}, "is damaged")):
        path.write_text(json.dumps({**record, **damage}))
        with pytest.raises(ModelError, match=words):
            load_model(str(tmp_path / "a"), **LOAD)
