"""On a CUDA device: weights are packed there as bitsandbytes packs them, memory stays near the model, training is finite."""

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import quantize_4bit

from oribi.lora.attach import attach_lora
from oribi.models.load import load_model
from tests.models.tiny_checkpoint import checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_packed_on_the_device_bit_for_bit_as_bitsandbytes(tmp_path):
    theirs = checkpoint(tmp_path)
    model, _ = load_model(str(tmp_path), max_seq_length=64)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    for name, layer in model.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            dense = theirs.get_parameter(f"{name}.weight").data.to("cuda", model.dtype)
            codes, state = quantize_4bit(dense, blocksize=64, compress_statistics=True, quant_type="nf4")
            assert torch.equal(layer.weight.data, codes)
            assert torch.equal(layer.weight.quant_state.absmax, state.absmax)


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_a_training_step_is_finite_and_generation_follows(load_in_4bit, tmp_path):
    checkpoint(tmp_path)
    model, tokenizer = load_model(str(tmp_path), max_seq_length=64, load_in_4bit=load_in_4bit)
    model = attach_lora(model, r=8)
    ids = torch.arange(3, 43, device="cuda")[None]
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in trained)
    inputs = tokenizer(["the cat", "a longer one"], return_tensors="pt", padding=True).to("cuda")
    assert model.generate(**inputs, max_new_tokens=4).shape[0] == 2


def test_the_pairs_do_not_depend_on_what_ran_before(tmp_path):
    checkpoint(tmp_path)
    made = []
    for _ in range(2):
        torch.rand(5, device="cuda")
        model = attach_lora(load_model(str(tmp_path), max_seq_length=64)[0], r=4, random_state=1)
        made.append([p.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*made))


def test_smollm2_loads_into_its_packed_size(smollm2_file):
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model, _ = load_model(str(smollm2_file))
    held = torch.cuda.memory_allocated() - before
    packed = sum(p.numel() * p.element_size() for p in model.parameters())
    assert held < 1.1 * packed + (8 << 20)
    # one dense embedding matrix and the working space of one layer's packing
    assert torch.cuda.max_memory_allocated() - before < held + (64 << 20)
