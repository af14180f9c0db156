"""What a thread does in `nf4_row_kernel`, in PTX where Triton has no words for it.

Every tensor here has one element per thread. Which element is whose depends on Triton's layout, so a thread asks the GPU for
its place (`thread_index`) and all else follows from that. Codes are looked up as in `nf4_lookup`, in a table of 32 copies: each
lane has a bank of the shared memory to itself.
"""

from oribi.kernels.dispatch import jit, tl
from oribi.kernels.nf4_lookup import byte_pairs, constant

_MOST_WARPS = 8
_TABLE = 256 * 32 * 4
TABLE_BYTES = constant(_TABLE)


# the table, and two rooms for 16 sums of each warp, which a program uses in turn
_SHARED = constant(
    f".shared .align 16 .b8 nf4_row[{_TABLE + 2 * _MOST_WARPS * 16 * 4}];\nmov.u32 $0, nf4_row;"
)
_THREAD = constant("mov.u32 $0, %tid.x;")
# a thread writes the 128 bytes of an entry from a place of its own on, so that eight threads write to all banks
_FILL = constant(
    "\n".join(
        [
            "{ .reg .b32 entry, at, lane; mov.u32 lane, %tid.x; mad.lo.u32 entry, $1, 128, $3;",
            *(
                f"add.u32 at, lane, {i}; and.b32 at, at, 7; mad.lo.u32 at, at, 16, entry;"
                " st.shared.v4.b32 [at], {$2, $2, $2, $2};"
                for i in range(8)
            ),
            "mov.u32 $0, entry; }",
        ]
    )
)
# four times 16 bytes from $16 on, 64 bytes apart; of chunk i where 2 i < $17, else zeros
_LOAD_CODES = constant(
    "\n".join(
        [
            "{ .reg .pred p;",
            *(f"mov.b32 ${i}, 0;" for i in range(16)),
            *(
                f"setp.gt.s32 p, $17, {2 * i};"
                f" @p ld.global.nc.L1::no_allocate.v4.b32 {{${4 * i}, ${4 * i + 1}, ${4 * i + 2}, ${4 * i + 3}}}, [$16 + {64 * i}];"
                for i in range(4)
            ),
            "}",
        ]
    )
)
# 64 bytes from $16 on where $17, else zeros
_LOAD_X = constant(
    "\n".join(
        [
            "{ .reg .pred p; setp.ne.s32 p, $17, 0;",
            *(f"mov.b32 ${i}, 0;" for i in range(16)),
            *(
                f"@p ld.global.v4.b32 {{${4 * i}, ${4 * i + 1}, ${4 * i + 2}, ${4 * i + 3}}}, [$16 + {16 * i}];"
                for i in range(4)
            ),
            "}",
        ]
    )
)


def _products_text(dtype: str) -> object:
    """Sums $0 to $3 of rows g ($4 to $19) and g + 8 ($20 to $35) with x ($36 to $51); $52 this lane's table, $53 its t."""
    lines = ["{ .reg .b32 a<4>; .reg .b32 at; .reg .f32 c<16>; .reg .f32 s<4>; .reg .pred p;"]
    for chunk in range(4):
        sums = [f"c{4 * chunk + i}" for i in range(4)]
        lines += [f"mov.f32 {s}, 0f00000000;" for s in sums]
    for step in range(8):  # of 4 values of each row in a lane
        for chunk in range(4):  # whose products do not wait for one another
            word, pair = 4 * chunk + step // 2, step % 2 * 2
            for place, (of_row, byte) in enumerate(((4, pair), (20, pair), (4, pair + 1), (20, pair + 1))):
                lines.append(
                    f"prmt.b32 at, ${of_row + word}, 0, {0x4440 | byte}; mad.lo.u32 at, at, 128, $52; ld.shared.b32 a{place}, [at];"
                )
            sums = ", ".join(f"c{4 * chunk + i}" for i in range(4))
            lines.append(
                f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 {{{sums}}}, {{a0, a1, a2, a3}},"
                f" {{${36 + 2 * step}, ${37 + 2 * step}}}, {{{sums}}};"
            )
    lines += [f"mov.f32 s{i}, c{i};" for i in range(4)]
    for chunk in range(1, 4):
        lines.append(f"setp.eq.s32 p, $53, {chunk};")
        lines += [f"selp.f32 s{i}, c{4 * chunk + i}, s{i}, p;" for i in range(4)]
    lines += [f"mov.f32 ${i}, s{i};" for i in range(4)]
    return constant("\n".join([*lines, "}"]))


_PRODUCTS_BF16, _PRODUCTS_FP16 = _products_text("bf16"), _products_text("f16")
_PRODUCTS_TYPES = constant(",".join(["=f"] * 4 + ["r"] * 50))
_LOAD_TYPES = constant(",".join(["=&r"] * 16 + ["l", "r"]))
_SUM_OF_FOUR = constant(
    "{ .reg .f32 other; shfl.sync.bfly.b32 other, $1, 1, 31, -1; add.f32 $0, $1, other;"
    " shfl.sync.bfly.b32 other, $0, 2, 31, -1; add.f32 $0, $0, other; }"
)
_STORE = constant("{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.shared.f32 [$1], $2; mov.u32 $0, $1; }")
_LOAD = constant("ld.shared.f32 $0, [$1];")


@jit
def thread_index(WARPS: tl.constexpr):
    """Each thread's place in its program."""
    return tl.inline_asm_elementwise(
        _THREAD, "=r,r", [tl.arange(0, 32 * WARPS)], tl.int32, is_pure=True, pack=1
    )


@jit
def fill_banked_table(lut, thread, dtype: tl.constexpr):
    """Writes the table of pairs of NF4 values [16] float32 in dtype; its shared address, for each thread.

    From TABLE_BYTES bytes further on lie two rooms for `whole_sums`. A kernel calls this once.
    """
    # of a scalar, so that the memory is declared once
    shared = tl.inline_asm_elementwise(_SHARED, "=r,r", [tl.program_id(0)], tl.int32, is_pure=False, pack=1)
    byte, pair = byte_pairs(lut, dtype)
    tl.inline_asm_elementwise(_FILL, "=r,r,r,r", [byte, pair, shared], tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()
    return thread * 0 + shared


@jit
def load_codes(codes, left):
    """16 words of codes, four every 64 bytes from an address on; of the i-th four where 2 i < left, else zeros."""
    return tl.inline_asm_elementwise(
        _LOAD_CODES, _LOAD_TYPES, [codes, left], (tl.int32,) * 16, is_pure=False, pack=1
    )


@jit
def load_x(x, inside):
    """16 words from an address on; zeros if not `inside`."""
    return tl.inline_asm_elementwise(
        _LOAD_X, _LOAD_TYPES, [x, inside.to(tl.int32)], (tl.int32,) * 16, is_pure=False, pack=1
    )


@jit
def products(codes, codes_b, values, table, thread, dtype: tl.constexpr):
    """Sums of two rows' blocks 2t and 2t + 1 with x, no scales.

    Args:
        codes, codes_b: of `load_codes`. values: of `load_x`. table: address of this lane's copy. dtype: of x and the table.
    """
    return tl.inline_asm_elementwise(
        _PRODUCTS_BF16 if dtype == tl.bfloat16 else _PRODUCTS_FP16, _PRODUCTS_TYPES,
        codes + codes_b + values + (table, thread % 4), (tl.float32,) * 4, is_pure=False, pack=1,
    )  # fmt: skip


@jit
def whole_sums(sum_, sum_b, room, thread, WARPS: tl.constexpr):
    """The sums of rows t % 8 and 8 + t % 8 over all lanes and warps, in each thread t.

    Args:
        room: shared address, of WARPS * 64 bytes that nothing reads since the barrier before the last.
    """
    mine = room + thread // 32 * 64 + thread % 32 // 4 * 4
    first_lane = (thread % 4 == 0).to(tl.int32)
    sum_ = tl.inline_asm_elementwise(_SUM_OF_FOUR, "=&f,f", [sum_], tl.float32, is_pure=False, pack=1)
    sum_b = tl.inline_asm_elementwise(_SUM_OF_FOUR, "=&f,f", [sum_b], tl.float32, is_pure=False, pack=1)
    tl.inline_asm_elementwise(_STORE, "=r,r,f,r", [mine, sum_, first_lane], tl.int32, is_pure=False, pack=1)
    tl.inline_asm_elementwise(
        _STORE, "=r,r,f,r", [mine + 32, sum_b, first_lane], tl.int32, is_pure=False, pack=1
    )
    tl.debug_barrier()
    sum_, sum_b = tl.zeros_like(sum_), tl.zeros_like(sum_)
    for warp in tl.static_range(WARPS):
        at = room + thread % 8 * 4 + warp * 64
        sum_ += tl.inline_asm_elementwise(_LOAD, "=f,r", [at], tl.float32, is_pure=False, pack=1)
        sum_b += tl.inline_asm_elementwise(_LOAD, "=f,r", [at + 32], tl.float32, is_pure=False, pack=1)
    return sum_, sum_b
