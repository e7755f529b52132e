"""How the copy engine of Hopper and later sees x: a CUtensorMap, which the driver encodes."""

from __future__ import annotations

import ctypes
from functools import lru_cache

from .. import driver

COLUMNS = 64  # of one block: 128 bytes, whose pieces of 16 are swizzled in shared memory
BYTES, ALIGNMENT = 128, 64
NO_MAP = bytes(BYTES)  # for a GPU without the engine
# Enumerators of cuda.h.
_FLOAT16, _BFLOAT16 = 6, 9
_NOT_INTERLEAVED, _SWIZZLE_128B, _PROMOTE_L2_256B, _ZEROS_OUTSIDE = 0, 3, 3, 0


@lru_cache(maxsize=4096)
def tensor_map(device: int, address: int, tokens: int, cols: int, most_tokens: int, deep: int, bf16: bool) -> bytes:
    """The map of x [tokens, cols] at `address` of a GPU, rows end to end, for boxes of `most_tokens` by `deep` columns.

    It has three dimensions: the columns of a block, tokens, blocks. `address` is a multiple of 16, `cols` and `deep`
    are multiples of COLUMNS. Raises ValueError where `cols` is not, driver.LaunchError where the driver refuses.
    """
    if cols % COLUMNS:
        raise ValueError(f"x has {cols} columns, not in blocks of {COLUMNS}; fix: pad x")
    buffer = ctypes.create_string_buffer(BYTES + ALIGNMENT)
    skipped = -ctypes.addressof(buffer) % ALIGNMENT
    dims = (ctypes.c_uint64 * 3)(COLUMNS, tokens, cols // COLUMNS)
    strides = (ctypes.c_uint64 * 2)(2 * cols, 2 * COLUMNS)
    box, steps = (ctypes.c_uint32 * 3)(COLUMNS, most_tokens, deep // COLUMNS), (ctypes.c_uint32 * 3)(1, 1, 1)
    modes = _NOT_INTERLEAVED, _SWIZZLE_128B, _PROMOTE_L2_256B, _ZEROS_OUTSIDE
    place, kind = ctypes.c_void_p(ctypes.addressof(buffer) + skipped), _BFLOAT16 if bf16 else _FLOAT16
    given = place, kind, 3, ctypes.c_void_p(address), dims, strides, box, steps, *modes
    encode = driver.library().cuTensorMapEncodeTiled
    error = encode(*given)
    if error == driver.NO_CONTEXT:
        driver.enter(device)
        error = encode(*given)
    if error:
        raise driver.LaunchError(f"a tensor map of x [{tokens}, {cols}] at {address:#x}: {driver.explain(error)}")
    return buffer.raw[skipped : skipped + BYTES]
