"""A model trained on NF4 weights: merged as trained, on the original weights, and packed again."""

import re

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from oribi.errors import ExportError
from oribi.gguf.source import GGUFSource
from oribi.kernels.nf4 import dequantize
from oribi.lora.attach import attach_lora
from oribi.models.load import load_model
from oribi.save.base import open_base
from oribi.save.gguf import save_gguf, save_gguf_adapter
from oribi.save.merged import save_merged
from oribi.save.nf4_checkpoint import Nf4Source, packed_bytes
from oribi.save.probes import rows_of
from oribi.save.reference import Trained
from oribi.save.stream import streamed_logits
from oribi.save.trained import MergedModel
from oribi.tensors import SafetensorsSource
from tests.save.tiny_export import VOCAB, adapted, byte_level_tokenizer, export_config, tiny_model

IDS = torch.arange(20, 60)[None]


@pytest.fixture
def checkpoint(tmp_path):
    """A 16-bit checkpoint of a tiny Llama with its tokenizer."""
    save_merged(
        tiny_model(export_config("llama")),
        tmp_path / "base",
        byte_level_tokenizer(),
        dtype="float32",
        verify=False,
    )
    return tmp_path / "base"


def trained(checkpoint, dtype=torch.float32, **settings):
    """An NF4 model of the checkpoint with an adapter that does something."""
    model, tokenizer = load_model(str(checkpoint), load_in_4bit=True, dtype=dtype)
    model = attach_lora(model, r=4, lora_alpha=8, **settings)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    return model.eval(), tokenizer


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_the_dequantised_merge_is_the_trained_function(checkpoint, tmp_path):
    model, tokenizer = trained(checkpoint)
    report = save_merged(model, tmp_path / "merged", tokenizer, dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert relative(logits_of(merged), logits_of(model)) < 1e-5
    assert report.checks[0].figures["kl"] < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_on_a_gpu_is_exported_as_it_stands(checkpoint, tmp_path):
    model, tokenizer = trained(checkpoint, dtype=torch.bfloat16)
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    assert save_gguf(model, tmp_path / "gguf", tokenizer, ["f32", "q8_0"])["report"].passed
    save_merged(model, tmp_path / "merged", tokenizer, dtype="float32")
    written = load_file(tmp_path / "merged" / "model.safetensors")
    source = GGUFSource(next((tmp_path / "gguf").glob("*F32.gguf")))
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            exact = dequantize([layer.base_layer.weight], torch.float32) + layer.get_delta_weight("default")
            assert relative(written[f"{name}.weight"], exact.cpu()) < 1e-6
            from_gguf = source.read(f"{name}.weight", torch.device("cpu"), torch.float32)
            assert relative(from_gguf, exact.cpu()) < 1e-6


def test_the_original_merge_is_the_adapter_on_the_original(checkpoint, tmp_path):
    model, tokenizer = trained(checkpoint)
    held_out = [[int(id) for id in torch.randint(3, VOCAB, (40,))] for _ in range(2)]
    save_merged(model, tmp_path / "merged", tokenizer, base="original", held_out=held_out, dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    plain = tiny_model(export_config("llama"))
    layer = "model.layers.1.self_attn.o_proj"
    lora = model.base_model.model.get_submodule(layer)
    expected = plain.get_submodule(layer).weight + lora.scaling["default"] * (
        lora.lora_B["default"].weight @ lora.lora_A["default"].weight
    )
    assert torch.allclose(merged.get_submodule(layer).weight, expected, atol=1e-6)
    assert relative(logits_of(merged), logits_of(model)) > 1e-3  # NF4 has its own error


def test_a_gguf_of_nf4_weights_holds_the_trained_function(checkpoint, tmp_path):
    model, tokenizer = trained(checkpoint)
    result = save_gguf(model, tmp_path / "gguf", tokenizer, "f32")
    assert all(check.passed for check in result["report"].checks)


@pytest.mark.parametrize("method", ["merged_4bit", "merged_4bit_forced"])
def test_a_merge_in_nf4_loads_as_any_prequantised_checkpoint(method, checkpoint, tmp_path):
    model, tokenizer = trained(checkpoint)
    report = save_merged(model, tmp_path / "nf4", tokenizer, method, max_shard_size="60KB", verify=False)
    assert report.kind == "merged_4bit"
    assert len(report.files) > 2
    again, _ = load_model(str(tmp_path / "nf4"), dtype=torch.float32)
    assert again.oribi.kind == "bnb-4bit"
    layer = "model.layers.2.mlp.up_proj"
    merged = MergedModel(model, open_base(model, "original"))
    merged = merged.read(f"{layer}.weight", torch.device("cpu"), torch.bfloat16)
    codes, state = quantize_4bit(merged, blocksize=64, compress_statistics=True, quant_type="nf4")
    assert torch.equal(again.get_submodule(layer).weight, codes)
    # read back tensor by tensor it is the model that loads
    rows = rows_of(tokenizer, None, VOCAB)
    source = Nf4Source(SafetensorsSource(sorted((tmp_path / "nf4").glob("model*.safetensors"))))
    streamed = streamed_logits(model.config, source, rows.ids, rows.positions, torch.float32)
    assert relative(streamed, Trained(again, rows).evaluate(rows)) < 1e-4


def test_a_small_update_outlives_a_merge_in_nf4(checkpoint, tmp_path):
    model, tokenizer = trained(checkpoint)
    layer = "model.layers.2.mlp.up_proj"
    lora = model.base_model.model.get_submodule(layer)
    before = dequantize([lora.base_layer.weight], torch.float32)
    with torch.no_grad():
        update = lora.scaling["default"] * lora.lora_B["default"].weight @ lora.lora_A["default"].weight
        for _, b in ((n, p) for n, p in model.named_parameters() if "lora_B" in n):
            b *= 0.02 * before.norm() / update.norm()
        update = lora.scaling["default"] * lora.lora_B["default"].weight @ lora.lora_A["default"].weight

    def kept(folder):
        again, _ = load_model(str(folder), dtype=torch.float32)
        change = dequantize([again.get_submodule(layer).weight], torch.float32) - before
        return float((change * update).sum() / update.square().sum())

    report = save_merged(model, tmp_path / "nf4", tokenizer, "merged_4bit", verify=False)
    assert report.base == "original"
    assert any("packed" in note for note in report.notes)
    assert kept(tmp_path / "nf4") > 0.7
    # without the 16-bit weights it is said that the update is lost
    for file in checkpoint.glob("*.safetensors"):
        file.unlink()
    report = save_merged(model, tmp_path / "lost", tokenizer, "merged_4bit", verify=False)
    assert report.base == "dequantized"
    assert any("small update is lost" in note for note in report.notes)
    assert kept(tmp_path / "lost") < 0.5


def test_the_size_of_packed_weights_is_foretold():
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(
        torch.randn(1024, 1024), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    real = sum(t.nbytes for t in (codes, *state.as_dict(packed=True).values()))
    assert packed_bytes((1024, 1024)) == pytest.approx(real, rel=0.01)


def test_a_packed_checkpoint_is_no_original(checkpoint, tmp_path):
    model, tokenizer = trained(checkpoint)
    save_merged(model, tmp_path / "nf4", tokenizer, "merged_4bit", verify=False)
    again, tokenizer = load_model(str(tmp_path / "nf4"), dtype=torch.float32)
    with pytest.raises(ExportError, match="holds 4-bit weights; base='original' needs the 16-bit checkpoint"):
        save_merged(attach_lora(again, r=4), tmp_path / "merged", tokenizer, base="original")


INDICES = {
    "a shard outside the folder": (lambda text: re.sub(r"model-0", "../model-0", text), "so this is refused"),
    "an absolute shard": (lambda text: re.sub(r"model-0", "/model-0", text), "so this is refused"),
    "cut off": (lambda text: text[: len(text) // 2], "index.json"),
    "a list in place of names": (lambda text: '{"weight_map": ["model.safetensors"]}', "is not an index of shards"),
    "a shard that is not there": (lambda text: text.replace("model-00002", "model-00009"), "shards are missing"),
    "tensors at another shard": (
        lambda text: text.replace("model-00002", "model-00001"), "that the index looks for in it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", INDICES)
def test_an_original_whose_index_is_hostile_or_damaged_is_refused(kind, tmp_path):
    change, message = INDICES[kind]
    base = tmp_path / "base"
    save_merged(
        tiny_model(export_config("llama")), base, byte_level_tokenizer(), dtype="float32", verify=False,
        max_shard_size="200KB",
    )  # fmt: skip
    model, tokenizer = trained(base)
    index = base / "model.safetensors.index.json"
    index.write_text(change(index.read_text()))
    with pytest.raises(ExportError, match=message):
        save_merged(model, tmp_path / "merged", tokenizer, base="original", verify=False)
    assert not (tmp_path / "merged").exists()


def test_a_gguf_file_is_its_own_original(checkpoint, tmp_path):
    plain = tiny_model(export_config("llama"))
    path = save_gguf(plain, tmp_path / "f32", byte_level_tokenizer(), "f32", verify=False)["gguf_files"][0]
    model, tokenizer = trained(path)
    assert model.oribi.kind == "gguf"
    save_gguf(model, tmp_path / "out", tokenizer, "f32", base="original", verify=False)
    written = GGUFSource(next((tmp_path / "out").glob("*.gguf")))
    lora = model.base_model.model.get_submodule("model.layers.0.self_attn.q_proj")
    expected = plain.model.layers[0].self_attn.q_proj.weight + lora.get_delta_weight("default")
    found = written.read("model.layers.0.self_attn.q_proj.weight", torch.device("cpu"), torch.float32)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_an_adapter_as_gguf_turns_the_base_into_the_trained_model(family, settings, tmp_path):
    llama_cpp = pytest.importorskip("oribi.gguf.llama_cpp")
    pytest.importorskip("xllamacpp", reason="llama.cpp applies the adapter")
    base = tiny_model(export_config(family))
    path = save_gguf(base, tmp_path / "base", byte_level_tokenizer(), "f32", verify=False)["gguf_files"][0]
    tuned = adapted(base, alpha_pattern={"down_proj": 3}, **settings)
    adapter = save_gguf_adapter(tuned, tmp_path / "lora", "f32")["gguf_files"][0]
    prompt = IDS[0].tolist()
    answers = {}
    for name, extra in (("base", None), ("tuned", adapter)):
        answer = llama_cpp.LlamaCpp(path, 256, adapter=extra).generate(prompt, 4, top=VOCAB)
        answers[name] = answer.logprobs[0] or answer.logprobs[1]
    place = 0 if answers["tuned"] else 1
    found = torch.tensor([answers["tuned"][token] for token in range(VOCAB)])
    expected = logits_of(tuned)[0, -1 + place].log_softmax(-1)
    assert (found - expected).abs().max() < 2e-3
    before = torch.tensor([answers["base"][token] for token in range(VOCAB)])
    assert (found - before).abs().max() > 0.1


def test_an_adapter_as_gguf_is_read_back(tmp_path):
    tuned = adapted(tiny_model(export_config("llama")), use_rslora=True)
    written = save_gguf_adapter(tuned, tmp_path / "lora", ["f32", "f16", "bf16", "q8_0"])
    errors = [check.figures["largest error"] for check in written["report"].checks]
    assert errors[0] == 0 < errors[1] < errors[2]
    assert (tmp_path / "lora" / "export_report.json").exists()
    with torch.no_grad():  # below what float16 can say
        tuned.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.mul_(1e-6)
    with pytest.raises(ExportError, match="different  f16: adapter read back: .*take f32"):
        save_gguf_adapter(tuned, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_what_llama_cpp_cannot_apply_is_refused(tmp_path):
    dora = adapted(tiny_model(export_config("llama")), use_dora=True)
    with pytest.raises(ExportError, match="no DoRA, bias, new token or fully trained module"):
        save_gguf_adapter(dora, tmp_path / "lora")
    with pytest.raises(ExportError, match="no active adapter"):
        save_gguf_adapter(tiny_model(export_config("llama")), tmp_path / "lora")
