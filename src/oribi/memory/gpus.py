"""GPUs by name: memory, arithmetic, bandwidth and link to the host, from their makers' data sheets, for estimates and utilisation."""

from dataclasses import dataclass

from oribi.errors import ConfigError
from oribi.text import one_of

# of the data sheet's rates, what large matrix products and copies to pinned memory reach. Measured on an H100
PRODUCT_SHARE, LINK_SHARE = 650 / 989, 49 / 64


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Args:
        name: short.
        memory_gib: usable by programs.
        tflops: dense 16-bit tensor arithmetic with float32 sums, in 10^12 a second.
        bandwidth_gbs: of its memory, in 10^9 bytes per second.
        capability: CUDA compute capability.
        link_gbs: of its link to the host, one way, in 10^9 bytes per second.
    """

    name: str
    memory_gib: float
    tflops: float
    bandwidth_gbs: float
    capability: tuple[int, int]
    link_gbs: float

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * 2**30)

    @property
    def host_bytes_per_flop(self) -> float:
        """Bytes copied to the host in the time of one operation of a matrix product; a run measures both."""
        return LINK_SHARE * self.link_gbs * 1e9 / (PRODUCT_SHARE * self.tflops * 1e12)


GPUS: dict[str, Gpu] = {
    gpu.name.lower(): gpu
    for gpu in (
        Gpu("T4", 14.6, 65, 320, (7, 5), 16),
        Gpu("V100", 15.8, 112, 900, (7, 0), 16),
        Gpu("RTX 3060", 11.6, 25, 360, (8, 6), 32),
        Gpu("RTX 3090", 23.6, 71, 936, (8, 6), 32),
        Gpu("RTX 4060", 7.6, 30, 272, (8, 9), 16),
        Gpu("RTX 4060 Ti", 15.6, 44, 288, (8, 9), 16),
        Gpu("RTX 4090", 23.6, 165, 1008, (8, 9), 32),
        Gpu("RTX 5090", 31.4, 210, 1792, (12, 0), 64),
        Gpu("RTX A6000", 47.5, 155, 768, (8, 6), 32),
        Gpu("A10G", 22.1, 70, 600, (8, 6), 32),
        Gpu("L4", 22.0, 121, 300, (8, 9), 32),
        Gpu("L40S", 44.4, 362, 864, (8, 9), 32),
        Gpu("A100-40GB", 39.4, 312, 1555, (8, 0), 32),
        Gpu("A100-80GB", 79.1, 312, 2039, (8, 0), 32),
        Gpu("H100-PCIe", 79.1, 756, 2000, (9, 0), 64),
        Gpu("H100", 79.1, 989, 3350, (9, 0), 64),
        Gpu("H200", 139.8, 989, 4800, (9, 0), 64),
        Gpu("B200", 178.4, 2250, 8000, (10, 0), 64),
    )
}


def gpu_named(name: str) -> Gpu:
    """A GPU by its short name, in any case.

    Raises:
        ConfigError: it is not in the table.
    """
    wanted = _key(name)
    for key, gpu in GPUS.items():
        if _key(key) == wanted:
            return gpu
    raise ConfigError(
        f"GPU {name!r} is not in the table; {one_of(name, [gpu.name for gpu in GPUS.values()])}"
    )


def recognise(device_name: str, memory_bytes: int) -> Gpu | None:
    """The table's row for a name as the driver says it, "NVIDIA H100 80GB HBM3"; None if it has none.

    Where one name comes with several memories, the row nearest in memory is taken.
    """
    words = _key(device_name)
    found = [gpu for key, gpu in GPUS.items() if _key(key.split("-")[0]) in words]
    if "pcie" not in words:
        found = [gpu for gpu in found if not gpu.name.endswith("PCIe")]
    # "L4" stands in "L40S" and "A10" in "A100": the longest name is meant
    longest = max((len(gpu.name.split("-")[0]) for gpu in found), default=0)
    found = [gpu for gpu in found if len(gpu.name.split("-")[0]) == longest]
    return min(found, key=lambda gpu: abs(gpu.memory_bytes - memory_bytes), default=None)


def _key(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
