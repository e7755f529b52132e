"""Small products of cuda_lscd for compute-sanitizer, one per kind of kernel, checked against float64:

    compute-sanitizer --tool racecheck --num-cuda-barriers 65536 --kernel-name kns=lscd python tests/sanitize_lscd.py

and the same with `--tool memcheck --report-api-errors no` (the driver is also asked for what it lacks). Every ring
wraps; wgmma and mma.sync, clusters, both kinds of items. With `--older` the path of GPUs before Hopper, through PTX
that the driver translates.
"""

from __future__ import annotations

import sys

import torch

from gossamer import nvrtc
from gossamer.kernels import _lscd_cut, cuda_lscd

ROWS, COLS, DENSITY = 160, 3072, 0.4


def main(older: bool) -> int:
    torch.manual_seed(0)
    device, worst, runs = cuda_lscd.gpu(0), 0.0, 0
    if older:
        from test_cuda_lscd import ptx

        nvrtc.compile = ptx
        device = device._replace(clusters=False, wgmma=False, shared=99 << 10)
        cuda_lscd.gpu = lambda index: device
    a = (torch.randn(ROWS, COLS) * (torch.rand(ROWS, COLS) < DENSITY)).bfloat16().cuda()
    for words in (False, True):
        packed = cuda_lscd.pack_dense(a, words)
        for tokens in (3, 32, 64) if older else (3, 32, 64, 128):
            x = torch.randn(tokens, COLS).bfloat16().cuda()
            kinds: dict[tuple[int, ...], list[_lscd_cut.Cut]] = {}
            for cut in _lscd_cut.cuts(cuda_lscd.work_of(tokens, packed.meta), device):
                kinds.setdefault((cut.team, cut.pair, cut.cluster), []).append(cut)
            for cut in [c for alike in kinds.values() for c in (alike[0], alike[len(alike) // 2])]:
                y = x.new_empty(tokens, ROWS)
                cuda_lscd.launch(x, packed.tensors, packed.meta, None, y, cut)
                expected = x.double() @ a.double().mT
                worst, runs = max(worst, float((y.double() - expected).norm() / expected.norm())), runs + 1
    print(f"{runs} products, relative error up to {worst:.1e}")
    return int(not worst < 2e-3)


if __name__ == "__main__":
    sys.exit(main("--older" in sys.argv[1:]))
