"""NF4 codes to 16-bit values through a table in shared memory, in the order in which matrix units take them.

A byte holds two codes, so one look-up in a table of 256 pairs yields two values, packed as `mma` wants them. Each of
`COPIES` threads has a copy of the table, which keeps most of a warp's look-ups apart in the memory's banks. Per value that
is half a look-up and one integer instruction; Triton's own ways (`tl.gather`, `tl.load`) take one look-up per value and
three or more integer instructions, which are what limits a Hopper GPU here: they run at half rate.

A block is 64 values of a row, 8 words of 8 codes. Four threads share a row of a matrix unit's operand; thread t loads words
2t and 2t + 1, and `operand_order` is an order of a block's columns in which no value then changes its thread. `tile_rows`
does the same for rows. Both are only about speed: x's columns are taken in the same order, and the sum over a block has none.
"""

from oribi.kernels.dispatch import jit, tl

# H200, gate|up of 8B, one row: with 32, 3 to 9 % faster alone, and half as many programs fit
COPIES = 16


def constant(value: object) -> object:
    """A value of the module that kernels read."""
    return tl.constexpr(value)


_COPIES = constant(COPIES)
_TABLE = constant(f".shared .align 16 .b8 nf4_pairs[{1024 * COPIES}];\nmov.u32 $0, nf4_pairs;")
_COPY = constant(
    f"{{ .reg .b32 t; mov.u32 t, %tid.x; and.b32 t, t, {COPIES - 1}; shl.b32 t, t, 2; add.u32 $0, $1, t; }}"
)
_FILL = constant(
    "\n".join(
        [
            f"{{ .reg .b32 b; mad.lo.u32 b, $1, {4 * COPIES}, $3;",
            *(f"st.shared.v4.b32 [b+{16 * i}], {{$2, $2, $2, $2}};" for i in range(COPIES // 4)),
            "mov.u32 $0, b; }",
        ]
    )
)
_LOOK_UP = constant(
    "\n".join(
        [
            "{ .reg .b32 a;",
            *(
                f"prmt.b32 a, $8, 0, {0x4440 | b}; mad.lo.u32 a, a, {4 * COPIES}, $9; ld.shared.b32 a, [a];"
                f" mov.b32 {{${2 * b}, ${2 * b + 1}}}, a;"
                for b in range(4)
            ),
            "}",
        ]
    )
)


@jit
def byte_pairs(lut, dtype: tl.constexpr):
    """All bytes [256], and the two values in dtype of each, from NF4's [16] float32."""
    byte = tl.arange(0, 256)
    # the earlier value of a byte is its high half; it comes first in memory
    first = tl.load(lut + (byte >> 4)).to(dtype).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    second = tl.load(lut + (byte & 15)).to(dtype).to(tl.int16, bitcast=True).to(tl.int32) << 16
    return byte, first | second


@jit
def fill_table(lut, dtype: tl.constexpr, any_number):
    """Writes the pairs of NF4 values [16] float32 in dtype; the shared address of this thread's copy.

    A kernel calls it once, and then a barrier.
    """
    # of a scalar, so that the table is declared once
    table = tl.inline_asm_elementwise(_TABLE, "=r,r", [any_number], tl.int32, is_pure=False, pack=1)
    byte, pair = byte_pairs(lut, dtype)
    tl.inline_asm_elementwise(_FILL, "=r,r,r,r", [byte, pair, table], tl.int32, is_pure=False, pack=1)
    return tl.inline_asm_elementwise(_COPY, "=r,r", [table], tl.int32, is_pure=True, pack=1)


@jit
def values(codes, table, dtype: tl.constexpr):
    """16-bit values [ROWS, 64] of codes in the shape of `tile_rows` and 8 words, columns in `operand_order`, no scales."""
    if dtype == tl.bfloat16:
        v0, v1, v2, v3, v4, v5, v6, v7 = tl.inline_asm_elementwise(
            _LOOK_UP, "=h,=h,=h,=h,=h,=h,=h,=h,r,r", [codes, table], (tl.bfloat16,) * 8, is_pure=False, pack=1
        )
    else:
        v0, v1, v2, v3, v4, v5, v6, v7 = tl.inline_asm_elementwise(
            _LOOK_UP, "=h,=h,=h,=h,=h,=h,=h,=h,r,r", [codes, table], (tl.float16,) * 8, is_pure=False, pack=1
        )
    return _tile(v0, v1, v2, v3, v4, v5, v6, v7)


@jit
def values_by_load(codes, lut, dtype: tl.constexpr):
    """The same in any dtype, and in Triton's interpreter."""
    return _tile(
        tl.load(lut + ((codes >> 4) & 15)).to(dtype), tl.load(lut + (codes & 15)).to(dtype),
        tl.load(lut + ((codes >> 12) & 15)).to(dtype), tl.load(lut + ((codes >> 8) & 15)).to(dtype),
        tl.load(lut + ((codes >> 20) & 15)).to(dtype), tl.load(lut + ((codes >> 16) & 15)).to(dtype),
        tl.load(lut + ((codes >> 28) & 15)).to(dtype), tl.load(lut + ((codes >> 24) & 15)).to(dtype),
    )  # fmt: skip


@jit
def tile_rows(ROWS: tl.constexpr, WARPS: tl.constexpr):
    """Row numbers [8, WARPS, 2, ROWS / 16 WARPS]: the place in a warp, the warp, and what a thread holds several of."""
    rows = tl.reshape(tl.arange(0, ROWS), [ROWS // (16 * WARPS), WARPS, 2, 8])
    return tl.permute(rows, (3, 1, 2, 0))


@jit
def _tile(v0, v1, v2, v3, v4, v5, v6, v7):
    """[ROWS, 64] of each word's values 4c + 2b + a."""
    first = tl.join(tl.join(v0, v4), tl.join(v2, v6))
    second = tl.join(tl.join(v1, v5), tl.join(v3, v7))
    x = tl.join(first, second)
    x = tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2], x.shape[3], 4, 2, 2, 2, 2])
    x = tl.permute(x, (3, 1, 2, 0, 5, 6, 7, 4, 8))
    return tl.reshape(x, [x.shape[0] * x.shape[1] * x.shape[2] * x.shape[3], 64])


@jit
def operand_order(x):
    """Columns of a block [N, 64] of values 8 (2t + i) + 4c + 2b + a, moved to place 32i + 16c + 8b + 2t + a."""
    x = tl.reshape(x, [x.shape[0], 4, 2, 2, 2, 2])
    return tl.reshape(tl.permute(x, (0, 2, 3, 4, 1, 5)), [x.shape[0], 64])
