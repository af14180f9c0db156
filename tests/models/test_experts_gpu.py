"""On a CUDA device: experts give what their references give, and a recorded pass serves any routing."""

import pytest
import torch

from oribi.kernels.dispatch import reference_only
from oribi.lora.attach import attach_lora
from oribi.models.load import load_model
from tests.models.test_parity import relative
from tests.models.tiny_checkpoint import checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# in the MLP's place, and in the layer itself beside an MLP
FAMILIES = {"qwen3_moe": "mlp.experts.", "gemma4_text+experts": "experts."}


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def trained(folder, family: str, dtype: torch.dtype):
    checkpoint(folder, family)
    model, _ = load_model(str(folder), dtype=dtype, max_seq_length=64)
    model = attach_lora(
        model, r=4, target_parameters=[FAMILIES[family] + stack for stack in ("gate_up_proj", "down_proj")]
    )
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    ids = torch.arange(3, 43, device="cuda")[None]
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def replays_any_routing(core: torch.nn.Module, columns: int) -> None:
    """Asserts that a recorded forward and backward pass of experts gives the bits of a new one for other inputs."""
    x = torch.randn(1, 96, columns, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        y = core(x)
        return y.detach(), torch.autograd.grad(y.float().square().sum(), x)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run()
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            x.copy_(torch.randn_like(x) * 3)
        graph.replay()
        assert all(torch.equal(one, other) for one, other in zip(recorded, run()))


def test_gradients_in_float32_equal_the_references(family, tmp_path):
    model = trained(tmp_path, family, torch.float32)
    found = gradients(model)
    with reference_only():
        expected = gradients(model)
    assert all(relative(found[name], expected[name]) < 1e-4 for name in expected)


def test_gradients_are_the_same_bits_every_time_and_whatever_is_kept(family, tmp_path):
    model = trained(tmp_path, family, torch.bfloat16)
    first = gradients(model)
    for policy in ("speed", "balanced", "memory"):
        model.get_base_model().set_recompute_policy(policy)
        again = gradients(model)
        assert all(torch.equal(again[name], first[name]) for name in first), policy


def test_a_recorded_pass_serves_any_routing(family, tmp_path):
    layer = trained(tmp_path, family, torch.bfloat16).get_base_model().model.layers[0]
    core = layer.parts()[1][0]
    replays_any_routing(core, columns=64)
