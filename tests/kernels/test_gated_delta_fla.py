"""fla-core is called as its function wants it, and only after it has given what the reference gives: with stand-ins on the CPU;
with the package itself on a GPU.
"""

from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F

from oribi.kernels import gated_delta_fla as fla
from oribi.kernels.gated_delta import _forward_and_backward, gated_delta
from oribi.kernels.gated_delta_chunks import chunks_of
from tests.kernels.truth import relative_error

CPU = torch.device("cpu")


def stand_in(factor: float = 1.0):
    """The rule with the package's arguments, by the reference; `factor`: what it does wrong to gradients of g."""

    def chunk_gated_delta_rule(
        q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, cu_seqlens_cpu=None
    ):  # fmt: skip
        rows, length = q.shape[:2]
        bounds = range(0, rows * length + 1, length)
        if cu_seqlens is not None:
            assert rows == 1
            assert cu_seqlens.tolist() == cu_seqlens_cpu.tolist()
            bounds = cu_seqlens.tolist()
        g = g * factor + (g * (1 - factor)).detach()
        flat = (x.flatten(0, 1) for x in (q, k, v, g, beta))
        return gated_delta(*flat, chunks_of(bounds, CPU), scale).view(v.shape), None

    return chunk_gated_delta_rule


@pytest.fixture
def package(monkeypatch):
    """Puts a function in the package's place."""
    fla.fla_agrees.cache_clear()
    yield lambda function: monkeypatch.setattr(fla, "fla_function", lambda: function)
    fla.fla_agrees.cache_clear()


def agrees() -> bool:
    return fla.fla_agrees(CPU, torch.bfloat16, 1, 16, 2, 8, _forward_and_backward)


def test_the_package_is_used_where_it_gives_what_the_reference_gives(package):
    package(stand_in())
    assert agrees()


def test_a_wrong_gradient_or_a_failure_is_said_and_oribis_own_path_taken(package, caplog):
    package(stand_in(1.1))
    assert not agrees()
    assert "differs from the reference" in caplog.text
    fla.fla_agrees.cache_clear()

    def fails(*arguments, **settings):
        raise RuntimeError("no kernel for this GPU")

    package(fails)
    assert not agrees()
    assert "it failed (no kernel for this GPU)" in caplog.text


@pytest.mark.parametrize("lengths", [[40, 40], [3, 0, 70]])
def test_rows_and_packs_are_laid_out_as_the_package_takes_them(package, lengths):
    package(stand_in())
    bounds, tokens = [0, *accumulate(lengths)], sum(lengths)
    q, k = (F.normalize(torch.randn(tokens, 1, 16), dim=-1) for _ in range(2))
    v, g, b = torch.randn(tokens, 2, 8), -torch.rand(tokens, 2), torch.rand(tokens, 2)
    inputs, do, chunks = (q, k, v, g, b), torch.randn(tokens, 2, 8), chunks_of(bounds, CPU)
    expected = _forward_and_backward(do, inputs, chunks, 0.25)
    found = fla.fla_forward(inputs, chunks, 0.25)[0], *fla.fla_backward(do, inputs, chunks, 0.25)
    for mine, theirs in zip(found, expected):
        assert relative_error(mine, theirs) < 1e-6


def test_on_a_cpu_it_is_never_asked_for(package):
    package(lambda *arguments: pytest.fail("called"))
    x = torch.zeros(1, 1, 16, dtype=torch.bfloat16)
    assert not fla.use_fla(x, x, _forward_and_backward)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(fla.fla_function() is None, reason="fla-core is not installed")
def test_the_package_agrees_on_this_gpu():
    assert fla.fla_agrees(torch.device("cuda:0"), torch.bfloat16, 2, 128, 4, 128, _forward_and_backward)
