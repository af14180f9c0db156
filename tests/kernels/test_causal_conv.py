"""The causal convolution against PyTorch's own, document by document: references here, kernels on a GPU or interpreted."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from oribi.kernels import dispatch
from oribi.kernels.attention import Visibility
from oribi.kernels.causal_conv import (
    causal_conv,
    causal_conv_backward,
    causal_conv_forward,
    causal_conv_step,
    window_after,
)
from tests.kernels.truth import DEVICE, DTYPES, assert_twice_as_good, needs_kernels, poisoned

DOCUMENTS = [1, 2, 40, 3, 31]  # shorter than the kernel, and over the borders of tiles
TOKENS = sum(DOCUMENTS)
# width, silu, bias, gates before and after
FORMS = [(3, False, False, True), (4, True, False, False), (4, True, True, False), (3, False, True, False)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def doc_start(device: str = "cpu", documents: list[int] = DOCUMENTS) -> torch.Tensor:
    offsets = torch.tensor([0, *documents], device=device).cumsum(0).int()
    return Visibility(1, sum(documents), cu_seqlens=offsets, max_length=max(documents)).doc_start(
        offsets.device
    )


def plain(x, weight, bias, before, after, *, silu: bool, documents: list[int] = DOCUMENTS) -> torch.Tensor:
    """PyTorch's convolution of every document alone."""
    u = x if before is None else x * before
    width = weight.shape[1]
    parts = [
        F.conv1d(F.pad(one.t()[None], (width - 1, 0)), weight[:, None], bias, groups=len(weight))[0].t()
        for one in u.split(documents)
    ]
    y = torch.cat(parts)
    y = F.silu(y) if silu else y
    return y if after is None else y * after


def inputs(form: tuple, channels: int, dtype: torch.dtype, device: str = "cpu", tokens: int = TOKENS):
    """x, weight, bias, before, after; x and the gates are thirds of one wide buffer, as a projection writes them."""
    width, _, bias, gates = form

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    wide = poisoned(tokens, 3 * channels, dtype=dtype, width=3 * channels + 16).to(device)
    before, after, x = wide.copy_(normal(tokens, 3 * channels)).chunk(3, 1)
    found = [
        x,
        normal(channels, width),
        normal(channels) if bias else None,
        *((before, after) if gates else (None, None)),
    ]
    return [None if t is None else t.requires_grad_() for t in found]


def run(start: torch.Tensor, silu: bool):
    return lambda x, weight, bias, before, after: causal_conv(
        x, weight, start, bias, silu=silu, before=before, after=after
    )


def compare(form: tuple, channels: int, dtype: torch.dtype, device: str) -> None:
    given = inputs(form, channels, dtype, device)
    there = [i for i, t in enumerate(given) if t is not None]
    ours, silu = run(doc_start(device), form[1]), form[1]

    def full(found):
        found = iter(found)
        return [next(found) if i in there else None for i in range(5)]

    assert_twice_as_good(
        lambda *found: ours(*full(found)),
        lambda *found: plain(*full(found), silu=silu),
        [given[i] for i in there],
        [torch.randn(TOKENS, channels, device=device)],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_documents_are_convolved_as_if_alone(form, dtype):
    with dispatch.reference_only():
        compare(form, 33, dtype, "cpu")


@pytest.mark.parametrize("form", FORMS)
def test_every_gradient_in_float64(form):
    given = inputs(form, 3, torch.float64, tokens=9)
    start = doc_start(documents=[1, 2, 6])
    assert gradcheck(run(start, form[1]), given)
    expected = plain(*given, silu=form[1], documents=[1, 2, 6])
    assert (run(start, form[1])(*given) - expected).abs().max() < 1e-14


def backward_in_place(form: tuple, channels: int, dtype: torch.dtype, device: str) -> None:
    given = inputs(form, channels, dtype, device)
    x, weight, bias, before, after = (None if t is None else t.detach() for t in given)
    start, dy = doc_start(device), torch.randn(TOKENS, channels, device=device).to(dtype)
    settings = {"silu": form[1], "before": before, "after": after, "weight_grad": True}
    fresh = causal_conv_backward(dy.clone(), x, weight, start, bias, **settings)
    again = causal_conv_backward(dy, x, weight, start, bias, dx=x, dbefore=before, dafter=after, **settings)
    assert again.dx.data_ptr() == x.data_ptr()
    for one, other in zip(fresh, again):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_may_overwrite_what_they_are_made_of(form):
    with dispatch.reference_only():
        backward_in_place(form, 20, torch.float32, "cpu")


def decode(form: tuple, channels: int, dtype: torch.dtype, device: str) -> None:
    """The last tokens of three documents one at a time equal the whole documents to the last bits."""
    documents, steps = [5, 8, 7], 4
    given = inputs(form, channels, dtype, device, tokens=20)
    x, weight, bias, before, after = (None if t is None else t.detach() for t in given)
    start = doc_start(device, documents)
    whole = causal_conv_forward(x, weight, start, bias, silu=form[1], before=before, after=after)
    ends = torch.tensor([5, 13, 20], device=device)
    window = window_after(x, ends - steps - 1, start, form[0], before)
    assert (window[0, :, 0] == 0).all() or form[
        0
    ] == 3  # one token was before it: the rest of its window is empty
    for step in range(steps):
        at = ends - steps + step
        gates = [None if t is None else t[at] for t in (before, after)]
        y = causal_conv_step(x[at], window, weight, bias, silu=form[1], before=gates[0], after=gates[1])
        torch.testing.assert_close(
            y, whole[at], rtol=1.6e-2 if dtype is not torch.float32 else 1e-5, atol=1e-5
        )
    assert torch.equal(window, window_after(x, ends - 1, start, form[0], before))


@pytest.mark.parametrize("form", FORMS)
def test_decoding_goes_on_from_the_window_of_a_prompt(form):
    with dispatch.reference_only():
        decode(form, 7, torch.float32, "cpu")


@pytest.mark.parametrize("channels", [1, 136])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.gpu
@needs_kernels
def test_the_kernel_and_its_gradients(form, dtype, channels):
    compare(form, channels, dtype, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.gpu
@needs_kernels
def test_the_kernel_writes_gradients_over_what_they_are_made_of(form, dtype):
    backward_in_place(form, 40, dtype, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.gpu
@needs_kernels
def test_the_kernel_of_decoding_goes_on_from_the_window_of_a_prompt(form, dtype):
    decode(form, 257, dtype, DEVICE)


def test_documents_start_where_packs_rows_and_nothing_else_say():
    assert doc_start(documents=[2, 1, 3]).tolist() == [0, 0, 2, 3, 3, 3]
    rows = Visibility(2, 3)
    assert rows.doc_start(torch.device("cpu")).tolist() == [0, 0, 0, 3, 3, 3]
    assert rows.doc_start(torch.device("cpu")) is rows.doc_start(torch.device("cpu"))  # once for all layers
    assert rows.doc_start(torch.device("cpu")).dtype is torch.int32
