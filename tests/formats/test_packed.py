"""Checkpoints quantised for servers are read with every scale that they have, or refused by the name of what is wrong."""

import pytest
import torch

from oribi.errors import ModelError
from oribi.formats.settings import packed_format
from oribi.models.files import HubOptions, Location, open_weights
from tests.formats.quantised import FORMATS, quantised_checkpoint
from tests.models.tiny_checkpoint import edit_config, edit_tensors

CPU = torch.device("cpu")


def read_all(folder, **options) -> dict[str, torch.Tensor]:
    source = open_weights(Location("checkpoint", folder, str(folder)), HubOptions(), **options)
    return {name: source.read(name, CPU, torch.float32) for name in source.shapes()}


# formats that differ from another by a table or a shape alone
ALIKE = ("ct fp8 blocks", "ct int8", "mxfp4", "nvfp4 modelopt", "w8a16")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in ALIKE else name for name in FORMATS]
)
def test_every_weight_has_the_value_that_its_format_gives_it_to_the_bit(name, tmp_path):
    values = quantised_checkpoint(tmp_path, name)
    read = read_all(tmp_path)
    assert read.keys() == values.keys()
    assert [key for key in values if not torch.equal(read[key], values[key])] == []


WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("fp8 blocks", "_scale_inv"), ("ct fp8 channel", "_scale"), ("nvfp4", "_scale"), ("nvfp4", "_global_scale"),
        ("nvfp4 modelopt", "_scale_2"), ("w4a16", "_scale"), ("w4a16", "_shape"), ("w4a16", "_packed"), ("ct fp8 channel", ""),
    ],
)  # fmt: skip
def test_a_weight_that_lacks_a_part_is_refused_by_its_name(name, part, tmp_path):
    quantised_checkpoint(tmp_path, name)
    edit_tensors(tmp_path, lambda tensors: tensors.pop(WEIGHT + part))
    with pytest.raises(
        ModelError, match=r"not every weight can be read.* model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        read_all(tmp_path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (
            "fp8 blocks",
            lambda t: t.update({f"{WEIGHT}_scale_inv": t[f"{WEIGHT}_scale_inv"][:2].contiguous()}),
        ),
        ("ct fp8 channel", lambda t: t.update({f"{WEIGHT}_scale": t[f"{WEIGHT}_scale"][:7].contiguous()})),
        ("nvfp4", lambda t: t.update({f"{WEIGHT}_scale": t[f"{WEIGHT}_scale"][:, :7].contiguous()})),
        ("w4a16", lambda t: t.update({f"{WEIGHT}_shape": torch.tensor([320, 100])})),
        (
            "w4a16 asymmetric",
            lambda t: t.update({f"{WEIGHT}_zero_point": torch.zeros(7, 3, dtype=torch.int32)}),
        ),
        ("w4a16 reordered", lambda t: t[f"{WEIGHT}_g_idx"].fill_(1)),
    ],
)
def test_scales_of_another_size_are_refused_by_the_weight(name, change, tmp_path):
    quantised_checkpoint(tmp_path, name)
    edit_tensors(tmp_path, change)
    with pytest.raises(
        ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.* fit no matrix|gives? each of"
    ):
        read_all(tmp_path)


def test_a_part_that_no_reader_knows_is_refused_and_scales_of_activations_are_not(tmp_path):
    quantised_checkpoint(tmp_path, "ct fp8 channel")
    edit_tensors(
        tmp_path, lambda tensors: tensors.update({WEIGHT.replace("weight", "k_scale"): torch.ones(1)})
    )
    assert WEIGHT in read_all(tmp_path)
    edit_tensors(
        tmp_path,
        lambda tensors: tensors.update({WEIGHT.replace("weight", "pre_quant_scale"): torch.ones(192)}),
    )
    with pytest.raises(
        ModelError, match=r"lack other parts: model\.layers\.1\.mlp\.up_proj\.pre_quant_scale"
    ):
        read_all(tmp_path)


def test_codes_in_a_config_that_names_no_format_are_refused(tmp_path):
    quantised_checkpoint(tmp_path, "ct fp8 channel")
    edit_config(tmp_path, quantization_config=None)
    with pytest.raises(ModelError, match="dtype F8_E4M3"):
        read_all(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "compressed-tensors", "format": "sparse-24-bitmask"}, "format sparse-24-bitmask"),
        (
            {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {}}},
            "transform_config",
        ),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-bitmask"}},
            "sparsity_config sparse-bitmask",
        ),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"blocks of \[128\]"),
    ],
)
def test_what_the_tensors_do_not_tell_is_refused(settings, message):
    with pytest.raises(ModelError, match=message):
        packed_format(settings)


def test_blocks_are_128_by_128_where_fp8_names_none():
    assert packed_format({"quant_method": "fp8"}).block == (128, 128)
    assert packed_format({"quant_method": "fp8", "weight_block_size": None}).block is None


def test_experts_stacked_in_one_tensor_have_scales_of_each(tmp_path):
    from oribi.formats.codecs import decode_scaled

    codes = torch.randn(3, 256, 128).to(torch.float8_e4m3fn)
    blocks, whole = torch.rand(3, 2, 1), torch.rand(3, 1, 1)
    expected = torch.stack([decode_scaled(codes[e], blocks[e], (128, 128)) for e in range(3)])
    assert torch.equal(decode_scaled(codes, blocks, (128, 128)), expected)
    assert torch.equal(decode_scaled(codes, whole), codes.float() * whole)
