"""Each decision about the machine follows from what the machine says, and carries its reason."""

from types import SimpleNamespace

import pytest
import torch

from oribi import environment


@pytest.fixture(autouse=True)
def fresh():
    environment.detect.cache_clear()
    yield
    environment.detect.cache_clear()


def pretend_cuda(monkeypatch, major: int, minor: int, count: int = 1, hip: str | None = None) -> None:
    properties = SimpleNamespace(name="GPU", total_memory=80 << 30, major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.version, "hip", hip)


def pretend_cpu(monkeypatch, features: tuple[str, ...], amd: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(environment, "_cpu_has", lambda feature: feature in features)
    monkeypatch.setattr(environment, "_cpu_is_amd", lambda: amd)


def test_this_machine_is_described_with_reasons():
    found = environment.detect()
    assert found.memory_bytes > 1 << 30
    assert found.device_name
    assert set(found.reasons) == {"device", "dtype", "triton", "attention"}
    assert all(found.reasons.values())
    assert environment.is_bfloat16_supported() == (found.dtype == torch.bfloat16)
    assert environment.is_bf16_supported is environment.is_bfloat16_supported


@pytest.mark.parametrize(
    ("capability", "dtype", "triton", "attention"),
    [
        ((6, 1), torch.float16, False, "reference"),
        ((7, 5), torch.float16, True, "reference"),
        ((8, 6), torch.bfloat16, True, "flash"),
        ((9, 0), torch.bfloat16, True, "cudnn"),
    ],
)
def test_the_capability_decides(monkeypatch, capability, dtype, triton, attention):
    pytest.importorskip("triton", reason="the choice asks for triton")
    pretend_cuda(monkeypatch, *capability)
    found = environment.detect()
    assert (found.device.type, found.capability) == ("cuda", capability)
    assert (found.dtype, found.triton, found.attention) == (dtype, triton, attention)
    assert found.memory_bytes == 80 << 30


def test_float16_says_that_it_needs_loss_scaling(monkeypatch):
    pretend_cuda(monkeypatch, 7, 5)
    assert "loss scaling" in environment.detect().reasons["dtype"]
    assert not environment.is_bfloat16_supported()


def test_amd_gpus_run_the_references_in_bfloat16(monkeypatch):
    pretend_cuda(monkeypatch, 9, 4, hip="6.2")
    found = environment.detect()
    assert (found.capability, found.dtype, found.triton, found.attention) == (
        None,
        torch.bfloat16,
        False,
        "reference",
    )


@pytest.mark.parametrize(("rank", "index"), [("2", 2), ("5", 0)])
def test_every_process_of_torchrun_has_its_own_device(monkeypatch, rank, index):
    monkeypatch.setenv("LOCAL_RANK", rank)
    pretend_cuda(monkeypatch, 9, 0, count=4)
    found = environment.detect()
    assert found.device == torch.device("cuda", index)
    assert ("4 CUDA devices" in found.reasons["device"]) == (rank == "5")


@pytest.mark.parametrize(
    ("features", "amd", "dtype"),
    [
        (("amx_bf16", "avx512_bf16"), False, torch.bfloat16),
        (("avx512_bf16",), True, torch.bfloat16),
        (("avx512_bf16",), False, torch.float32),  # Intel's multiplies bfloat16 more slowly than float32
        ((), True, torch.float32),
    ],
)
def test_a_cpu_computes_in_bfloat16_only_where_that_is_fast(monkeypatch, features, amd, dtype):
    pretend_cpu(monkeypatch, features, amd)
    found = environment.detect()
    assert (found.device.type, found.dtype, found.triton, found.attention) == (
        "cpu",
        dtype,
        False,
        "reference",
    )
    assert "bfloat16" in found.reasons["dtype"]


def test_a_missing_triton_is_the_reason(monkeypatch):
    pretend_cuda(monkeypatch, 9, 0)
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)
    found = environment.detect()
    assert not found.triton
    assert found.reasons["triton"] == "the triton package is not installed; the PyTorch references run"
