"""The gated delta rule in chunks: against the recurrence token by token in float64, alone, packed, continued and by step;
the kernels against the reference in float64, on a GPU or interpreted.
"""

from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F

from oribi.kernels import dispatch
from oribi.kernels import gated_delta as rule
from oribi.kernels import gated_delta_reference as reference
from oribi.kernels.gated_delta import (
    gated_delta,
    gated_delta_backward,
    gated_delta_forward,
    gated_delta_step,
    use_kernels,
)
from oribi.kernels.gated_delta_chunks import CHUNK, Chunks, chunks_of
from tests.kernels.truth import DEVICE, DTYPES, needs_kernels, relative_error

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
    monkeypatch.setattr(
        reference, "REFERENCE_PORTION", portion
    )  # of the heads: all at once, and one key head at a time
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


def test_the_kernels_table_has_the_chunks_of_every_document_and_is_as_large_for_any_documents():
    for lengths in (LENGTHS, [0, 0, 326, 0, 0, 0, 0], [326, 0, 0, 0, 0, 0, 0]):
        bounds = [0, *accumulate(lengths)]
        expected = [
            (start, min(CHUNK, b - start)) for a, b in zip(bounds, bounds[1:]) for start in range(a, b, CHUNK)
        ]
        known = chunks_of(bounds, torch.device("cpu")).table
        assert known.chunks.tolist() == [list(chunk) for chunk in expected]
        unknown = Chunks(
            torch.tensor(bounds, dtype=torch.int32), 326, lambda: pytest.fail("asked the host")
        ).table
        assert unknown.first.tolist() == known.first.tolist()
        assert unknown.first.tolist() == [0, *accumulate(-(-n // CHUNK) for n in lengths)]
        assert len(unknown.chunks) == (326 + 63 * 7) // 64
        assert unknown.chunks[: len(expected)].tolist() == known.chunks.tolist()
        assert not unknown.chunks[len(expected) :, 1].any()


KERNELS_DTYPES = [d for d in DTYPES if dispatch.INTERPRETED or d is torch.bfloat16]
# key heads, value heads, F and E: those of published models, tiles that are not full, and one wider than a tile
SHAPES = (
    [(1, 1, 24, 40), (1, 2, 80, 16)]
    if dispatch.INTERPRETED
    else [(2, 6, 128, 128), (1, 2, 80, 40), (2, 2, 256, 64)]
)
DOCUMENTS = [65, 0, 2] if dispatch.INTERPRETED else [1, 700, 64, 0, 65, 3]


def kernel_inputs(dtype: torch.dtype, shape: tuple, like: float = 0.0, decay: float = 1.0):
    """q, k, v, g, b and do of a pack; v is a view of wider rows, as a convolution writes it. `like`: how like keys are."""
    torch.manual_seed(0)
    (key_heads, heads, key, value), tokens = shape, sum(DOCUMENTS)
    common = like * torch.randn(key)
    q, k = (F.normalize(torch.randn(tokens, key_heads, key) + common, dim=-1) for _ in range(2))
    v = torch.randn(tokens, 8 + heads * value)[:, 8:].unflatten(1, (heads, value))
    g, b = -decay * torch.rand(tokens, heads), torch.rand(tokens, heads)
    do = torch.randn(tokens, heads, value)
    return [x.to(DEVICE, g.dtype if x is g else dtype) for x in (q, k, v, g, b, do)]


def documents(unknown: bool = True) -> Chunks:
    bounds = [0, *accumulate(DOCUMENTS)]
    offsets = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    return Chunks(offsets, bounds[-1], (lambda: bounds) if unknown else bounds)


def allowed(dtype: torch.dtype, like: float) -> float:
    """Relative error: the rounding of a result alone is a quarter of a 16-bit type's eps. What like keys write cancels, and
    roundings of N, whose sum is small beside its terms, do not: a chunk's 64 add up to 8 times as much.
    """
    return 5e-6 if dtype is torch.float32 else torch.finfo(dtype).eps * (4 if like else 1)


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("dtype", KERNELS_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("like", "decay"), [(0.0, 1.0), (1.0, 0.01)])
def test_the_kernels_equal_the_reference_in_float64(dtype, shape, like, decay):
    *given, do = kernel_inputs(dtype, shape, like, decay)
    assert use_kernels(given[0])
    initial = 0.1 * torch.randn(len(DOCUMENTS), shape[1], *shape[2:], device=DEVICE)
    found, last = gated_delta_forward(*given, documents(), SCALE, initial, final=True)
    grads = gated_delta_backward(do, given, documents(), SCALE)
    exact, known = [x.double() for x in given], documents(False)
    truth, end = gated_delta_forward(*exact, known, SCALE, initial.double(), final=True)
    expected = gated_delta_backward(do.double(), exact, known, SCALE)
    assert found.dtype == dtype
    errors = {"out": relative_error(found, truth), "final": relative_error(last, end)}
    for name, mine, theirs in zip(grads._fields, grads, expected):
        errors[name] = relative_error(mine, theirs)
    print(f"{dtype}, {shape}, like {like}:", {name: f"{error:.1e}" for name, error in errors.items()})
    assert all(error < allowed(dtype, like) for error in errors.values()), errors


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_the_kernels_compute_some_heads_at_a_time_and_documents_do_not_touch(monkeypatch):
    dtype, shape = KERNELS_DTYPES[0], (2, 4, 16, 16)
    *given, do = kernel_inputs(dtype, shape)
    out = gated_delta_forward(*given, documents(), SCALE)[0]
    grads = gated_delta_backward(do, given, documents(), SCALE)
    monkeypatch.setattr(rule, "KERNEL_PORTION", 1)
    assert torch.equal(gated_delta_forward(*given, documents(), SCALE)[0], out)
    for mine, theirs in zip(gated_delta_backward(do, given, documents(), SCALE), grads):
        assert torch.equal(mine, theirs)
    first = DOCUMENTS[0]
    for x in (*given, do):
        x[:first] *= 0.5
    assert torch.equal(gated_delta_forward(*given, documents(), SCALE)[0][first:], out[first:])
    for mine, theirs in zip(gated_delta_backward(do, given, documents(), SCALE), grads):
        assert torch.equal(mine[first:], theirs[first:])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_recorded_rule_takes_other_documents():
    *given, do = kernel_inputs(torch.bfloat16, SHAPES[0])
    bounds = [0, *accumulate(DOCUMENTS)]
    offsets = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)

    def run() -> list[torch.Tensor]:
        chunks = Chunks(offsets, bounds[-1], lambda: pytest.fail("asked the host"))
        return [
            gated_delta_forward(*given, chunks, SCALE)[0], *gated_delta_backward(do, given, chunks, SCALE)
        ]  # fmt: skip

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run()
    offsets[1:-1] = torch.tensor([100, 101, 101, 300, 500], device=DEVICE)
    graph.replay()
    for mine, theirs in zip(recorded, run()):
        assert torch.equal(mine, theirs)
