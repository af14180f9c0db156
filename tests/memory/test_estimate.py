"""The estimate: against peaks and step times measured on an H100, against what tiny models really hold, and what it refuses."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, Qwen2Config

from oribi.config import RunConfig
from oribi.environment import Environment
from oribi.errors import ConfigError
from oribi.memory import estimate as memory
from oribi.memory.architecture import NF4_BYTES, Architecture, OutsideFamilyTable, architecture_of
from oribi.memory.duration import duration, steps_of
from oribi.memory.estimate import Training, largest_batch, largest_context, require_fit, usable
from oribi.memory.gpus import GPUS, gpu_named, recognise
from oribi.models.decoder import build
from oribi.models.fused_layer import POLICIES
from oribi.models.half import Keep
from oribi.models.load import load_model

GIB = 2**30
MODELS = {
    "Llama-3.1-8B": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072,
    ),
    "Llama-3.2-1B": LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=131072, tie_word_embeddings=True,
    ),
    "Qwen2.5-0.5B": Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True,
    ),
}  # fmt: skip
# allocated GiB and milliseconds of a micro-step on an H100: r 16 on all linear layers, adamw_8bit, bfloat16
MEASURED = [
    ("Llama-3.1-8B", "memory", 2, 2048, 6.17, 302.5),
    ("Llama-3.1-8B", "oribi", 2, 2048, 31.17, 237.1),
    ("Llama-3.1-8B", "speed", 2, 2048, 18.13, 258.0),
    ("Llama-3.2-1B", "speed", 2, 2048, 4.67, 54.6),
    ("Llama-3.2-1B", "speed", 2, 512, 2.25, 19.7),
    ("Qwen2.5-0.5B", "speed", 1, 2048, 2.22, 23.5),
]


# one row of Llama-3.1-8B, the last on an H200: gradient checkpointing, rank, tokens, GPU and host memory that could be
# had (GiB), allocated GiB, milliseconds
LONG = [
    ("memory", 16, 32768, gpu_named("H100").memory_bytes / GIB, 240, 10.53, 4028.0),
    ("oribi", 16, 32768, gpu_named("H100").memory_bytes / GIB, 240, 70.84, 3635.0),
    ("memory", 32, 131072, 24, 240, 18.79, None),
    ("memory", 32, 163840, 24, 240, 22.09, None),
    ("oribi", 32, 327680, 78, 119, 73.10, None),
]


def training_of(name: str, **settings) -> Training:
    config = replace(RunConfig(), **{"model": name, "gradient_accumulation_steps": 1, **settings})
    architecture = Architecture(name, MODELS[name], None, build(MODELS[name], dtype=torch.bfloat16))
    return Training(architecture, config)


@pytest.mark.parametrize(("name", "mode", "rows", "length", "gib", "milliseconds"), MEASURED)
def test_peak_and_time_are_those_measured(name, mode, rows, length, gib, milliseconds):
    training = training_of(
        name, gradient_checkpointing=mode, per_device_train_batch_size=rows, max_seq_length=length
    )
    h100 = gpu_named("H100")
    found = memory.estimate_run(training, h100)
    assert found.peak / GIB == pytest.approx(gib, rel=0.03)
    if milliseconds is not None:
        assert 1e3 * duration(training, found, h100).step == pytest.approx(milliseconds, rel=0.06)


@pytest.mark.parametrize(("mode", "rank", "length", "gpu", "host", "gib", "milliseconds"), LONG)
def test_long_rows_take_what_was_measured(mode, rank, length, gpu, host, gib, milliseconds):
    settings = {"gradient_checkpointing": mode, "per_device_train_batch_size": 1, "max_seq_length": length}
    training = replace(training_of("Llama-3.1-8B", lora_r=rank, **settings), host_bytes=host * GIB)
    found = training.estimate(length, length, int(gpu * GIB))
    assert found.peak / GIB == pytest.approx(gib, rel=0.03)
    if milliseconds is not None:
        step = duration(training, found, gpu_named("H100")).step
        assert 1e3 * step == pytest.approx(milliseconds, rel=0.1)


def test_long_rows_need_host_memory():
    settings = {
        "gradient_checkpointing": "memory",
        "per_device_train_batch_size": 1,
        "max_seq_length": 131072,
    }
    training = replace(training_of("Llama-3.1-8B", **settings), host_bytes=24 * GIB)
    least = training.estimate(131072, 131072, 24 * GIB, least=True)
    assert least.host == 31 * 2**30  # one layer's input is 1 GiB
    assert least.peak < memory.usable(24 * GIB)
    with pytest.raises(
        ConfigError, match=r"needs about 31.0 GiB and this machine's host memory has 21.6 GiB"
    ) as caught:
        memory.require_fit(training, "RTX 4090", 24 * GIB)
    assert "max_seq_length: " in str(caught.value)
    memory.require_fit(replace(training, host_bytes=64 * GIB), "RTX 4090", 24 * GIB)


def test_parameters_are_the_published_ones():
    counted = {name: training_of(name).architecture.parameters for name in MODELS}
    assert counted == {"Llama-3.1-8B": 8030261248, "Llama-3.2-1B": 1235814400, "Qwen2.5-0.5B": 494032768}


def test_weights_of_a_loaded_model_take_what_was_estimated(tiny_folder):
    model, _ = load_model(str(tiny_folder), dtype="bfloat16", device_map="cpu", max_seq_length=64)
    held = 0
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            held += parameter.nbytes
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                held += state.absmax.nbytes + state.state2.absmax.nbytes
    found = architecture_of(str(tiny_folder)).weight_bytes(load_in_4bit=True)
    assert found == pytest.approx(held, rel=0.01)
    assert pytest.approx(0.516, abs=0.001) == NF4_BYTES


@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", "v_proj"], ["gate_proj", "down_proj"]])
def test_trainable_parameters_are_pefts(tiny_folder, targets):
    architecture = architecture_of(str(tiny_folder))
    training = Training(architecture, RunConfig(lora_r=4, target_modules=targets))
    base = build(architecture.config, device="cpu")
    adapted = get_peft_model(
        base, LoraConfig(r=4, target_modules=targets[0] if targets == ["all-linear"] else targets)
    )
    assert training.trainable == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("keep", [Keep(), POLICIES["balanced"]], ids=["speed", "balanced"])
def test_a_layer_keeps_what_was_estimated(load, keep, monkeypatch):
    monkeypatch.setattr(memory, "SPARE_STEP", 16)  # as `kernels.lora` pads without a GPU
    model, _ = load(r=4)
    base = model.get_base_model()
    base.train()
    layer = base.model.layers[0]
    seen = {}
    layer.register_forward_hook(lambda module, inputs, output: seen.update(node=output.grad_fn))
    base.set_recompute_policy([keep] * 2)
    ids = torch.randint(3, 100, (2, 32))
    base(input_ids=ids, labels=ids)
    # the log-sum-exp is a GPU backend's; the reference keeps something else
    kept = dict(seen["node"].kept)
    for portion in kept.pop("mlp"):
        kept |= portion
    held = sum(t.nbytes for name, t in kept.items() if name != "attention_extra")
    training = Training(
        Architecture("tiny", base.config, None, build(base.config, dtype=torch.float32)), RunConfig(lora_r=4)
    )
    log_sum_exp = 64 * 4 * base.config.num_attention_heads
    assert held == training.kept(keep, 64) - log_sum_exp


def test_more_memory_keeps_more_and_never_passes_the_device():
    training = training_of("Llama-3.1-8B", max_seq_length=2048, per_device_train_batch_size=2)
    peaks = []
    for name in ("T4", "RTX 4090", "A100-40GB", "A100-80GB"):
        found = memory.estimate_run(training, gpu_named(name))
        assert found.peak <= usable(gpu_named(name).memory_bytes)
        peaks.append(found.peak)
    assert peaks == sorted(peaks)
    assert peaks[0] < peaks[-1]


def test_the_largest_batch_and_context_are_the_largest():
    training = training_of("Llama-3.1-8B", max_seq_length=2048)
    size = gpu_named("T4").memory_bytes
    rows, context = largest_batch(training, size), largest_context(training, size)
    assert training.fits(rows * 2048, 2048, size)
    assert not training.fits((rows + 1) * 2048, 2048, size)
    assert training.fits(context, context, size)
    assert not training.fits(context + 256, context + 256, size)
    assert (
        largest_context(training_of("Qwen2.5-0.5B"), gpu_named("H200").memory_bytes) == 32768
    )  # its positions


def test_a_run_that_cannot_fit_is_refused_with_what_would():
    size = gpu_named("T4").memory_bytes
    training = training_of(
        "Llama-3.1-8B", per_device_train_batch_size=64, max_seq_length=2048, gradient_accumulation_steps=1
    )
    with pytest.raises(ConfigError, match="needs about .* GiB and Tesla T4 has 13.1 GiB") as refused:
        require_fit(training, "Tesla T4", size)
    assert "per_device_train_batch_size: 32 with gradient_accumulation_steps: 2" in str(refused.value)
    kept = training_of("Llama-3.1-8B", per_device_train_batch_size=2, gradient_checkpointing="false")
    with pytest.raises(ConfigError, match="gradient_checkpointing: oribi"):
        require_fit(kept, "Tesla T4", size)
    whole = training_of("Llama-3.1-8B", full_finetuning=True, load_in_4bit=False)
    with pytest.raises(ConfigError, match="full_finetuning: false"):
        require_fit(whole, "RTX 4090", gpu_named("RTX 4090").memory_bytes)
    require_fit(training_of("Llama-3.1-8B"), "Tesla T4", size)


def test_what_proposals_name_fits():
    size = gpu_named("T4").memory_bytes
    long = training_of("Llama-3.1-8B", max_seq_length=131072)
    with pytest.raises(ConfigError, match="max_seq_length: (\\d+)") as refused:
        require_fit(long, "Tesla T4", size)
    length = int(str(refused.value).partition("max_seq_length: ")[2].split()[0])
    require_fit(
        training_of("Llama-3.1-8B", max_seq_length=length, per_device_train_batch_size=1), "Tesla T4", size
    )


def test_training_is_refused_before_anything_is_loaded(tiny_folder, monkeypatch, tmp_path):
    import oribi.run

    tiny = Environment(torch.device("cuda"), "toy GPU", (8, 0), 2**27, torch.bfloat16, True, "flash", {})
    monkeypatch.setattr(oribi.run, "detect", lambda: tiny)
    monkeypatch.setattr(oribi.run, "load_model", lambda *a, **k: pytest.fail("loaded"))
    config = RunConfig(model=str(tiny_folder), dataset=["rows.jsonl"], output_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="toy GPU"):
        oribi.run.run(config)


def test_of_a_model_outside_the_table_the_weights_are_estimated(tmp_path):
    from transformers import GPT2Config

    GPT2Config(n_embd=8, n_layer=1, n_head=1).save_pretrained(tmp_path)
    with pytest.raises(OutsideFamilyTable, match="gpt2") as raised:
        architecture_of(str(tmp_path))
    needed = sum(raised.value.sizes.parts(2, True).values())
    environment = Environment(torch.device("cuda"), "toy GPU", (8, 0), 1, torch.bfloat16, True, "flash", {})
    run = RunConfig(model=str(tmp_path))
    memory.refuse_what_cannot_fit(run, replace(environment, memory_bytes=2 * needed + 2**31))
    with pytest.raises(ConfigError, match="the weights of .* alone take"):
        memory.refuse_what_cannot_fit(run, environment)


def test_steps_follow_from_the_data():
    training = training_of(
        "Qwen2.5-0.5B", max_seq_length=1000, per_device_train_batch_size=2, gradient_accumulation_steps=5,
        num_train_epochs=3.0,
    )  # fmt: skip
    assert steps_of(training, tokens=98_000, rows=700) == 30  # 100 packs, 10 steps an epoch
    assert steps_of(training, None, None) is None
    training.config.packing = False
    assert steps_of(training, tokens=98_000, rows=700) == 210
    training.config.max_steps = 7
    assert steps_of(training, None, None) == 7


@pytest.mark.parametrize(
    ("driver", "gib", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 79, "H100"),
        ("NVIDIA H100 PCIe", 79, "H100-PCIe"),
        ("NVIDIA A100-SXM4-40GB", 39, "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", 79, "A100-80GB"),
        ("NVIDIA GeForce RTX 4090", 24, "RTX 4090"),
        ("NVIDIA L40S", 44, "L40S"),
        ("NVIDIA L4", 22, "L4"),
        ("Tesla T4", 15, "T4"),
        ("NVIDIA A10G", 22, "A10G"),
    ],
)
def test_drivers_names_are_recognised(driver, gib, name):
    assert recognise(driver, gib * GIB).name == name


def test_unknown_gpus_are_said():
    assert recognise("Radeon Pro", 2**34) is None
    assert all(gpu_named(gpu.name.upper()) is gpu for gpu in GPUS.values())
    with pytest.raises(ConfigError, match="'H1000' is not in the table; did you mean H100"):
        gpu_named("H1000")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["memory", "speed"])
def test_the_estimate_is_what_a_gpu_allocates(mode, tmp_path):
    from datasets import Dataset

    from oribi.lora.attach import attach_lora
    from oribi.train.arguments import SFTConfig
    from oribi.train.trainer import SFTTrainer
    from tests.train.conftest import chatml_tokenizer

    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=12, num_attention_heads=16,
        num_key_value_heads=8, max_position_embeddings=4096,
    )  # fmt: skip
    build(config, dtype=torch.bfloat16, device="cpu").save_pretrained(tmp_path)
    chatml_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = load_model(str(tmp_path), dtype="bfloat16", max_seq_length=2048)
    model = attach_lora(model, r=16, target_modules="all-linear", use_gradient_checkpointing=mode)
    ids = torch.randint(3, 500, (12, 2048)).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    trainer = SFTTrainer(
        model,
        SFTConfig(
            output_dir=str(tmp_path / "out"), max_steps=3, per_device_train_batch_size=2,
            gradient_accumulation_steps=1, max_length=2048, save_strategy="no",
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )  # fmt: skip
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    training = Training(
        architecture_of(str(tmp_path)),
        RunConfig(max_seq_length=2048, per_device_train_batch_size=2, gradient_checkpointing=mode),
    )
    found = training.estimate(4096, 2048, torch.cuda.get_device_properties(0).total_memory)
    assert found.peak == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.1)
