"""Weights are dequantised as the formats' own libraries do, to the bit, in the dtype that those give."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from oribi.formats.codecs import decode_scaled, encode_fp8, encode_int4
from oribi.models.files import HubOptions, Location, open_weights
from tests.formats.quantised import FORMATS, quantised_checkpoint

pytestmark = pytest.mark.long
CPU = torch.device("cpu")
# the last release of compressed-tensors that read groups of columns that are no neighbours is older than the one compared with
OF_LIBRARY = [name for name, (settings, _) in FORMATS.items() if settings["quant_method"] == "compressed-tensors" and name != "w4a16 reordered"]  # fmt: skip


def decompressed(parts: dict[str, torch.Tensor], settings: dict) -> torch.Tensor:
    """A weight as compressed-tensors reads it."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = QuantizationScheme.model_validate(settings["config_groups"]["group_0"])
    return BaseCompressor.get_value_from_registry(settings["format"]).decompress(parts, scheme)["weight"]


def parts_of(folder, weight: str) -> dict[str, torch.Tensor]:
    prefix = f"{weight.rpartition('.')[0]}."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
        if name.startswith(prefix)
    }


@pytest.mark.parametrize("name", OF_LIBRARY)
def test_values_are_those_of_compressed_tensors(name, tmp_path):
    values = quantised_checkpoint(tmp_path, name)
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    source = open_weights(Location("checkpoint", tmp_path, "tiny"), HubOptions())
    for weight in (key for key in values if key.endswith("_proj.weight")):
        expected = decompressed(parts_of(tmp_path, weight), settings)
        assert torch.equal(source.read(weight, CPU, expected.dtype), expected), weight


@pytest.mark.parametrize("shape", [(256, 384), (128, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_of_blocks_are_those_of_transformers(shape, dtype):
    codes = (40 * torch.randn(shape)).to(torch.float8_e4m3fn)
    scale = torch.rand(shape[0] // 128, shape[1] // 128) / 50
    expected = Fp8Dequantize(None)._dequantize_one(codes, scale, dtype)
    assert torch.equal(decode_scaled(codes, scale, (128, 128)).to(dtype), expected)
    assert torch.equal(
        decode_scaled(codes, scale[0, 0]).to(dtype),
        Fp8Dequantize(None)._dequantize_one(codes, scale[0, 0], dtype),
    )


def test_what_is_written_is_read_by_compressed_tensors():
    weight = torch.randn(96, 256)
    for dtype in (torch.bfloat16, torch.float16):
        eight, four = encode_fp8(weight, dtype), encode_int4(weight, 128, dtype)
        settings = {name: FORMATS[name][0] for name in ("ct fp8 channel", "w4a16")}
        settings["w4a16"]["config_groups"]["group_0"]["weights"]["group_size"] = 128
        for form, parts, most in (("ct fp8 channel", eight, 0.03), ("w4a16", four, 0.11)):
            found = decompressed(parts, settings[form])
            assert found.dtype == dtype
            assert (found.float() - weight).norm() <= most * weight.norm()
