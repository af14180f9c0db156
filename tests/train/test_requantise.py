"""A training for one merged GGUF file ends as that file: quantised with its adapter, resumed bit for bit, loaded again as it was."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from oribi.config_file import read_run_config
from oribi.errors import ConfigError, ExportError
from oribi.gguf.source import GGUFSource
from oribi.kernels.packed_weight import ShiftedCodes, dense_weight
from oribi.models.load import load_model
from oribi.models.packed_linear import PackedLinear, is_requantised
from oribi.run import load_run, run
from oribi.run_record import own_checkpoints
from oribi.save.gguf import save_gguf
from oribi.save.gguf_adapter import save_gguf_adapter
from oribi.save.requantised import Requantiser
from oribi.train.requantise import EVERY, FACTORS_FILE
from tests.gguf.test_frozen_base import adapted, ids_of
from tests.save.tiny_export import byte_level_tokenizer, export_config, tiny_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_model(export_config("llama")).to(torch.bfloat16).save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"what is {i}"},
                {"role": "assistant", "content": str(i + 1)},
            ]
        }
        for i in range(24)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def trained(base, folder, *flags):
    flags = {
        "model": base, "dataset": base / "rows.jsonl", "output_dir": folder, "train_for": "q4_0", "dtype": "float32",
        "max_seq_length": 64, "report": "false", "lora_r": 4, "learning_rate": 1e-2, "warmup_steps": 0, "max_steps": 16,
        "gradient_accumulation_steps": 1, "packing": "false", **dict(flags),
    }  # fmt: skip
    config, _ = read_run_config(None, [f"--{name}={value}" for name, value in flags.items()])
    return run(config)


def loaded(base, **settings):
    settings = {
        "dtype": "float32",
        "max_seq_length": 64,
        "device_map": "cpu",
        "train_for": "q4_0",
        **settings,
    }
    return load_model(str(base), **settings)


def test_the_model_computes_what_the_merged_file_computes_and_the_file_has_its_codes(base, tmp_path):
    model, tokenizer = loaded(base)
    model = adapted(model, scale=0.02).eval()
    before = {n: p.packed.codes.clone() for n, p in model.named_parameters() if hasattr(p, "packed")}
    Requantiser(model).quantise()
    assert is_requantised(model)
    changed = [
        n for n, p in model.named_parameters() if n in before and not torch.equal(p.packed.codes, before[n])
    ]
    assert len(changed) == len(before)
    with torch.no_grad():
        expected = model(ids_of()).logits
    written = save_gguf(model, tmp_path, tokenizer, "q4_0", verify="report")
    codes = next(check for check in written["report"].checks if check.name == "q4_0: codes")
    assert codes.figures["same"] == codes.figures["of"] == len(before)
    file, _ = load_model(written["gguf_files"][0], dtype="float32", max_seq_length=64, device_map="cpu")
    with torch.no_grad():
        found = file.eval()(ids_of()).logits
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_gradients_pass_straight_through(base):
    model, _ = loaded(base)
    model = adapted(model, scale=0.02)
    Requantiser(model).quantise()
    values, _ = loaded(base, load_in_4bit=False)
    other = adapted(values, scale=0.02)
    layers = dict(model.named_modules())
    for name, layer in other.named_modules():
        if isinstance(layers[name], PackedLinear):
            layer.weight.data.copy_(dense_weight(layers[name].weight, torch.float32))
    gradients = []
    for one in (model, other):
        one(input_ids=ids_of(), labels=ids_of()).loss.backward()
        gradients.append({n: p.grad for n, p in one.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).norm() <= 1e-4 * gradients[1][name].norm(), name


@pytest.mark.long
def test_a_run_ends_as_its_file_and_is_loaded_so(base, tmp_path, capsys):
    saved = trained(base, tmp_path / "run", ("quantization_method", "q4_0"), ("eval_fraction", 0.25))
    assert "held-out loss of the merged q4_0 file: " in capsys.readouterr().out
    again = load_run(tmp_path / "run").model
    source = GGUFSource(saved["gguf q4_0"])
    layers = {n: m for n, m in again.get_base_model().named_modules() if isinstance(m, PackedLinear)}
    assert layers
    for name, layer in layers.items():
        assert isinstance(layer.weight.packed, ShiftedCodes)
        name = name.replace(".base_layer", "") + ".weight"
        assert torch.equal(source.read_blocks(name, CPU).codes, layer.weight.packed.codes)
    with pytest.raises(ExportError, match="one merged GGUF file"):
        save_gguf_adapter(again, tmp_path / "apart", tokenizer=load_run(tmp_path / "run").tokenizer)


@pytest.mark.long
def test_a_resumed_run_is_the_run(base, tmp_path):
    settings = [("quantization_method", "q4_0"), ("max_steps", 48), ("save_steps", 40)]
    whole = trained(base, tmp_path / "whole", *settings, ("eval_fraction", 0.25), ("eval_steps", 7))
    (kept,) = (one.path for one in own_checkpoints(tmp_path / "whole") if one.step == 40)
    assert (kept / FACTORS_FILE).is_file()
    assert (40 - 36) % EVERY  # between two quantisations
    (tmp_path / "again").mkdir()
    shutil.copytree(kept, tmp_path / "again" / kept.name)
    for name in ("oribi_run.json", "config.yaml"):
        shutil.copy(tmp_path / "whole" / name, tmp_path / "again" / name)
    again = trained(
        base, tmp_path / "again", *settings, ("eval_fraction", 0.25), ("eval_steps", 7), ("resume", "true")
    )
    one, other = ((p["lora"] / "adapter_model.safetensors").read_bytes() for p in (whole, again))
    assert one == other
    assert whole["gguf q4_0"].read_bytes() == again["gguf q4_0"].read_bytes()


def test_merges_of_a_base_in_codes_use_the_16_bit_checkpoint(base, tmp_path):
    model, tokenizer = loaded(base)
    model = adapted(model, scale=0.01).eval()
    report = save_gguf(model, tmp_path, tokenizer, "q4_0", verify=False)["report"]
    assert any("16-bit checkpoint" in note for note in report.notes)
    plain, _ = loaded(base, train_for=None, load_in_4bit=False)
    expected = save_gguf(
        adapted(plain, scale=0.01).eval(), tmp_path / "plain", tokenizer, "q4_0", verify=False
    )
    ours = next(tmp_path.glob("*.gguf"))
    assert ours.read_bytes() == Path(expected["gguf_files"][0]).read_bytes()


def test_two_kinds_of_serving_at_once_are_refused():
    flags = ["--model", "m", "--dataset", "d", "--train_for", "q4_k_m", "--quantization_method", "q4_k"]
    with pytest.raises(ConfigError, match="save_method = .*one merged file"):
        read_run_config(None, [*flags, "--save_method", "gguf-adapter"])
