"""FlashAttention 3 is called as its operators want it: stand-ins with their declarations compute attention on the CPU."""

import importlib.util
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from oribi.kernels import attention as op
from oribi.kernels import flash_attention_3
from oribi.kernels.attention import Attend, Visibility, attention_backward, attention_forward
from tests.kernels.test_attention import SCALE, inputs, pack_of, truth
from tests.kernels.truth import relative_error

FORWARD = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, Tensor? q_v=None, "
    "Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None, "
    "Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None, "
    "Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, int attention_chunk=0, float softcap=0.0, bool is_rotary_interleaved=False, "
    "Tensor? scheduler_metadata=None, int num_splits=0, bool? pack_gqa=None, int sm_margin=0) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
BACKWARD = (
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq=None, "
    "Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1, "
    "float softcap=0.0, bool deterministic=False, int sm_margin=0) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def attend(q, k, v, cu_seqlens, longest, causal, left, right):
    """What the operators compute, by the definition: a pack [T, H, E] or rows [B, S, H, E]."""
    assert causal == (left < 0)
    assert causal or right == 0
    window = None if left < 0 else left + 1
    if cu_seqlens is None:
        assert q.dim() == 4
        return truth(q, k, v, [q.shape[1]], window, None)
    assert q.dim() == 3
    lengths = cu_seqlens.diff().tolist()
    assert longest == max(lengths)
    return truth(q[None], k[None], v[None], lengths, window, None)[0]


@pytest.fixture
def package(monkeypatch):
    """The operators, registered for CPU tensors, and a package that is found."""
    library = torch.library.Library("flash_attn_3", "DEF")
    library.define(FORWARD)
    library.define(BACKWARD)

    def named(schema: str, given: tuple) -> dict[str, object]:
        """The dispatcher hands arguments over by position; a schema's defaults are left out."""
        names = re.findall(r"(\w+)(?:=[^,)]*)?(?:, |\))", schema.partition(" ->")[0])
        return {name: value for name, value in zip(names, given) if value is not None}

    def attended(inputs, given):
        places = (given.get("window_size_left", -1), given.get("window_size_right", -1))
        extent = given.get("cu_seqlens_q"), given.get("max_seqlen_q"), given.get("is_causal", False)
        assert given["softmax_scale"] == SCALE
        assert given.get("cu_seqlens_k") is extent[0]
        return attend(*inputs, *extent, *places)

    def forward(*given):
        given = named(FORWARD, given)
        out = attended([given[name] for name in "qkv"], given)
        return out, torch.zeros(out.shape[-2], len(out)), torch.zeros(0), torch.zeros(0)

    def backward(*given):
        given = named(BACKWARD, given)
        with torch.enable_grad():
            leaves = [given[name].detach().clone().requires_grad_() for name in "qkv"]
            grads = torch.autograd.grad(attended(leaves, given), leaves, given["dout"])
        return (*grads, *(torch.zeros(0) for _ in range(5)))

    library.impl("fwd", forward, "CPU")
    library.impl("bwd", backward, "CPU")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: name == "flash_attn_3" or found(name, *a)
    )
    monkeypatch.setitem(sys.modules, "flash_attn_3", ModuleType("flash_attn_3"))
    monkeypatch.setitem(sys.modules, "flash_attn_3._C", ModuleType("flash_attn_3._C"))
    flash_attention_3.installed.cache_clear()
    yield library
    library._destroy()
    flash_attention_3.installed.cache_clear()


@pytest.mark.parametrize("lengths", [[13], [5, 1, 7]])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_packs_and_windows_are_told_to_the_operators(package, lengths, window, groups, monkeypatch):
    assert flash_attention_3.installed()
    monkeypatch.setattr(op, "head_groups", lambda *_: groups)
    q, k, v = inputs(1, sum(lengths), 4, 2, 16, torch.float32)
    visibility = pack_of(lengths) if len(lengths) > 1 else Visibility(1, lengths[0])
    how = Attend("flash3", SCALE, window, None, visibility)
    out, saved = attention_forward(q, k, v, how)
    dout = torch.randn_like(out)
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = truth(*leaves, lengths, window, None)
    assert relative_error(out, expected) < 1e-5
    grads = attention_backward(dout, q, k, v, out, saved, how)
    for mine, theirs in zip(grads, torch.autograd.grad(expected, leaves, dout.double()), strict=True):
        assert relative_error(mine, theirs) < 1e-5


@pytest.mark.parametrize(
    ("length", "lengths", "window", "major", "without", "with_it"),
    [
        (2048, None, None, 9, "cudnn", "cudnn"), (8192, None, None, 9, "cudnn", "flash3"),
        (2048, [2000, 48], None, 9, "flash", "flash3"), (2048, None, 100, 9, "flash", "flash3"),
        (8192, None, None, 10, "cudnn", "cudnn"), (8192, None, None, 8, "flash", "flash"),
    ],
)  # fmt: skip
def test_it_runs_on_hopper_where_it_is_faster(length, lengths, window, major, without, with_it, monkeypatch):
    q = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(1, length, 32, 128), device="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    visibility = pack_of(lengths) if lengths else Visibility(1, length)
    for third, expected in ((False, without), (True, with_it)):
        monkeypatch.setattr(flash_attention_3, "installed", lambda third=third: third)
        assert op.choose_backend(q, visibility, window, None) == expected


def test_without_the_package_it_is_not_used():
    flash_attention_3.installed.cache_clear()
    expected = importlib.util.find_spec("flash_attn_3") is not None
    assert flash_attention_3.installed() == expected


def test_operators_of_another_version_are_left_alone(monkeypatch, package, caplog):
    monkeypatch.setattr(flash_attention_3, "_ARGUMENTS", {"cu_seqlens_q", "an_argument_of_tomorrow"})
    assert not flash_attention_3.installed()
    assert "another version" in caplog.text


def test_a_package_that_cannot_be_loaded_is_left_alone(monkeypatch, package, caplog):
    def broken(name):
        raise OSError("undefined symbol: of another PyTorch")

    monkeypatch.setattr(flash_attention_3.importlib, "import_module", broken)
    assert not flash_attention_3.installed()
    assert "undefined symbol" in caplog.text
