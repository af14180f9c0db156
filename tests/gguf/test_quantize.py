"""Quantised values are as near as those of llama.cpp's own quantiser, and every tensor gets the type llama.cpp gives it."""

import ctypes
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from gguf.quants import dequantize

from oribi.errors import ConfigError
from oribi.gguf.file import stored_bytes
from oribi.gguf.mixes import METHODS, Type, mix_of
from oribi.gguf.quantize import _root, encode
from oribi.save.gguf import save_gguf
from tests.save.tiny_export import (
    byte_level_tokenizer,
    distance_from_llama_cpp,
    export_config,
    read_back,
    tiny_model,
)

PROMPT = list(range(20, 50))
QUANTISED = [
    Type[name] for name in ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
]


def tensors() -> dict[str, torch.Tensor]:
    """Weights of several shapes: bell curves, long tails, outlier columns, all above zero, half zero, NF4 and an adapter."""
    torch.manual_seed(0)
    normal = torch.randn(64, 1024) * 0.02
    outliers = normal.clone()
    outliers[:, torch.randint(0, 1024, (12,))] *= 8
    sparse = normal * (torch.rand_like(normal) < 0.5)
    codes, state = quantize_4bit(normal, blocksize=64, quant_type="nf4")
    merged = dequantize_4bit(codes, state) + torch.randn(64, 8) @ torch.randn(8, 1024) * 1e-4
    return {
        "normal": normal,
        "long tails": torch.distributions.StudentT(4.0).sample((64, 1024)) * 0.02,
        "outlier columns": outliers,
        "above zero": torch.rand(64, 1024) * 0.1 + 0.05,
        "half zero": sparse,
        "nf4 and an adapter": merged,
    }


def quantize_in_llama_cpp(values: torch.Tensor, type: Type) -> np.ndarray:
    """A tensor's bytes [N, bytes of a row] by llama.cpp's own quantiser, from the library inside xllamacpp."""
    package = pytest.importorskip("xllamacpp", reason="it carries llama.cpp's quantiser")
    library = ctypes.CDLL(str(next(Path(package.__file__).parent.glob("xllamacpp*.so"))))
    function = library.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    values = np.ascontiguousarray(values.numpy(), np.float32)
    rows, row = values.shape
    out = np.empty((rows, stored_bytes((row,), type)), np.uint8)
    function(int(type), values.ctypes.data, out.ctypes.data, 0, rows, row, None)
    return out


def error(values: np.ndarray, packed: np.ndarray, type: Type) -> float:
    difference = dequantize(packed, type).reshape(values.shape) - values
    return float(np.sqrt(np.mean(difference**2, dtype=np.float64)))


@pytest.mark.parametrize("name", tensors())
@pytest.mark.parametrize("type", QUANTISED, ids=lambda type: type.name)
def test_values_are_as_near_as_llama_cpps(type, name):
    values = tensors()[name]
    ours, theirs = encode(values, type), quantize_in_llama_cpp(values, type)
    assert ours.shape == theirs.shape
    assert error(values.numpy(), ours, type) <= 1.02 * error(values.numpy(), theirs, type)


@pytest.mark.parametrize("name", tensors())
def test_q8_0_is_llama_cpps_byte_by_byte(name):
    values = tensors()[name]
    assert np.array_equal(encode(values, Type.Q8_0), quantize_in_llama_cpp(values, Type.Q8_0))


@pytest.mark.parametrize("type", QUANTISED, ids=lambda type: type.name)
def test_zeros_and_single_values_survive(type):
    values = torch.zeros(3, 256)
    values[1, 100] = -2.5
    values[2] = 0.75
    back = dequantize(encode(values, type), type)
    assert np.abs(back - values.numpy()).max() < 0.02 * 2.5
    assert not back[0].any()


@pytest.mark.parametrize("type", QUANTISED, ids=lambda type: type.name)
def test_a_part_is_quantised_as_in_the_whole(type):
    values = tensors()["normal"]
    assert np.array_equal(encode(values, type)[17:19], encode(values[17:19].contiguous(), type))


def test_roots_are_rounded_as_every_device_rounds_them():
    # MKL's, PyTorch's own on CPUs, are an ulp off in a fifth of these on an EPYC
    squares = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 1e-3
    assert np.array_equal(_root(squares).numpy(), np.sqrt(squares.numpy()))


def test_a_tensor_larger_than_one_part_is_whole():
    torch.manual_seed(1)
    values = torch.randn(1030, 512)
    back = dequantize(encode(values, Type.Q8_0), Type.Q8_0)
    assert np.abs(back - values.numpy()).max() < values.abs().max().item() / 127


@pytest.mark.parametrize("type", [Type.F32, Type.F16, Type.BF16], ids=lambda type: type.name)
def test_float_types_round_to_nearest(type):
    values = tensors()["normal"]
    dtype = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}[type]
    written = encode(values, type)
    back = torch.from_numpy(written).view(dtype) if type == Type.BF16 else torch.from_numpy(written)
    assert torch.equal(back.view(values.shape).float(), values.to(dtype).float())


# families whose layers differ in which of the tensors with more bits they have
DEEP = {
    "llama": {"intermediate_size": 288, "num_key_value_heads": 1, "attention_bias": False, "mlp_bias": False},
    "qwen3_5_text": {"layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 4},
    "gemma4_text": {
        "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 4, "num_kv_shared_layers": 8,
        "hidden_size_per_layer_input": 256,
    },
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 4, "block_multiple_of": 256},
}  # fmt: skip
MIXES = [("llama", method) for method in METHODS] + [
    pytest.param(name, method, marks=pytest.mark.long)
    for name in list(DEEP)[1:]
    for method in ("q4_k_m", "q4_k_s", "q3_k_m")
]


@pytest.fixture(scope="module")
def sixteen_layers(tmp_path_factory):
    """Returns a model whose layers get different types, and its float32 file."""
    made = {}

    def make(model_type: str):
        if model_type not in made:
            sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 16}
            model = tiny_model(export_config(model_type, **{**sizes, **DEEP[model_type]}))
            folder = tmp_path_factory.mktemp("f32")
            found = save_gguf(model, folder, byte_level_tokenizer(), "f32", verify=False)
            made[model_type] = model, found["gguf_files"][0]
        return made[model_type]

    return make


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "method"), MIXES)
def test_every_tensor_gets_the_type_llama_cpp_gives_it(model_type, method, sixteen_layers, tmp_path):
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="llama-cpp-python has llama.cpp's llama_model_quantize"
    )
    model, unquantised = sixteen_layers(model_type)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = mix_of(method).file_type
    params.nthread = 1
    theirs = tmp_path / "theirs.gguf"
    assert not llama_cpp.llama_model_quantize(
        unquantised.encode(), str(theirs).encode(), ctypes.byref(params)
    )
    ours = save_gguf(model, tmp_path / "ours", byte_level_tokenizer(), method, verify=False)["gguf_files"][0]
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(theirs).tensors}
    expected = {name: tensor.tensor_type.name for name, tensor in written.items()}
    found = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(ours).tensors}
    left_alone = ["per_layer_model_proj.weight"] * (
        model_type == "gemma4_text"
    )  # theirs as the file of 32 bits has it
    assert [found.pop(name) + expected.pop(name) for name in left_alone] == ["F16F32"] * len(left_alone)
    assert found == expected
    # its files hold what its quantiser gives, with which other tests compare
    for tensor in gguf.GGUFReader(unquantised).tensors:
        if written[tensor.name].tensor_type in QUANTISED:
            packed = quantize_in_llama_cpp(
                torch.from_numpy(np.array(tensor.data)), written[tensor.name].tensor_type
            )
            assert np.array_equal(written[tensor.name].data, packed), tensor.name


@pytest.mark.parametrize("method", ["q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k", "q5_1", "q4_0"])
def test_llama_cpp_reads_a_mix_as_our_own_reader_does(method, tmp_path):
    pytest.importorskip("xllamacpp", reason="llama.cpp judges these files")
    model = tiny_model(export_config("qwen3", hidden_size=256, intermediate_size=512, num_hidden_layers=2))
    result = save_gguf(model, tmp_path, byte_level_tokenizer(), method, verify=False)
    path = result["gguf_files"][0]
    found = distance_from_llama_cpp(read_back(path), path, PROMPT, steps=6)
    # llama.cpp rounds activations to 8 bits where weights are quantised
    assert found.kl < 0.03
    assert found.worst < 0.8


def test_methods_are_named_as_people_name_them():
    assert [mix_of(name).name for name in ("Q8_0", "q4_k", "fast_quantized", "not_quantized", "quantized")] == [
        "q8_0", "q4_k_m", "q8_0", "f16", "q4_k_m"
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"'q7_0'; did you mean q8_0\?"):
        mix_of("q7_0")
    with pytest.raises(ConfigError, match="needs an importance matrix"):
        mix_of("IQ2_XXS")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("type", QUANTISED, ids=lambda type: type.name)
def test_a_gpu_quantises_as_near_as_the_cpu(type):
    values = tensors()["long tails"]
    here, there = encode(values, type), encode(values.cuda(), type)
    assert error(values.numpy(), there, type) <= 1.001 * error(values.numpy(), here, type)
