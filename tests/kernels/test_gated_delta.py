"""The gated delta rule in chunks: against the recurrence token by token in float64, alone, packed, continued and by step."""

from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F

from oribi.kernels import gated_delta as rule
from oribi.kernels.gated_delta import chunks_of, gated_delta, gated_delta_forward, gated_delta_step
from tests.kernels.truth import relative_error

LENGTHS = [1, 3, 63, 64, 65, 0, 130]
BOUNDS = [0, *accumulate(LENGTHS)]
KEY_HEADS, HEADS, WIDTH, VALUE, SCALE = 2, 6, 16, 24, 0.3


def inputs(decay: float = 1.0) -> list[torch.Tensor]:
    """q, k, v, g and b of a pack, float64."""
    torch.manual_seed(0)
    tokens = BOUNDS[-1]
    q, k = (F.normalize(torch.randn(tokens, KEY_HEADS, WIDTH).double(), dim=-1) for _ in range(2))
    v, g = torch.randn(tokens, HEADS, VALUE).double(), -decay * torch.rand(tokens, HEADS).double()
    return [x.requires_grad_() for x in (q, k, v, g, torch.rand(tokens, HEADS).double())]


def recurrence(q, k, v, g, b) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs, and the memory after each document, one token at a time."""
    q, k = (x.repeat_interleave(HEADS // KEY_HEADS, 1) for x in (q, k))
    outputs, states = [], []
    for first, last in zip(BOUNDS, BOUNDS[1:]):
        s = torch.zeros(HEADS, WIDTH, VALUE, dtype=torch.float64)
        for t in range(first, last):
            s = s * g[t].exp()[:, None, None]
            wrong = v[t] - torch.einsum("hf,hfe->he", k[t], s)
            s = s + torch.einsum("hf,he->hfe", k[t], b[t][:, None] * wrong)
            outputs.append(SCALE * torch.einsum("hf,hfe->he", q[t], s))
        states.append(s)
    return torch.stack(outputs), torch.stack(states)


@pytest.mark.parametrize("decay", [0.1, 30.0])
@pytest.mark.parametrize("portion", [2**18, 600])
def test_a_pack_and_every_gradient_equal_the_recurrence(decay, portion, monkeypatch):
    monkeypatch.setattr(rule, "PORTION", portion)  # of the heads: all at once, and one key head at a time
    given, chunks = inputs(decay), chunks_of(BOUNDS, torch.device("cpu"))
    truth, states = recurrence(*given)
    upstream = torch.randn_like(truth)
    found = gated_delta(*given, chunks, SCALE)
    assert relative_error(found, truth) < 1e-12
    expected = torch.autograd.grad(truth, given, upstream)
    for mine, theirs in zip(torch.autograd.grad(found, given, upstream), expected):
        assert relative_error(mine, theirs) < 1e-12
    last = gated_delta_forward(*given, chunks, SCALE, final=True)[1]
    assert relative_error(last, states) < 1e-12


def test_a_document_goes_on_from_its_memory_in_chunks_and_by_single_tokens():
    given = [x.detach() for x in inputs()]
    truth, states = recurrence(*given)
    first, last = BOUNDS[-2:]
    middle = first + 70
    device = torch.device("cpu")
    memory = None
    for part in (slice(first, middle), slice(middle, last)):
        chunks = chunks_of([0, part.stop - part.start], device)
        found, memory = gated_delta_forward(*(x[part] for x in given), chunks, SCALE, memory, final=True)
        assert relative_error(found, truth[part]) < 1e-12
    assert relative_error(memory[0], states[-1]) < 1e-12
    memory = torch.zeros(1, HEADS, WIDTH, VALUE, dtype=torch.float64)
    for t in range(first, last):
        found = gated_delta_step(*(x[t : t + 1] for x in given), memory, SCALE)
        assert relative_error(found[0], truth[t]) < 1e-12
    assert relative_error(memory[0], states[-1]) < 1e-12


def test_16_bit_inputs_are_rounded_once():
    given = [x.detach().to(torch.float32 if i > 2 else torch.bfloat16) for i, x in enumerate(inputs())]
    found = gated_delta(*given, chunks_of(BOUNDS, torch.device("cpu")), SCALE)
    truth, _ = recurrence(*(x.double() for x in given))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, truth.bfloat16()) or relative_error(found, truth) < 2e-3
