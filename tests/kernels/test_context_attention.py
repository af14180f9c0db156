"""Chunks of a row that processes share: every backend sees what the whole row's attention sees, and gradients go where keys are from.

Several processes are started in tests/train/test_context.py.
"""

from types import SimpleNamespace

import pytest
import torch

from oribi.kernels import attention as op
from oribi.kernels import context_attention, cudnn_attention, dispatch, flash_attention_3
from oribi.kernels.attention import attention_backward, attention_forward, decide
from oribi.kernels.context_attention import SharedRow, chunk_tokens, key_portions, own_chunks, part_of_row
from tests.kernels.test_attention import SCALE, inputs, truth
from tests.kernels.truth import DEVICE, relative_error

KERNELS = DEVICE == "cuda" or dispatch.INTERPRETED
CHUNK = 128 if DEVICE == "cuda" else 24
# of a row of four chunks, in chunks; a document begins and ends with a chunk, within one, or holds several
DOCUMENTS = {
    "one": [4],
    "across": [0.5, 0.25, 2, 1.125, 0.125],
    "with chunks": [1, 2, 1],
    "many": [0.25] * 16,
}
BACKENDS = ["reference", "triton", "blocked", "cudnn", "flash", "flash3"]


def of_cpu(q, k, v, scale, causal):
    """What cuDNN computes, by PyTorch's kernel for CPUs."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out, lse, lse.new_zeros(()), lse.new_zeros(())


def of_cpu_backward(dout, q, k, v, out, saved, scale, causal):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout.contiguous(), q, k, v, out.contiguous(), saved[0], 0.0, causal, scale=scale
    )


def part(rank: int, documents: list[float]):
    bounds = [0, *torch.tensor(documents).mul(CHUNK).cumsum(0).round().int().tolist()]
    lengths = [b - a for a, b in zip(bounds, bounds[1:])]
    group = SimpleNamespace(processes=2, rank=rank)
    return part_of_row(group, bounds, CHUNK, max(lengths), torch.device(DEVICE)), lengths


@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 20])
def test_a_chunk_sees_what_its_tokens_see_in_the_whole_row(backend, documents, window, monkeypatch):
    if backend in ("flash", "flash3") and DEVICE == "cpu" or backend == "triton" and not KERNELS:
        pytest.skip(f"{backend} needs a GPU")
    if backend == "flash3" and not flash_attention_3.installed():
        pytest.skip("flash_attn_3 is not installed")
    if backend == "cudnn" and (len(documents) > 1 or window is not None):
        pytest.skip("cuDNN takes single documents without windows")
    if backend == "cudnn" and DEVICE == "cpu":
        heads = (4, 4)  # PyTorch's kernel for CPUs has as many heads of keys as of queries
        monkeypatch.setattr(cudnn_attention, "_forward", of_cpu)
        monkeypatch.setattr(cudnn_attention, "_backward", of_cpu_backward)
    else:
        heads = (4, 2)
    monkeypatch.setattr(op, "choose_backend", lambda *_: backend)
    softcap = 5.0 if backend == "triton" else None
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    q, k, v = inputs(1, 4 * CHUNK, *heads, 64 if DEVICE == "cuda" else 16, dtype)
    dout = torch.randn(q.shape, device=DEVICE).to(dtype)
    for rank in range(2):
        visibility, lengths = part(rank, documents)
        how = decide(q, visibility, SCALE, window, softcap)
        exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
        whole = truth(*exact, lengths, window, softcap)
        for chunk, one in zip(visibility.shared.chunks, how.chunks):
            place = slice(chunk.keys.stop - CHUNK, chunk.keys.stop)
            own = [q[:, place], k[:, chunk.keys], v[:, chunk.keys]]
            out, saved = attention_forward(*own, one)
            assert len(saved) == op.SAVED_TENSORS[backend]
            grads = attention_backward(dout[:, place], *own, out, saved, one)
            expected = torch.autograd.grad(whole[:, place], exact, dout[:, place].double(), retain_graph=True)
            wanted = [whole[:, place], expected[0][:, place], *(grad[:, chunk.keys] for grad in expected[1:])]
            for actual, exact_one in zip((out, *grads), wanted):
                assert relative_error(actual, exact_one) < (1e-2 if DEVICE == "cuda" else 1e-5)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_gradients_of_keys_go_to_the_process_and_chunk_that_have_them(processes):
    chunk, tokens = 4, 8 * processes
    for rank in range(processes):
        group = SimpleNamespace(processes=processes, rank=rank)
        row = part_of_row(group, [0, tokens], chunk, tokens, torch.device("cpu")).shared
        assert isinstance(row, SharedRow)
        assert row.tokens == tokens
        sums = torch.zeros(processes, 2, 2, chunk, 1, 1)
        row.add(sums, 1, torch.arange(3.0, tokens).view(1, -1, 1, 1), slice(3, tokens))
        expected = torch.arange(float(tokens)).where(torch.arange(tokens) > 2, 0).view(-1, chunk)
        for other in range(processes):
            assert torch.equal(sums[other, 1].flatten(1), expected[list(own_chunks(other, processes))])
        assert not sums[:, 0].any()


def test_chunks_cover_a_row_once_and_late_ones_go_with_early_ones():
    for processes in (1, 2, 3, 8):
        found = [own_chunks(rank, processes) for rank in range(processes)]
        assert sorted(chunk for pair in found for chunk in pair) == list(range(2 * processes))
        assert {sum(pair) for pair in found} == {2 * processes - 1}
    for tokens in (1, 1024, 1025, 131072):
        chunk = chunk_tokens(tokens, 4)
        assert chunk % context_attention.CHUNK_MULTIPLE == 0
        assert tokens <= 8 * chunk < tokens + 8 * context_attention.CHUNK_MULTIPLE


def test_heads_are_gathered_in_portions_where_a_row_is_long():
    assert key_portions(131072, 8, 128, 2) == 1
    assert key_portions(2**20, 8, 128, 2) == 4
    assert key_portions(2**24, 3, 128, 2) == 3
