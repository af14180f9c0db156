"""fp8 = True: refused with a reason where it cannot be, said at the start where it is, and off outside training."""

import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import oribi.run
from oribi.config_file import read_run_config
from oribi.environment import Environment
from oribi.errors import ConfigError
from oribi.train import setup as fp8
from oribi.train.arguments import SFTConfig
from oribi.train.trainer import SFTTrainer
from tests.kernels.truth import HAS_E4M3, needs_e4m3
from tests.models.test_fused_layer import adapt
from tests.models.tiny import tiny_config, tiny_pair

SETTINGS = {"disable_tqdm": True, "save_strategy": "no", "max_steps": 2, "fp8": True}


def machine(name: str = "NVIDIA H100", capability: tuple[int, int] | None = (9, 0)) -> Environment:
    device = torch.device("cpu" if capability is None else "cuda")
    return Environment(device, name, capability, 0, torch.bfloat16, True, "flash", {})


@pytest.mark.parametrize(
    ("name", "capability", "words"),
    [
        ("Intel Xeon", None, "the device here is Intel Xeon"),
        ("NVIDIA A100", (8, 0), "NVIDIA A100 has compute capability 8.0"),
    ],
)
def test_other_devices_are_refused_by_name(name, capability, words):
    with pytest.raises(ConfigError, match=f"fp8 = true needs .* 8.9 or higher, and .*{words}. Leave out fp8"):
        fp8.require_fp8_gpu(machine(name, capability))
    fp8.require_fp8_gpu(machine())
    fp8.require_fp8_gpu(machine("NVIDIA L4", (8, 9)))


@pytest.mark.skipif(HAS_E4M3, reason="this machine can")
def test_a_run_is_refused_before_its_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(oribi.run, "load_model", lambda *a, **k: pytest.fail("loaded"))
    flags = ["--model", "absent", "--dataset", "absent.jsonl", "--fp8", "--output_dir", str(tmp_path)]
    with pytest.raises(ConfigError, match="fp8 = true needs an NVIDIA GPU"):
        oribi.run.run(read_run_config(None, flags)[0])


@pytest.mark.skipif(HAS_E4M3, reason="this machine can")
def test_a_trainer_is_refused_before_its_rows_are_prepared(load, tmp_path):
    model, tokenizer = load()
    with pytest.raises(ConfigError, match="fp8 = true needs an NVIDIA GPU"):
        SFTTrainer(
            model,
            SFTConfig(output_dir=str(tmp_path), **SETTINGS),
            train_dataset="absent",
            tokenizer=tokenizer,
        )


@pytest.mark.parametrize(
    ("dtype", "settings", "words"),
    [
        (torch.float32, {}, "the model computes in float32: load it with dtype='bfloat16'"),
        (torch.bfloat16, {"lora_dropout": 0.1}, "no layer can use it: .* without dropout"),
        (torch.bfloat16, {"use_dora": True}, "no layer can use it"),
        (torch.bfloat16, {"fsdp": True}, "fsdp gathers the frozen weights anew"),
    ],
)
def test_models_and_settings_are_refused_by_what_is_found(dtype, settings, words, monkeypatch):
    monkeypatch.setattr(fp8, "detect", machine)
    fsdp = settings.pop("fsdp", None)
    model = adapt(tiny_pair(tiny_config("llama"))[0].to(dtype), **settings)
    base = model.get_base_model().eval()
    monkeypatch.setattr(type(base), "device", torch.device("cuda"))
    arguments = SimpleNamespace(fp8=True, fsdp=fsdp)
    with pytest.raises(ConfigError, match=f"fp8 = true, but {words}"):
        fp8.require_fp8(arguments, base)
    assert not base.training
    assert not any(layer.fp8 for layer in base.model.layers)
    fp8.require_fp8(SimpleNamespace(fp8=False, fsdp=fsdp), base)


def test_models_outside_the_table_and_in_host_memory_are_refused(monkeypatch):
    monkeypatch.setattr(fp8, "detect", machine)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    other = LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes))
    with pytest.raises(ConfigError, match="LlamaForCausalLM is outside oribi's family table"):
        fp8.require_fp8(SimpleNamespace(fp8=True, fsdp=None), other)
    base = adapt(tiny_pair(tiny_config("llama"))[0].bfloat16()).get_base_model()
    with pytest.raises(ConfigError, match="the model is in host memory"):
        fp8.require_fp8(SimpleNamespace(fp8=True, fsdp=None), base)


def test_training_says_where_it_is_approximate_and_leaves_it_exact(
    load, conversations, tmp_path, monkeypatch, caplog
):
    """The references compute it here, which the trainer would refuse."""
    monkeypatch.setattr("oribi.train.setup.require_fp8", lambda args, base: None)
    model, tokenizer = load()
    base = model.get_base_model()
    arguments = SFTConfig(output_dir=str(tmp_path), eval_strategy="steps", eval_steps=1, **SETTINGS)
    trainer = SFTTrainer(
        model, arguments, train_dataset=conversations, eval_dataset=conversations, tokenizer=tokenizer
    )
    before = trainer.evaluate()["eval_loss"]
    seen = []
    trained = trainer.compute_loss

    def watched(model, inputs, *rest, **options):
        seen.append((model.training, [layer.fp8 for layer in base.model.layers]))
        return trained(model, inputs, *rest, **options)

    monkeypatch.setattr(trainer, "compute_loss", watched)
    with caplog.at_level(logging.INFO, logger="oribi"):
        trainer.train()
    assert "fp8 (approximate): base products of 1 of 2 layers" in caplog.text
    assert {tuple(flags) for training, flags in seen if training} == {(False, True)}
    assert not any(layer.fp8 or layer.dequantized for layer in base.model.layers)
    assert trainer.evaluate()["eval_loss"] < before


@needs_e4m3
@pytest.mark.gpu
def test_on_a_gpu_the_loss_falls_as_in_bfloat16(load, conversations, tmp_path, caplog):
    """Through recorded CUDA graphs, packs of one length."""
    ends = {}
    for on in (False, True):
        model, tokenizer = load(dtype="bfloat16", device_map="cuda")
        settings = {**SETTINGS, "max_steps": 30, "learning_rate": 5e-3, "packing": True, "fp8": on, "seed": 1}
        arguments = SFTConfig(output_dir=str(tmp_path / str(on)), **settings)
        trainer = SFTTrainer(model, arguments, train_dataset=conversations, tokenizer=tokenizer)
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="oribi"):
            trainer.train()
        assert "steps run as recorded CUDA graphs" in caplog.text
        assert "recording a step failed" not in caplog.text
        assert ("fp8 (approximate): base products of 1 of 2 layers" in caplog.text) == on
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
        ends[on] = losses
    assert ends[True][0] == pytest.approx(ends[False][0], rel=0.02)
    assert ends[True][0] != ends[False][0]
    assert sum(ends[True][-5:]) == pytest.approx(sum(ends[False][-5:]), rel=0.1)
