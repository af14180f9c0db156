"""A merge of an image-text checkpoint is that checkpoint with another text decoder: it still sees pictures."""

import json

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig

from oribi.compat.language_model import FastLanguageModel
from oribi.models.wrapper import class_named
from oribi.save.check import Outcome
from oribi.save.gguf import save_gguf
from tests.models.tiny_checkpoint import edit_config, edit_tensors
from tests.save.test_adapter_files import adapted, load, logits, write_wrapper

IMAGE = 10  # id of the token that a picture's places have
HELD_OUT = ["the red fox runs over old hills"]
QUICK = ("gemma3", "qwen3_5", "gemma4")
KINDS = (
    "gemma3",
    "mistral3",
    "llava",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "gemma4",
    "muse_glimmer",
)


def write(kind: str, folder) -> None:
    """A checkpoint whose config knows the token of pictures, with the files of a processor."""
    write_wrapper(kind, folder)
    edit_config(folder, image_token_id=IMAGE, **({"image_token_index": IMAGE} if kind == "llava" else {}))
    (folder / "preprocessor_config.json").write_text('{"size": 16}')
    (folder / "processor_config.json").write_text('{"image_seq_length": 4}')


def picture(kind: str) -> dict[str, torch.Tensor]:
    """What a processor makes of one picture for the tiny model."""
    generator = torch.Generator().manual_seed(3)
    if kind.startswith(("qwen", "muse")):  # 2 x 2 patches of 8 x 8, two frames each, merged into one place
        flat = torch.randn(4, 3 * 2 * 8 * 8, generator=generator)
        return {"pixel_values": flat, "image_grid_thw": torch.tensor([[1, 2, 2]])}
    if kind == "gemma4":
        patches = torch.rand(1, 36, 3 * 8 * 8, generator=generator)
        positions = torch.tensor([[[i % 6, i // 6] for i in range(36)]])
        return {"pixel_values": patches, "image_position_ids": positions}
    if kind == "mistral3":  # 4 x 2 patches, of which a place takes four
        values = torch.randn(1, 3, 32, 16, generator=generator)
        return {"pixel_values": values, "image_sizes": torch.tensor([[32, 16]])}
    return {"pixel_values": torch.randn(1, 3, 16, 16, generator=generator)}


@torch.no_grad()
def seen(model, kind: str) -> torch.Tensor:
    for (
        parameter
    ) in model.parameters():  # of a file they lie anywhere, and some CPUs' products round by where they lie
        parameter.data = parameter.data.clone()
    found = model.eval().get_image_features(**picture(kind))
    found = found.pooler_output if hasattr(found, "pooler_output") else found
    found = found if torch.is_tensor(found) else torch.cat(list(found))
    return found.flatten(0, -2)


@torch.no_grad()
def answered(model, kind: str, places: int) -> torch.Tensor:
    """Logits of a prompt with a picture."""
    ids = torch.tensor([[5, 6, *[IMAGE] * places, 7, 8, 9]])
    types = {}
    if kind in ("qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen3_5_moe", "gemma4", "gemma3"):
        name = "token_type_ids" if kind == "gemma3" else "mm_token_type_ids"
        types = {name: (ids == IMAGE).int()}
    return model.eval()(input_ids=ids, **types, **picture(kind)).logits


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in KINDS]
)
def test_a_merge_sees_pictures_as_its_base_and_answers_as_plain_peft(kind, tmp_path):
    write(kind, tmp_path / "base")
    model, tokenizer = load(tmp_path / "base")
    model = adapted(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    report = model.save_pretrained_merged(
        str(tmp_path / "merged"), tokenizer, dtype="float32", held_out=HELD_OUT
    )
    (check,) = (check for check in report.checks if check.name == "what was not trained")
    assert check.outcome is Outcome.EQUAL
    kind_of = class_named(AutoConfig.from_pretrained(tmp_path / "base"))
    base = kind_of.from_pretrained(tmp_path / "base", dtype=torch.float32)
    merged, info = kind_of.from_pretrained(tmp_path / "merged", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(seen(merged, kind), seen(base, kind))
    places = len(seen(base, kind))
    theirs = answered(PeftModel.from_pretrained(base, tmp_path / "adapter"), kind, places)
    assert (answered(merged, kind, places) - theirs).abs().max() < 1e-4
    bare = kind_of.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert (answered(bare, kind, places) - theirs).abs().max() > 1e-3
    for name in ("preprocessor_config.json", "processor_config.json"):
        assert (tmp_path / "merged" / name).read_text() == (tmp_path / "base" / name).read_text()


def merge(model, tokenizer, folder, **options):
    return model.save_pretrained_merged(str(folder), tokenizer, held_out=HELD_OUT, **options)


def test_towers_keep_their_dtype_and_a_new_head_finds_its_place(tmp_path):
    write("gemma3", tmp_path / "base")

    def change(tensors):
        for name in tensors:
            if name.startswith("vision_tower."):
                tensors[name] = tensors[name].to(torch.float16)
        tensors["vision_tower.scale"] = torch.tensor(3)  # no float, and of no dimension
        tensors.pop("language_model.lm_head.weight")

    edit_tensors(tmp_path / "base", change)
    edit_config(tmp_path / "base", tie_word_embeddings=True)
    model, tokenizer = load(tmp_path / "base", resize_model_vocab=390)
    model = adapted(model, modules_to_save=["lm_head"], ensure_weight_tying=False)
    expected = logits(model)
    merge(model, tokenizer, tmp_path / "merged", dtype="bfloat16", max_shard_size="200KB")
    stored = {}
    for file in (tmp_path / "merged").glob("*.safetensors"):
        stored |= load_file(file)
    base = load_file(tmp_path / "base/model.safetensors")
    assert stored.keys() - base.keys() == {"language_model.lm_head.weight"}
    for name, tensor in base.items():
        assert stored[name].dtype == (tensor.dtype if "language_model" not in name else torch.bfloat16), name
        assert "language_model" in name or torch.equal(stored[name], tensor)
    config = AutoConfig.from_pretrained(tmp_path / "merged")
    assert (config.get_text_config().vocab_size, config.tie_word_embeddings) == (390, False)
    merged = transformers.Gemma3ForConditionalGeneration.from_pretrained(
        tmp_path / "merged", dtype=torch.float32
    )
    assert (logits(merged) - expected).abs().max() < 0.1


@pytest.mark.parametrize("kind", ["gemma3", pytest.param("qwen3_5", marks=pytest.mark.slow)])
def test_four_bits_pack_the_text_decoder_alone(kind, tmp_path):
    write(kind, tmp_path / "base")
    model, tokenizer = load(tmp_path / "base", load_in_4bit=True)
    # NF4 is too rough for a random model
    settings = {"save_method": "merged_4bit", "dtype": "float32", "verify": False}
    merge(adapted(model), tokenizer, tmp_path / "merged", **settings)
    kind_of = class_named(AutoConfig.from_pretrained(tmp_path / "merged"))
    merged, info = kind_of.from_pretrained(tmp_path / "merged", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    packed = [name for name, m in merged.named_modules() if type(m).__name__ == "Linear4bit"]
    assert packed
    assert all(".language_model." in name for name in packed)
    assert torch.equal(seen(merged, kind), seen(kind_of.from_pretrained(tmp_path / "base"), kind))
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path / "merged"), dtype="float32", device_map="cpu")
    merge(adapted(again), tokenizer, tmp_path / "again", dtype="float32")  # a packed base
    dense = load_file(tmp_path / "again/model.safetensors")
    assert dense.keys() == load_file(tmp_path / "base/model.safetensors").keys()


@pytest.mark.parametrize("has_them", [True, False])
def test_drafting_layers_are_carried_or_not_counted(has_them, tmp_path):
    write("qwen3_5", tmp_path / "base")
    settings = json.loads((tmp_path / "base/config.json").read_text())
    settings["text_config"]["mtp_num_hidden_layers"] = 1
    edit_config(tmp_path / "base", **settings)
    if has_them:
        edit_tensors(tmp_path / "base", lambda t: t.update({"mtp.fc.weight": torch.randn(4, 8).bfloat16()}))
    model, tokenizer = load(tmp_path / "base")
    report = merge(adapted(model), tokenizer, tmp_path / "merged", dtype="float32")
    text = json.loads((tmp_path / "merged/config.json").read_text())["text_config"]
    assert text["mtp_num_hidden_layers"] == int(has_them)
    stored = load_file(tmp_path / "merged/model.safetensors")
    assert ("mtp.fc.weight" in stored) is has_them
    if has_them:
        assert torch.equal(
            stored["mtp.fc.weight"], load_file(tmp_path / "base/model.safetensors")["mtp.fc.weight"]
        )
    assert report.passed


def test_where_the_bases_files_are_gone_the_text_model_is_written_alone(tmp_path):
    write("gemma3", tmp_path / "base")
    model, tokenizer = load(tmp_path / "base")
    model = adapted(model)
    (tmp_path / "base").rename(tmp_path / "moved")
    report = merge(model, tokenizer, tmp_path / "merged", dtype="float32")
    assert any("has for images and sound is not in it" in note for note in report.notes)
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["architectures"] == ["Gemma3ForCausalLM"]


@pytest.mark.parametrize(
    ("kind", "says"), [("mistral3", "convert_hf_to_gguf.py {base} --mmproj"), ("llava", "no llava model")]
)
def test_a_gguf_file_says_where_the_projector_comes_from(kind, says, tmp_path):
    write(kind, tmp_path / "base")
    model, tokenizer = load(tmp_path / "base")
    report = save_gguf(model, tmp_path / "gguf", tokenizer, "f32", verify=False)["report"]
    (note,) = (note for note in report.notes if "projector" in note)
    assert says.format(base=tmp_path / "base") in note
