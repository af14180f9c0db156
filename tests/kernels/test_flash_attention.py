"""The attention with soft caps: documents, windows, grouped heads, odd sizes; on a GPU or in Triton's interpreter."""

import pytest
import torch

from oribi.kernels import dispatch, flash_attention
from oribi.kernels.flash_attention import flash_attention_backward, flash_attention_forward
from tests.kernels.test_attention import SCALE, inputs, truth
from tests.kernels.truth import DEVICE, DTYPES, assert_twice_as_good, cases, needs_kernels, relative_error

pytestmark = [pytest.mark.gpu, needs_kernels]
# a GPU multiplies float32 as TF32; the op is for 16 bit
HALVES_AND_INTERPRETED = [d for d in DTYPES if d.itemsize == 2 or dispatch.INTERPRETED]


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, *shape):
        out, lse = flash_attention_forward(q, k, v, *shape)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.shape = shape
        return out

    @staticmethod
    def backward(ctx, dout):
        return (*flash_attention_backward(dout, *ctx.saved_tensors, *ctx.shape), None, None, None, None, None)


def offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)


@cases(
    {
        "dtype": HALVES_AND_INTERPRETED,
        "heads, kv_heads, width": [(4, 2, 16), (2, 2, 24), (2, 1, 256)],
        "lengths": [[150], [70, 1, 33]],
        "window": [None, 20],
    }
)
def test_attention_and_its_gradients(dtype, heads, kv_heads, width, lengths, window):
    softcap = 5.0
    q, k, v = (x[0] for x in inputs(1, sum(lengths), heads, kv_heads, width, dtype))
    shape = (offsets(lengths), max(lengths), SCALE, window, softcap)
    assert_twice_as_good(
        lambda q, k, v: Attention.apply(q, k, v, *shape),
        lambda q, k, v: truth(q[None], k[None], v[None], lengths, window, softcap)[0],
        [x.detach().requires_grad_() for x in (q, k, v)],
        [torch.randn(q.shape, device=DEVICE)],
    )


@pytest.mark.parametrize("shared", [needed for needed, _ in flash_attention.WIDE_TILES])
def test_tiles_of_every_gpu_give_the_same(monkeypatch, shared):
    if DEVICE == "cuda" and flash_attention.shared_bytes(torch.device("cuda", 0)) < shared:
        pytest.skip("this GPU has not so much shared memory")
    monkeypatch.setattr(flash_attention, "shared_bytes", lambda device: shared)
    lengths, window, dtype = [130, 9, 101], 70, HALVES_AND_INTERPRETED[0]
    q, k, v = (x[0] for x in inputs(1, sum(lengths), 2, 1, 200, dtype))
    shape = (offsets(lengths), max(lengths), SCALE, window, 5.0)
    assert_twice_as_good(
        lambda q, k, v: Attention.apply(q, k, v, *shape),
        lambda q, k, v: truth(q[None], k[None], v[None], lengths, window, 5.0)[0],
        [x.detach().requires_grad_() for x in (q, k, v)],
        [torch.randn(q.shape, device=DEVICE)],
    )


def test_backward_is_reproducible_and_documents_do_not_touch():
    lengths = [70, 5, 300]
    q, k, v = (x[0] for x in inputs(1, sum(lengths), 4, 2, 64, torch.float16))
    shape = (offsets(lengths), max(lengths), SCALE, None, 5.0)
    out, lse = flash_attention_forward(q, k, v, *shape)
    dout = torch.randn(q.shape, device=DEVICE).to(q.dtype)
    first = flash_attention_backward(dout, q, k, v, out, lse, *shape)
    for once, again in zip(first, flash_attention_backward(dout, q, k, v, out, lse, *shape)):
        assert torch.equal(once, again)
    for x in (q, k, v):
        x[70:75] = torch.randn_like(x[70:75])
    changed, _ = flash_attention_forward(q, k, v, *shape)
    assert torch.equal(out[:70], changed[:70])
    assert torch.equal(out[75:], changed[75:])
    assert relative_error(out[70:75], changed[70:75]) > 0.1
