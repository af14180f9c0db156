"""FlatAdamW against torch.optim.AdamW (32 bit) and bitsandbytes' 8-bit AdamW, and as trainers use it."""

import copy
import io

import pytest
import torch

from oribi.errors import ConfigError, ModelError
from oribi.kernels.adamw import FlatAdamW
from oribi.kernels.dispatch import INTERPRETED
from tests.kernels.truth import DEVICE, ON_TRITON, relative_error

# on a machine with a GPU these tests use it
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

SHAPES = [(64, 96), (1,), (33,), (16, 256), (5, 7, 11), (4096,)]
SETTINGS = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def parameters(shapes=SHAPES, dtype=torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.randn(shape, device=DEVICE).to(dtype)) for shape in shapes]


def twins(shapes=SHAPES, dtype=torch.float32):
    ours = parameters(shapes, dtype)
    return ours, [torch.nn.Parameter(p.detach().clone()) for p in ours]


def set_grads(*lists, scale: float = 1.0) -> None:
    """The same random gradients for several lists of parameters."""
    for group in zip(*lists):
        grad = torch.randn_like(group[0]) * scale
        for p in group:
            if p.grad is None:
                p.grad = grad.clone()
            else:
                p.grad.copy_(grad)


def assert_equal_weights(ours, theirs, tolerance: float) -> None:
    for a, b in zip(ours, theirs):
        assert relative_error(a.detach(), b.detach()) <= tolerance


@pytest.mark.parametrize("max_grad_norm", [None, 0.5, 1e6])
def test_32_bit_steps_equal_torch_adamw_with_clipping(max_grad_norm):
    ours, theirs = twins()
    optimizer = FlatAdamW(ours, bits=32, max_grad_norm=max_grad_norm, **SETTINGS)
    reference = torch.optim.AdamW(theirs, **SETTINGS)
    for _ in range(4 if INTERPRETED else 20):
        set_grads(ours, theirs)
        norm = torch.nn.utils.clip_grad_norm_(theirs, max_grad_norm or float("inf"))
        optimizer.step()
        reference.step()
        assert relative_error(optimizer.last_grad_norm, norm) < 1e-6
        assert all((p.grad == 0).all() for p in ours)
    assert_equal_weights(ours, theirs, 1e-6)


def test_groups_keep_their_own_settings():
    ours, theirs = twins()

    def groups(p):
        return [{"params": p[:3], "lr": 1e-2, "weight_decay": 0.0}, {"params": p[3:], "betas": (0.5, 0.9)}]

    optimizer = FlatAdamW(groups(ours), bits=32, **SETTINGS)
    reference = torch.optim.AdamW(groups(theirs), **SETTINGS)
    for _ in range(5):
        set_grads(ours, theirs)
        optimizer.step()
        reference.step()
    assert_equal_weights(ours, theirs, 1e-6)


def test_two_dtypes_are_clipped_by_one_norm():
    ours = parameters([(8, 8)]) + parameters([(5000,)], torch.float16)
    optimizer = FlatAdamW(ours, bits=8, max_grad_norm=1.0)
    set_grads(ours)
    norm = torch.stack([p.grad.double().norm() for p in ours]).norm()
    optimizer.step()
    assert relative_error(optimizer.last_grad_norm, norm) < 1e-6


def test_8_bit_states_are_the_nearest_codes():
    from bitsandbytes.functional import create_dynamic_map

    maps = [create_dynamic_map(signed=signed).to(DEVICE) for signed in (True, False)]
    weight = parameters([(64, 100)])[0]  # 25 blocks
    optimizer = FlatAdamW([weight], bits=8, **SETTINGS)
    beta1, beta2 = SETTINGS["betas"]
    state = optimizer.state[weight]
    moments = [torch.zeros(25, 256, device=DEVICE) for _ in range(2)]
    for _ in range(5):
        set_grads([weight])
        g = weight.grad.detach().clone().view(25, 256)
        optimizer.step()
        moments = [beta1 * moments[0] + (1 - beta1) * g, beta2 * moments[1] + (1 - beta2) * g * g]
        for i, x in enumerate(moments):
            absmax = x.abs().amax(1, keepdim=True)
            codes = (x[..., None] / absmax[..., None] - maps[i]).abs().argmin(-1)
            if i == 1:
                codes[(codes == 0) & (x > 0)] = 1  # a positive v stays above zero
            stored = state[f"state{i + 1}"].view(25, 256).int()
            assert relative_error(state[f"absmax{i + 1}"], absmax[:, 0]) < 1e-6
            assert (stored - codes).abs().max() <= 1
            assert (stored != codes).float().mean() < 1e-3  # on the border between two codes
            moments[i] = maps[i][stored] * absmax


def test_8_bit_steps_from_the_same_state_equal_bitsandbytes():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    ours, theirs = twins([(64, 96), (16, 512), (300,)])
    optimizer = FlatAdamW(ours, bits=8, **SETTINGS)
    reference = bitsandbytes.optim.AdamW8bit(theirs, **SETTINGS)
    for _ in range(5):
        set_grads(ours, theirs)
        optimizer.step()
        reference.step()
        assert_equal_weights(ours, theirs, 1e-5)
        for a, b in zip(ours[:2], theirs[:2]):  # the third has under 4096 elements: 32 bit in both
            own, other = optimizer.state[a], reference.state[b]
            for i in ("1", "2"):
                values, expected = (s["qmap" + i][s["state" + i].int()] for s in (other | own, other))
                # on CPUs bitsandbytes' own rounding of v is coarser than to the nearest code
                assert (values - expected.view(values.shape)).abs().max() < 0.015
                assert (values - expected.view(values.shape)).abs().mean() < 1e-4
                assert relative_error(own["absmax" + i], other["absmax" + i]) < 1e-6
                for name in ("state" + i, "absmax" + i):
                    other[name].copy_(own[name].view(other[name].shape))
            b.data.copy_(a.data)


def test_8_bit_trains_as_far_as_32_bit():
    def distance(bits: int) -> float:
        torch.manual_seed(1)
        weight = torch.nn.Parameter(torch.zeros(32, 128, device=DEVICE))
        target = torch.randn(32, 128, device=DEVICE)
        optimizer = FlatAdamW([weight], lr=0.1, weight_decay=0.0, bits=bits)
        for _ in range(60):
            ((weight - target) ** 2).sum().backward()
            optimizer.step()
        return (weight.detach() - target).norm().item() / target.norm().item()

    assert distance(8) < max(1.3 * distance(32), 0.02)


def test_a_positive_second_moment_never_becomes_zero():
    weight = torch.nn.Parameter(torch.zeros(4096, device=DEVICE))
    optimizer = FlatAdamW([weight], lr=1e-3, weight_decay=0.0)
    grad = torch.full((4096,), 1e-5, device=DEVICE)
    grad[::256] = 1.0
    weight.grad.copy_(grad)
    optimizer.step()
    for _ in range(3):  # v forgotten, m kept: m / (0 + eps) would be 1e2
        weight.grad.zero_()
        optimizer.step()
    assert weight.detach().abs().max() < 0.02


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("bits", [8, 32])
def test_a_step_with_a_norm_that_is_not_finite_changes_nothing(bad, bits):
    ours = parameters()
    optimizer = FlatAdamW(ours, bits=bits, max_grad_norm=1.0, **SETTINGS)
    set_grads(ours)
    optimizer.step()
    weights, state = [p.detach().clone() for p in ours], copy.deepcopy(optimizer.state_dict()["state"])
    set_grads(ours)
    ours[3].grad.view(-1)[7] = bad
    optimizer.step()
    assert all(torch.equal(p, w) for p, w in zip(ours, weights))
    assert_same_state(optimizer.state_dict()["state"], state)
    assert int(optimizer.skipped_steps) == 1
    assert all((p.grad == 0).all() for p in ours)
    assert not torch.isfinite(optimizer.last_grad_norm)


def assert_same_state(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for index in a:
        assert a[index].keys() == b[index].keys()
        for name in a[index]:
            assert torch.equal(a[index][name], b[index][name]), name


@pytest.mark.parametrize("bits", [8, 32])
def test_a_saved_state_continues_bit_for_bit(bits):
    ours, theirs = twins()
    first = FlatAdamW(ours, bits=bits, **SETTINGS)
    for _ in range(7):
        set_grads(ours)
        first.step()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        for a, b in zip(ours, theirs):
            b.copy_(a)
    second = FlatAdamW(theirs, bits=bits, lr=1.0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert_same_state(first.state_dict()["state"], second.state_dict()["state"])
    for _ in range(3):
        set_grads(ours, theirs)
        first.step()
        second.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_32_bit_state_goes_to_torch_adamw_and_back():
    ours, theirs = twins()
    optimizer, reference = FlatAdamW(ours, bits=32, **SETTINGS), torch.optim.AdamW(theirs, **SETTINGS)
    for _ in range(3):
        set_grads(ours, theirs)
        optimizer.step()
        reference.step()
    theirs_then = torch.optim.AdamW(theirs, **SETTINGS)
    theirs_then.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    ours_then = FlatAdamW(ours, bits=32)
    ours_then.load_state_dict(reference.state_dict())
    for _ in range(3):
        set_grads(ours, theirs)
        ours_then.step()
        theirs_then.step()
    assert_equal_weights(ours, theirs, 1e-6)


def test_a_state_that_does_not_fit_is_refused():
    optimizer = FlatAdamW(parameters(), bits=8)
    with pytest.raises(ModelError, match="groups of"):
        optimizer.load_state_dict(FlatAdamW(parameters(SHAPES[:2]), bits=8).state_dict())
    with pytest.raises(ModelError, match="does not fit"):
        optimizer.load_state_dict(FlatAdamW(parameters(), bits=32).state_dict())


def test_zero_grad_of_optimizer_and_of_model_keep_or_restore_the_flat_views():
    model = torch.nn.Linear(64, 80).to(DEVICE)
    optimizer = FlatAdamW(model.parameters(), bits=32, lr=1e-2)
    twin = copy.deepcopy(model)
    reference = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    views = [p.grad.data_ptr() for p in model.parameters()]
    for step in range(6):
        x = torch.randn(4, 64, device=DEVICE)
        for m in (model, twin):
            m(x).square().sum().backward()
        if step == 2:  # a gradient that is thrown away must not come back
            for m in (model, twin):
                m.zero_grad()
                m(x).sum().backward()
        optimizer.step()
        reference.step()
        assert [p.grad.data_ptr() for p in model.parameters()] == views
        (optimizer if step % 2 else model).zero_grad()
        reference.zero_grad()
    assert_equal_weights(model.parameters(), twin.parameters(), 1e-6)


def test_attached_gradients_are_written_in_place_by_autograd():
    model = torch.nn.Linear(8, 8).to(DEVICE)
    optimizer = FlatAdamW(model.parameters(), bits=32)
    model.zero_grad()
    assert model.weight.grad is None
    optimizer.attach_grads()
    view = model.weight.grad
    model(torch.ones(2, 8, device=DEVICE)).sum().backward()
    assert model.weight.grad is view
    assert (view == 2).all()


def test_a_parameter_without_gradient_stays_unless_it_decays():
    ours = parameters([(4100,), (8,)])
    frozen = torch.nn.Parameter(torch.ones(3, device=DEVICE), requires_grad=False)
    before = [p.detach().clone() for p in ours]
    optimizer = FlatAdamW([*ours, frozen], lr=1e-2, weight_decay=0.0)
    ours[1].sum().backward()
    optimizer.step()
    assert torch.equal(ours[0], before[0])
    assert not torch.equal(ours[1], before[1])
    assert (frozen == 1).all()
    assert frozen.grad is None


def test_learning_rate_schedules_and_closures_work():
    ours, theirs = twins()
    optimizer, reference = FlatAdamW(ours, bits=32, **SETTINGS), torch.optim.AdamW(theirs, **SETTINGS)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (t + 1)) for o in (optimizer, reference)]
    for _ in range(4):
        set_grads(ours, theirs)
        assert optimizer.step(lambda: torch.tensor(3.0)) == 3.0
        reference.step()
        for schedule in schedules:
            schedule.step()
    assert_equal_weights(ours, theirs, 1e-6)


def test_parameters_keep_storages_of_their_own(tmp_path):
    # writers of safetensors files drop tensors that share a storage
    from safetensors.torch import load_file, save_model

    model = torch.nn.Linear(64, 80).to(DEVICE)
    FlatAdamW(model.parameters())
    assert model.weight.untyped_storage().nbytes() == 64 * 80 * 4
    save_model(model, tmp_path / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors", device=DEVICE)
    assert torch.equal(saved["weight"], model.weight)
    assert torch.equal(saved["bias"], model.bias)


def test_accelerate_prepares_steps_and_restores_it(tmp_path):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientAccumulationPlugin

    AcceleratorState._reset_state(True)
    # an earlier test's data loader, still at its end, would ask for a step each time
    every_second = GradientAccumulationPlugin(num_steps=2, sync_with_dataloader=False)
    accelerator = Accelerator(cpu=DEVICE == "cpu", gradient_accumulation_plugin=every_second)
    model = torch.nn.Linear(64, 80)
    model, optimizer = accelerator.prepare(
        model, FlatAdamW(model.to(accelerator.device).parameters(), lr=1e-2)
    )
    before = model.weight.detach().clone()
    for _ in range(4):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.randn(4, 64, device=accelerator.device)).square().sum())
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert float(optimizer.optimizer.state[model.weight]["step"]) == 2
    assert not torch.equal(model.weight, before)
    accelerator.save_state(tmp_path)
    state = copy.deepcopy(optimizer.state_dict()["state"])
    accelerator.backward(model(torch.randn(4, 64, device=accelerator.device)).square().sum())
    optimizer.optimizer.step()
    accelerator.load_state(tmp_path)
    assert_same_state(optimizer.state_dict()["state"], state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 16}, "bits = 16"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"lr": -1.0}, "lr = -1.0"),
        ({"betas": (1.0, 0.9)}, "betas"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        FlatAdamW(parameters([(4,)]), **settings)


def test_parameters_and_gradients_copied_by_a_wrapper_come_back_with_their_values():
    """As torch.nn.Module.to does when it takes the device for another one: new memory within the same tensors."""
    ours, same = twins([(4,), (33,)])
    optimizer, other = FlatAdamW(ours, max_grad_norm=1.0), FlatAdamW(same, max_grad_norm=1.0)
    for moved in (False, True, False):
        set_grads(ours, same)
        if moved:
            for parameter in ours:
                parameter.data = parameter.data.clone()
                parameter.grad.data = parameter.grad.data.clone()
        before = ours[1].detach().clone()
        optimizer.step()
        other.step()
        assert not torch.equal(ours[1], before)
        for mine, expected in zip(ours, same):
            assert torch.equal(mine, expected)
            assert mine.grad.abs().max() == 0


def test_misuse_is_refused():
    with pytest.raises(ConfigError, match="no parameter"):
        FlatAdamW([torch.nn.Parameter(torch.ones(2), requires_grad=False)])
    ours = parameters([(4,)])
    optimizer = FlatAdamW(ours)
    with pytest.raises(ConfigError, match="when it is made"):
        optimizer.add_param_group({"params": parameters([(4,)])})
    ours[0].data = ours[0].data.bfloat16()
    with pytest.raises(ModelError, match="moved or replaced"):
        optimizer.step()


@pytest.mark.gpu
@pytest.mark.skipif(not (ON_TRITON and DEVICE == "cuda"), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", [8, 32])
def test_a_captured_step_replays_as_an_eager_one(bits):
    ours, theirs = twins()
    captured, eager = (FlatAdamW(p, bits=bits, max_grad_norm=1.0, **SETTINGS) for p in (ours, theirs))
    for optimizer in (captured, eager):
        optimizer.step()  # compiles; gradients are zero
    captured.upload_settings()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for step in range(5):
        set_grads(ours, theirs)
        for optimizer in (captured, eager):
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        captured.upload_settings()
        graph.replay()
        eager.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    captured.param_groups[0]["lr"] = 7.0
    with (
        pytest.raises(ConfigError, match="before its step is captured"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        captured.step()
