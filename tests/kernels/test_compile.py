"""Every kernel compiles for Turing, Ampere and Hopper, with the arguments that real shapes give it. No GPU is needed.

Launches are recorded, not run: the public functions are called on CPU tensors with `launch` replaced.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from oribi.kernels import (
    adamw_step,
    block_linear,
    block_stack,
    blocked_attention,
    causal_conv,
    cross_entropy,
    decode_attention,
    dispatch,
    embedding,
    expert_rows,
    expert_stack,
    flash_attention,
    fp8,
    gated_delta,
    gated_mlp,
    ggml_blocks,
    grouped,
    lora,
    lora_expand,
    lora_pack,
    mxfp4,
    nf4,
    nf4_linear,
    nf4_lookup,
    output_gate,
    rms_norm,
    rope,
)
from oribi.kernels.adamw import FlatAdamW
from oribi.kernels.gated_delta_chunks import chunks_of
from oribi.kernels.packed_weight import PackedWeight
from oribi.kernels.routing import sort_by_expert
from tests.kernels.truth import nf4_packed

pytestmark = [
    pytest.mark.skipif(dispatch.triton is None, reason="Triton is not installed"),
    pytest.mark.skipif(dispatch.INTERPRETED, reason="the interpreter compiles nothing"),
]

MODULES = (
    rms_norm,
    rope,
    gated_mlp,
    nf4,
    cross_entropy,
    adamw_step,
    lora_expand,
    lora_pack,
    flash_attention,
    blocked_attention,
    fp8,
    decode_attention,
    nf4_linear,
    block_linear,
    causal_conv,
    output_gate,
    gated_delta,
    expert_stack,
    expert_rows,
    grouped,
    mxfp4,
    ggml_blocks,
)
# bytes of shared memory that a program may have; of 8.x, the cards with least
SHARED = {80: 101376, 90: 232448}
TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


class Launch(NamedTuple):
    kernel: Callable
    arguments: tuple
    options: dict


@pytest.fixture
def launches(monkeypatch) -> list[Launch]:
    recorded: list[Launch] = []

    def record(kernel, programs, *arguments, **options):
        recorded.append(Launch(kernel, arguments, options))

    for module in MODULES:
        monkeypatch.setattr(module, "launch", record)
        monkeypatch.setattr(module, "use_triton", lambda x: True, raising=False)
    torch.manual_seed(0)
    return recorded


def compiled(launch: Launch, capability: int):
    """What Triton's launcher would compile for these arguments: divisibility by 16 and ones are specialised on."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for index, (parameter, value) in enumerate(zip(launch.kernel.params, launch.arguments, strict=True)):
        aligned = False
        if parameter.is_constexpr or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            aligned = value.data_ptr() % 16 == 0 and not parameter.do_not_specialize_on_alignment
        elif isinstance(value, int):
            signature[parameter.name] = "i32"
            aligned = value % 16 == 0 and not parameter.do_not_specialize
        else:
            signature[parameter.name] = "fp32"
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return dispatch.triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)


def vectors(ptx: str) -> tuple[int, int]:
    """How many loads and stores move 16 bytes a thread."""
    return len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)), len(re.findall(r"st\.global\S*\.v4\.b32", ptx))


TARGETS = [(75, torch.float16), (80, torch.bfloat16), (90, torch.bfloat16), (90, torch.float16)]


@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
def test_norm_rope_and_gated_mlp_compile_with_16_byte_loads_and_stores(launches, capability, dtype):
    x, weight = torch.randn(3, 4096).to(dtype), torch.ones(4096).to(dtype)
    rms_norm.rms_norm_forward(x, weight, 1e-5)
    rms_norm.rms_norm_forward(x, weight, 1e-5, residual=x, residual_scale=0.5, out=x)
    rstd = torch.ones(3)
    rms_norm.rms_norm_backward(x, x, rstd, weight, dresidual=x)
    rms_norm.rms_norm_backward(x, x, rstd, weight, weight_grad=True)
    rms_norm.rms_norm_forward(x, None, 1e-5)
    rms_norm.rms_norm_forward(x, weight, 1e-5, centred=True)
    rms_norm.rms_norm_backward(x, x, rstd, weight, centred=True, dresidual=x)
    qkv = torch.randn(3, 48 * 128).to(dtype)
    q, k = qkv[:, :4096].view(3, 32, 128), qkv[:, 4096 : 40 * 128].view(3, 8, 128)
    rms_norm.rms_norm_forward(q, weight[:128], 1e-6)
    angle = torch.randn(3, 64)
    rope.rope_forward(q, k, angle, angle, out=(q, k))
    rope.rope_forward(q, k, angle[:, :32], angle[:, :32], inverse=True)
    gate, up = torch.randn(3, 2 * 14336).to(dtype).chunk(2, 1)
    for activation in gated_mlp.ACTIVATIONS:
        h = gated_mlp.gated_mlp_forward(gate, up, activation)
        gated_mlp.gated_mlp_backward(h, gate, up, activation, dgate=gate, dup=up, h=h)
    assert len(launches) == 10 + 2 * len(gated_mlp.ACTIVATIONS)
    for launch in launches:
        kernel = compiled(launch, capability)
        assert kernel.asm["cubin"]
        loads, stores = vectors(kernel.asm["ptx"])
        assert loads > 0, launch
        assert stores > 0, launch


@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
def test_rope_of_neighbours_compiles(launches, capability, dtype):
    q, k = torch.randn(3, 40 * 128).to(dtype).view(3, 40, 128).split([32, 8], 1)
    angle = torch.randn(3, 64)
    rope.rope_forward(q, k, angle, angle, angle[:, 0].contiguous(), interleaved=True, out=(q, k))
    (launch,) = launches
    assert compiled(launch, capability).asm["cubin"]


@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
def test_causal_convolution_compiles_with_16_byte_loads_and_stores(launches, capability, dtype):
    start = torch.zeros(3, dtype=torch.int32)
    before, after, x = torch.randn(3, 3 * 2048).to(dtype).chunk(3, 1)
    short = {"before": before, "after": after}
    weight = torch.randn(2048, 3).to(dtype)
    y = causal_conv.causal_conv_forward(x, weight, start, **short)
    causal_conv.causal_conv_backward(y, x, weight, start, **short, dx=x, dbefore=before, dafter=after)
    wide, weight, bias = (
        torch.randn(3, 8192 + 64).to(dtype)[:, :8192],
        *torch.randn(5, 8192).to(dtype).split([4, 1]),
    )
    weight = weight.t().contiguous()
    y = causal_conv.causal_conv_forward(wide, weight, start, bias[0], silu=True)
    causal_conv.causal_conv_backward(y, wide, weight, start, bias[0], silu=True, dx=wide, weight_grad=True)
    assert len(launches) == 7
    for launch in launches:
        kernel = compiled(launch, capability)
        loads, stores = vectors(kernel.asm["ptx"])
        assert loads > 0, launch
        assert stores > 0 or launch.kernel.__name__ == "weight_kernel", launch
        assert kernel.metadata.shared <= 16384


@pytest.mark.long
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("width", [128, 256])
def test_the_gated_delta_rule_compiles_within_shared_memory(launches, capability, width, monkeypatch):
    monkeypatch.setattr(gated_delta, "use_kernels", lambda q: True)
    q, v = torch.randn(200, 2, width).bfloat16(), torch.randn(200, 4 * 128 + 64).bfloat16()
    v, b, chunks = v[:, 64:].unflatten(1, (4, 128)), v[:, :4].sigmoid(), chunks_of([0, 200], q.device)
    initial = torch.zeros(1, 4, width, 128)
    gated_delta.gated_delta_forward(q, q, v, -b.float(), b, chunks, 0.1, initial, final=True)
    forward = len(launches)
    gated_delta.gated_delta_backward(v, (q, q, v, -b.float(), b), chunks, 0.1)
    assert [launch.kernel.__name__ for launch in launches[:forward]] == [
        f"{name}_kernel" for name in ("solve", "vectors", "scan", "read")
    ]
    assert [launch.kernel.__name__ for launch in launches[forward + 3 :]] == [
        f"{name}_kernel" for name in ("local", "scan_back", "matrices", "gradient")
    ]
    for launch in launches[:forward] + launches[forward + 3 :]:
        assert compiled(launch, capability).metadata.shared <= SHARED[capability], launch.kernel.__name__


@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
def test_causal_convolution_of_a_new_token_compiles(launches, capability, dtype):
    x, window = torch.randn(2, 300).to(dtype), torch.zeros(2, 300, 3).to(dtype)
    causal_conv.causal_conv_step(x, window, torch.randn(300, 4).to(dtype), silu=True)
    causal_conv.causal_conv_step(
        x, window[..., :2].contiguous(), torch.randn(300, 3).to(dtype), before=x, after=x
    )
    assert len(launches) == 2
    for launch in launches:
        assert compiled(launch, capability).asm["cubin"]


@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_compiles_with_16_byte_stores_and_without_shared_memory(
    launches, capability, dtype, double_quant
):
    weights = [nf4_packed(torch.randn(n, 512), double_quant=double_quant) for n in (128, 32, 32)]
    nf4.dequantize(weights[:1], dtype)
    nf4.dequantize(weights, dtype, out=torch.empty(192, 576, dtype=dtype)[:, :512])
    assert len(launches) == 2
    for launch in launches:
        kernel = compiled(launch, capability)
        assert vectors(kernel.asm["ptx"])[1] == 4
        assert kernel.metadata.shared == 0
        # bitsandbytes rounds each product and sum
        assert "fma" not in kernel.asm["ptx"]


@pytest.mark.parametrize(
    "capability", [89, 90]
)  # older matrix units do not take e4m3, and have no cast to it
@pytest.mark.parametrize("double_quant", [True, False])
def test_fp8_compiles_with_vectors_in_both_orientations(launches, capability, double_quant):
    weights = [nf4_packed(torch.randn(n, 512), double_quant=double_quant) for n in (128, 32, 32)]
    for transposed in (False, True):
        fp8.dequantize_e4m3(weights, torch.ones(1), transposed)
    for k in (4096, 28672):
        fp8.quantize_rows(torch.randn(3, k + 64).bfloat16()[:, :k])
    assert len(launches) == 4
    for launch in launches:
        kernel = compiled(launch, capability)
        assert vectors(kernel.asm["ptx"])[1] == 4
        assert "cvt.rn.satfinite.e4m3x2" in kernel.asm["ptx"]
        if launch.kernel.__name__ == "_weights_kernel":
            assert "fma" not in kernel.asm["ptx"]  # as in nf4: each product and sum is rounded


@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
@pytest.mark.parametrize("vocab_size", [128256, 151])
def test_cross_entropy_compiles(launches, capability, dtype, vocab_size):
    rows, weight = torch.randn(3, 16).to(dtype), torch.randn(vocab_size, 16).to(dtype)
    targets = torch.zeros(3, dtype=torch.int64)
    cross_entropy.linear_cross_entropy_forward(rows, weight, targets)
    cross_entropy.linear_cross_entropy_forward(rows, weight, targets, softcap=30.0, rows_grad=False)
    cross_entropy.scale_gradient(rows, torch.ones(()), dtype)
    assert len(launches) == 3
    for launch in launches:
        assert vectors(compiled(launch, capability).asm["ptx"])[0] > 0


@pytest.mark.parametrize(("capability", "dtype"), [*TARGETS, (90, torch.float32)])
@pytest.mark.parametrize("bits", [8, 32])
def test_adamw_compiles(launches, capability, dtype, bits):
    weights = [torch.nn.Parameter(torch.randn(n).to(dtype)) for n in (8192, 100)]
    FlatAdamW(weights, bits=bits, max_grad_norm=1.0).step()
    assert [launch.kernel.__name__ for launch in launches] == [
        "_norm_kernel",
        "_decide_kernel",
        "_update_kernel",
    ]
    for launch in launches:
        assert compiled(launch, capability).asm["cubin"]


@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
@pytest.mark.parametrize("ranks", [(16, 16, 16), (16,), (64, 0, 128), (3,)])
def test_lora_packing_and_expansion_compile(launches, capability, dtype, ranks):
    projections = [
        lora.Projection(
            torch.randn(64, 256).to(dtype),
            torch.randn(64).to(dtype),
            torch.randn(rank, 256) if rank else None,
            torch.randn(64, rank) if rank else None,
            0.5,
        )
        for rank in ranks
    ]
    group = lora.augmented_weight(projections, dtype, torch.device("cpu"))
    xa, residual = torch.randn(5, group.lora_columns).to(dtype), torch.randn(5, group.out_features).to(dtype)
    lora_expand.expand(xa, group.scaled_b, None)
    lora_expand.expand(xa, group.scaled_b, residual)
    room = torch.empty(5, group.out_features + group.lora_columns, dtype=dtype)[:, : group.out_features]
    lora_expand.expand(xa, group.scaled_b, residual, residual, out=room)
    lora_expand.expand(xa, group.a.t(), torch.empty(5, 256, dtype=dtype))
    assert [launch.kernel.__name__ for launch in launches] == [
        "_pack_kernel",
        *["_expand_kernel"] * 4,
    ]
    for launch in launches:
        assert compiled(launch, capability).asm["cubin"]


@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
def test_embedding_rows_compile(capability, dtype):
    weight, ids = torch.randn(9, 4096).to(dtype), torch.zeros(5, dtype=torch.int64)
    out = torch.empty(5, 4096, dtype=dtype)
    gather = Launch(embedding._gather_kernel, (out, weight, ids, 4096, 4096), {"num_warps": 4})
    loads, stores = vectors(compiled(gather, capability).asm["ptx"])
    assert loads > 0
    assert stores > 0


@pytest.mark.parametrize(
    ("capability", "shared", "dtype"),
    [
        (80, SHARED[80], torch.bfloat16),
        (90, SHARED[90], torch.bfloat16),
        *(
            pytest.param(*one, marks=pytest.mark.long)
            for one in (
                (80, 166912, torch.bfloat16),
                (86, SHARED[80], torch.bfloat16),
                (89, SHARED[80], torch.float16),
                (90, SHARED[90], torch.float16),
                (100, SHARED[90], torch.bfloat16),
                (120, SHARED[80], torch.bfloat16),
            )
        ),
    ],
)
@pytest.mark.parametrize("width", [64, 128, 256])
def test_attention_compiles_within_shared_memory_and_on_tensor_cores(
    launches, monkeypatch, capability, shared, dtype, width
):
    monkeypatch.setattr(flash_attention, "shared_bytes", lambda device: shared)
    q, k = torch.randn(200, 4, width).to(dtype), torch.randn(200, 2, width).to(dtype)
    offsets = torch.tensor([0, 150, 200], dtype=torch.int32)
    out, lse = flash_attention.flash_attention_forward(q, k, k, offsets, 150, 0.1, 64, 50.0)
    flash_attention.flash_attention_backward(out, q, k, k, out, lse, offsets, 150, 0.1, None, 50.0)
    assert len(launches) == 3
    for launch in launches:
        kernel = compiled(launch, capability)
        assert kernel.metadata.shared <= shared
        products = {90: "wgmma.mma_async", 100: "tcgen05.mma"}.get(capability, "mma.sync")
        assert products in kernel.asm["ptx"]


@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
@pytest.mark.parametrize(("first_keys", "window"), [(None, None), (torch.zeros(200, dtype=torch.int32), 64)])
def test_the_softmax_of_blocked_attention_compiles(launches, capability, dtype, first_keys, window):
    q, k = torch.randn(1, 200, 4, 512).to(dtype), torch.randn(1, 200, 1, 512).to(dtype)
    shape = (first_keys, 150, 1.0, window)
    out, lse = blocked_attention.blocked_attention_forward(q, k, k, *shape)
    blocked_attention.blocked_attention_backward(out, q, k, k, out, lse, *shape)
    assert len(launches) == 2
    for launch in launches:
        assert compiled(launch, capability).metadata.shared <= SHARED.get(capability, 65536)


@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_decoding_attention_compiles_within_shared_memory(launches, capability, dtype, head_dim):
    rows, length = torch.arange(2), torch.tensor([3, 70])
    qkv = torch.randn(2, 12 * head_dim).to(dtype)
    k, v = (torch.randn(2, 2, 128, head_dim).to(dtype) for _ in range(2))
    angle, norm = torch.randn(2, head_dim // 2), torch.ones(head_dim).to(dtype)
    q = decode_attention.store_token(qkv, k, v, length, rows, angle, angle, q_norm=norm, k_norm=norm)
    decode_attention.store_token(qkv, k, v, length, rows)
    decode_attention.store_token(qkv, k, v, length, rows, gated=True)
    output_gate.output_gate_forward(k[:, 0], v[:, 0])
    output_gate.output_gate_backward(k[:, 0], k[:, 1], v[:, 0])
    counters = nf4_linear.new_counters(qkv.device)
    decode_attention.decode_attention(q, k, v, length, rows, counters, scale=0.1)
    decode_attention.decode_attention(
        q, k, v, length, rows, counters, scale=0.1, softcap=50.0, sinks=norm[:8]
    )
    assert len(launches) == 7
    for launch in launches:
        assert compiled(launch, capability).metadata.shared <= SHARED.get(capability, 65536)


@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
@pytest.mark.parametrize(("rows", "rank"), [(1, 16), (16, 256), (64, 128)])
def test_nf4_linear_layers_compile_and_their_table_fits(launches, monkeypatch, capability, dtype, rows, rank):
    monkeypatch.setattr(nf4_linear, "multiprocessors", lambda _: 0)  # one row has no kernel of its own
    group = [
        lora.Projection(
            nf4_packed(torch.randn(n, 512)), None, torch.randn(rank, 512), torch.randn(n, rank), 0.5
        )
        for n in (128, 32, 32)
    ]
    x, counters = torch.randn(rows, 512).to(dtype), nf4_linear.new_counters(torch.device("cpu"))
    nf4_linear.nf4_linear(x, group, counters)
    nf4_linear.nf4_linear(x, group[1:], counters, activation="silu")
    nf4_linear.nf4_linear(x, group[:1], counters, residual=torch.randn(rows, 128).to(dtype))
    down = "row_down_kernel" if rows == 1 else "down_kernel"
    assert [launch.kernel.__name__ for launch in launches] == [down, "up_kernel"] * 3
    for launch in launches:
        kernel = compiled(launch, capability)
        # what Triton does not know of: the table, and the 1024 bytes of a program that Hopper's driver takes
        assert kernel.metadata.shared + 1024 * (nf4_lookup.COPIES + 1) <= 49152
        if launch.kernel.__name__ == "up_kernel":
            # one look-up for two values: 64 per thread and block for each layer of the pair
            assert "ld.shared.b32" in kernel.asm["ptx"]


@pytest.mark.parametrize(("capability", "dtype"), TARGETS[1:])
@pytest.mark.parametrize("k", [576, 4096])
def test_the_layers_of_one_row_compile_with_one_element_a_thread(launches, monkeypatch, capability, dtype, k):
    monkeypatch.setattr(nf4_linear, "multiprocessors", lambda _: 132)
    group = [
        lora.Projection(nf4_packed(torch.randn(n, k)), None, torch.randn(16, k), torch.randn(n, 16), 0.5)
        for n in (128, 32, 32)
    ]
    x, counters = torch.randn(1, k).to(dtype), nf4_linear.new_counters(torch.device("cpu"))
    nf4_linear.nf4_linear(x, group, counters)
    nf4_linear.nf4_linear(x, group[1:], counters, activation="silu")
    nf4_linear.nf4_linear(x, group[:1], counters, residual=torch.randn(1, 128).to(dtype))
    assert [launch.kernel.__name__ for launch in launches] == ["row_down_kernel", "row_kernel"] * 3
    for launch in launches[1::2]:
        kernel = compiled(launch, capability)
        # a value that went to another thread would be another row's or column's
        assert "convert_layout" not in kernel.asm["ttgir"]
        assert kernel.metadata.shared == 0  # all is the kernel's own: the table and the sums
        assert "ld.global.nc.L1::no_allocate.v4.b32" in kernel.asm["ptx"]


@pytest.mark.long
@pytest.mark.parametrize("kind", ggml_blocks.BLOCK_TYPES)
@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
def test_ggml_blocks_compile_with_16_byte_stores(launches, capability, dtype, kind):
    rows, columns = 4, 4096
    codes = ggml_blocks.BlockCodes.empty((rows, columns), kind).codes
    out = torch.empty(rows + 16, columns + 64, dtype=dtype)[:rows, :columns]
    ggml_blocks.BlockCodes((rows, columns), kind, torch.zeros_like(codes, device="cpu")).write(out)
    stack = block_stack.BlockStack.empty((2, rows, columns), (kind,), "cpu")
    weight = torch.empty(2, rows + 16, columns + 16, dtype=dtype)
    expert_stack.dequantize_stack(stack, dtype, weight[:, :rows, :columns])
    expert_stack.dequantize_stack(stack, dtype, experts=torch.tensor([1, 1, 0]))
    assert len(launches) == 3
    for launch in launches:
        kernel = compiled(launch, capability)
        assert kernel.asm["cubin"]
        assert vectors(kernel.asm["ptx"])[1] > 0


@pytest.mark.long
@pytest.mark.parametrize("kind", ggml_blocks.BLOCK_TYPES)
@pytest.mark.parametrize(("capability", "dtype"), TARGETS[1:])
@pytest.mark.parametrize("paired", [False, True])
def test_linear_layers_on_ggml_blocks_compile_and_load_whole_words(launches, capability, dtype, kind, paired):
    codes = ggml_blocks.BlockCodes.empty((14336, 4096), kind)
    codes.codes = torch.zeros_like(codes.codes, device="cpu")
    weight = PackedWeight(codes, dtype)
    layer = lora.Projection(weight, None, torch.randn(16, 4096), torch.randn(14336, 16), 0.5)
    x, counters = torch.randn(16, 4096).to(dtype), nf4_linear.new_counters(torch.device("cpu"))
    activation = "silu" if paired else None
    block_linear.block_linear(x, [layer] * (2 if paired else 1), counters, activation=activation)
    assert [launch.kernel.__name__ for launch in launches] == ["down_kernel", "up_kernel"]
    kernel = compiled(launches[1], capability)
    assert kernel.metadata.shared <= SHARED[capability]
    # a type whose blocks begin at addresses of 16 bytes loads as many at a time, by way of shared memory or not
    if kind in ("Q4_K", "Q5_K"):
        assert re.search(
            r"ld\.global\S*\.v4\.b32|cp\.async\.c\S+ \[[^]]+\], \[[^]]+\], 0x10", kernel.asm["ptx"]
        )


@pytest.mark.long
@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
def test_products_of_experts_compile_at_the_sizes_of_qwen3_30b(launches, capability, dtype):
    rows, experts, size, hidden = 32768, 4, 768, 2048
    offs = torch.tensor([8192 * (i + 1) for i in range(experts)], dtype=torch.int32)
    x = torch.empty(rows, hidden + 16, dtype=dtype)
    weight = torch.empty(experts, 2 * size + 16, hidden + 16, dtype=dtype)
    y = torch.empty(rows, 2 * size + 16, dtype=dtype)
    grouped.grouped_matmul(x, weight[:, : 2 * size].transpose(1, 2), offs, out=y[:, : 2 * size])
    grouped.grouped_matmul(y, weight[:, :, :hidden], offs)
    grouped.grouped_outer(y[:, 2 * size : 2 * size + 8], x[:, :hidden], offs)
    stack = expert_stack.PackedStack.empty((experts, 2 * size, hidden), 2, True, torch.device("cpu"))
    expert_stack.dequantize_stack(stack, dtype, weight[:, : 2 * size, :hidden])
    expert_stack.dequantize_stack(stack, dtype, experts=torch.tensor([3, 1]))
    codes = torch.empty(experts, 2 * size, hidden // 2, dtype=torch.uint8)
    in_mxfp4 = mxfp4.MXFP4Stack(
        (experts, 2 * size, hidden), 2, codes, codes[..., : hidden // 32].contiguous()
    )
    expert_stack.dequantize_stack(in_mxfp4, dtype, weight[:, : 2 * size, :hidden])
    expert_stack.dequantize_stack(in_mxfp4, dtype, experts=torch.tensor([3, 1]))
    routing = sort_by_expert(torch.zeros(rows // 4, 4, dtype=torch.int64), experts)
    expert_rows.take_rows(y[: rows // 4, :hidden], routing.tokens, x[:, : 2 * size])
    with torch.no_grad():
        expert_rows.combine(x[:, :hidden], routing, torch.empty(rows // 4, 4, dtype=dtype))
    expert_rows.products_and_weighted(x[:, :size], y[:, :size], torch.empty(rows, dtype=dtype))
    assert len(launches) == 10
    for launch in launches:
        kernel = compiled(launch, capability)
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= SHARED.get(capability, 65536)
