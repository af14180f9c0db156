"""What the machine can do, and why each choice was made: device, dtype, memory, Triton, attention backend."""

import importlib.util
import os
import platform
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch

import oribi

# bytes; more than a process's CUDA context takes
OWN_CONTEXT = 1 << 30


@dataclass(frozen=True)
class Environment:
    """The machine as training will use it.

    Args:
        device: where the model lives; under torchrun each process has its own CUDA device.
        device_name: the GPU's or the CPU's name.
        capability: CUDA compute capability (major, minor), None elsewhere.
        memory_bytes: memory of the device, of the GPU or of the host.
        dtype: what the network computes in: bfloat16, float16 (with loss scaling) or float32.
        triton: whether the Triton kernels run; the PyTorch references run otherwise.
        attention: fastest attention backend: "cudnn", "flash" or "reference".
        reasons: why, one line for each of device, dtype, triton and attention.
        others_bytes: memory of the GPU that other programs held when it was looked at.
    """

    device: torch.device
    device_name: str
    capability: tuple[int, int] | None
    memory_bytes: int
    dtype: torch.dtype
    triton: bool
    attention: str
    reasons: dict[str, str] = field(default_factory=dict)
    others_bytes: int = 0

    @property
    def left_bytes(self) -> int:
        """Memory of the device that other programs leave to this one."""
        return self.memory_bytes - self.others_bytes

    def summary(self, dtype: torch.dtype) -> str:
        """One line for the start of a run whose model computes in `dtype`."""
        kernels = "Triton" if self.triton else "reference"
        return (
            f"version {oribi.__version__} on {self.device_name}, {self.memory_bytes / 2**30:.0f} GiB, "
            f"{str(dtype).removeprefix('torch.')}, {kernels} kernels, {self.attention} attention"
        )


@lru_cache(maxsize=1)
def detect() -> Environment:
    """The machine this process runs on; looked at once."""
    reasons: dict[str, str] = {}
    device, reasons["device"] = _choose_device()
    capability, others = None, 0
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, properties.total_memory
        # ROCm reports a gfx version here that says nothing about CUDA features
        capability = (properties.major, properties.minor) if torch.version.hip is None else None
        others = _others_bytes(device)
    else:
        name, memory = _cpu_name(), _host_memory_bytes()
    dtype, reasons["dtype"] = _choose_dtype(device, capability)
    triton, reasons["triton"] = _choose_triton(device, capability)
    attention, reasons["attention"] = _choose_attention(device, capability)
    return Environment(device, name, capability, memory, dtype, triton, attention, reasons, others)


def is_bfloat16_supported() -> bool:
    """Whether training computes in bfloat16 here without being slower or emulated."""
    return detect().dtype == torch.bfloat16


is_bf16_supported = is_bfloat16_supported  # the other name that scripts use


def _choose_device() -> tuple[torch.device, str]:
    if torch.cuda.is_available():
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        count = torch.cuda.device_count()
        if rank < count:
            return torch.device("cuda", rank), f"CUDA device {rank} of {count}"
        return torch.device("cuda", 0), f"LOCAL_RANK is {rank} but there are {count} CUDA devices"
    if platform.system() == "Darwin" and torch.backends.mps.is_available():
        return torch.device("cpu"), "bitsandbytes has no 4-bit kernels for Apple's GPU"
    built = (
        "CUDA is not available"
        if torch.version.cuda or torch.version.hip
        else "PyTorch is built without CUDA"
    )
    return torch.device("cpu"), built


def _choose_dtype(device: torch.device, capability: tuple[int, int] | None) -> tuple[torch.dtype, str]:
    if device.type == "cuda":
        if capability is None:
            return torch.bfloat16, "ROCm GPUs compute in bfloat16"
        if capability >= (8, 0):
            return torch.bfloat16, f"compute capability {capability[0]}.{capability[1]} has bfloat16"
        return (
            torch.float16,
            f"compute capability {capability[0]}.{capability[1]} has no bfloat16; float16 needs loss scaling",
        )
    if _cpu_has("amx_bf16"):
        # SmolLM2-135M, 512 tokens, one core: 2.2 s a step against 3.7 s in float32
        return torch.bfloat16, "the CPU multiplies bfloat16 matrices in hardware (AMX)"
    if _cpu_has("avx512_bf16") and _cpu_is_amd():
        # products of this model, one core of an EPYC: 200 GFLOP/s against 95 in float32; of a Xeon: 90 against 140
        return torch.bfloat16, "the CPU multiplies bfloat16 twice as fast as float32 (AVX512-BF16 of AMD)"
    return torch.float32, "the CPU has no fast bfloat16 (AMX, or AVX512-BF16 of AMD)"


def _choose_triton(device: torch.device, capability: tuple[int, int] | None) -> tuple[bool, str]:
    references = "; the PyTorch references run"
    if device.type != "cuda":
        return False, "Triton kernels need a GPU" + references
    if capability is None or capability < (7, 5):
        return False, "the Triton kernels need an NVIDIA GPU of compute capability 7.5 or higher" + references
    if importlib.util.find_spec("triton") is None:
        return False, "the triton package is not installed" + references
    return True, "an NVIDIA GPU and the triton package are there"


def _choose_attention(device: torch.device, capability: tuple[int, int] | None) -> tuple[str, str]:
    if device.type != "cuda" or capability is None:
        return "reference", "the fused backends need an NVIDIA GPU"
    if capability[0] >= 9:
        third = capability[0] == 9 and importlib.util.find_spec("flash_attn_3") is not None
        others = "FlashAttention 3 for long rows," if third else "flash for"
        return "cudnn", f"cuDNN for dense rows, {others} packed documents and windows"
    if capability[0] >= 8:
        return "flash", "PyTorch's flash kernels"
    return "reference", f"compute capability {capability[0]}.{capability[1]} is below 8.0"


def _others_bytes(device: torch.device) -> int:
    free, total = torch.cuda.mem_get_info(device)
    held = total - free - torch.cuda.memory_reserved(device)
    return held if held > OWN_CONTEXT else 0  # with the desktop's, which the estimate's margin covers


def _cpu_has(feature: str) -> bool:
    if hasattr(torch.cpu, "get_capabilities"):
        return bool(torch.cpu.get_capabilities().get(feature, False))
    # torch 2.11 and 2.12 have no public names for them
    ask = {"amx_bf16": "_is_amx_tile_supported", "avx512_bf16": "_is_avx512_bf16_supported"}[feature]
    return getattr(torch.cpu, ask)()


def _cpu_is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux: Windows names the maker here
        return "AuthenticAMD" in platform.processor()


def _cpu_name() -> str:
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine()
    return platform.processor() or platform.machine()


def _host_memory_bytes() -> int:
    import psutil  # comes with accelerate

    return psutil.virtual_memory().total
