"""What racecheck sees of a ring in shared memory, on the smallest one: one warp copies by cp.async, one reads.

    compute-sanitizer --tool racecheck --kernel-name kns=ring python tests/sanitize_textbook.py lanes

`lanes`: every reading lane gives a slot back for itself. `elected`: one lane does, after a __syncwarp(): as right, by
the rules of the language. `early`: they do not wait for the copies. docs/kernels/lscd.md says what was found.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from gossamer import nvrtc

SOURCE = r"""
#include "lscd_copy.cuh"

constexpr int SLOTS = 2;

extern "C" __global__ void __launch_bounds__(64) ring(const float* x, float* y, i32 turns) {
  __shared__ __align__(16) float slots[SLOTS][128];
  __shared__ u64 barriers[2 * SLOTS];
  const u32 full = address(barriers), empty = full + 8 * SLOTS;
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0)
    for (int i = 0; i < SLOTS; ++i) init_barrier(full + 8 * i, 32), init_barrier(empty + 8 * i, ELECTED ? 1 : 32);
  __syncthreads();
  float sum = 0;
  for (int t = 0; t < turns; ++t) {
    const int slot = t % SLOTS, turn = t / SLOTS;
    if (threadIdx.x >= 32) {
      if (turn) wait(empty + 8 * slot, (turn - 1) % 2);
      copy16(address(slots[slot]) + lane * 16, x + t * 128 + lane * 4, true);
      arrive_when_copied(full + 8 * slot);
    } else {
      if (WAITS) wait(full + 8 * slot, turn % 2);
      for (int i = 0; i < 4; ++i) sum += slots[slot][(lane * 4 + i + 8) % 128];  // what other lanes copied
      __syncwarp();
      if (!ELECTED || lane == 0) arrive(empty + 8 * slot);
    }
  }
  if (threadIdx.x < 32) y[lane] = sum;
}
"""
KINDS = {"lanes": (0, 1), "elected": (1, 1), "early": (0, 0)}


def main(kind: str) -> int:
    elected, waits = KINDS[kind]
    turns = 8
    x, y = torch.randn(turns * 128, device="cuda"), torch.zeros(32, device="cuda")
    with tempfile.TemporaryDirectory() as folder:
        for file in ("types.cuh", "lscd_copy.cuh"):
            (Path(folder) / file).write_text((nvrtc.SOURCES / file).read_text())
        (Path(folder) / "ring.cuh").write_text(SOURCE)
        nvrtc.SOURCES = Path(folder)
        macros = {"ELECTED": elected, "WAITS": waits}
        nvrtc.Function("ring.cuh", "ring", "PPi", macros).launch((1, 1, 1), (64, 1, 1), x, y, turns)
        expected = x.view(turns, 32, 4).sum((0, 2)).roll(-2)
        right = torch.allclose(y, expected, atol=1e-4)
    print(kind, "right" if right else "wrong")
    return int(not right and bool(waits))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
