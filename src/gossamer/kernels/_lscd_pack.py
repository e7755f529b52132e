"""The run-time layout of `cuda_lscd`: packed and unpacked with torch alone, on any device.

A matrix [M, K] is cut into stages of 16 rows by DEPTH columns, padded with zeros. The warp that reads a stage holds it
as the left operands of STEPS matrix products of depth 16: lane 4 g + t has rows g and g + 8, and of each run of 32
columns the eight from 8 t on, four for each of two products. Its values come in four streams, one per register
of the operand: stream h + 2 q is row g + 8 h, columns 2 q and 2 q + 1 of each four.

    stage = masks [STEPS / 4, 32] uint32, bit 8 (step % 4) + 4 i + stream of word [step // 4, lane]: is value i there?
            slots [32] uint32, five bits per stream, then (from bit 20) the number of rows that follow
            rows [rows, 32] of two 16-bit values each

The bank of shared memory that a lane reads is its slot, another one for each lane of a stream. Streams 0 and 1 run down
from the first row, in the low and the high halves; 2 and 3 run up from the last. Slots go by length, the longest
downward stream above the shortest upward one, so that all meet at about the same height and little is padding.
Two stages, one below the other in the matrix, follow each other: a warp may take both at once. After the pair comes the
next one to the right; `offsets` says where each stage begins, in units of 128 bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 16
DEPTH = 16 * STEPS
LINE = 128  # bytes
HEAD = 32 * STEPS + LINE  # bytes of a stage before its rows of values
CHUNK = 1 << 23  # weights that are packed at a time


def pack_matrix(dense: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Dense [M, K] of a 16-bit dtype -> (stages [bytes] uint8, offsets [stages + 1] int32, bytes of the largest
    stage and of the largest pair)."""
    m, k = dense.shape
    deep = -(-k // DEPTH)
    rows = 32 * max(1, CHUNK // (32 * DEPTH * deep))
    packed, heights = [], []
    for begin in range(0, m, rows):
        streams = _streams(_padded(dense[begin : begin + rows]))
        stages, height = _pack_stages(streams)
        packed.append(stages)
        heights.append(height)
    sizes = torch.cat(heights) + HEAD // LINE
    offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    if int(offsets[-1]) >= 1 << 31:
        raise ValueError(f"a matrix of {m} x {k} takes more than 256 GB; fix: split it by rows")
    room = int(sizes.max()) * LINE, int(sizes.view(-1, 2).sum(1).max()) * LINE
    return torch.cat(packed).view(torch.uint8), offsets.int(), room


def unpack_matrix(stages: Tensor, offsets: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The inverse of `pack_matrix`, walking each stream as a lane of the kernel does."""
    m, k = shape
    memory, base = stages.view(torch.int16), offsets[:-1].long() * (LINE // 2)
    masks, slots, height = _heads(memory, base)
    stream = torch.arange(4, device=stages.device).view(1, 4, 1)
    slot = slots.unsqueeze(1) >> 5 * stream & 31
    start = (base + HEAD // 2).view(-1, 1, 1) + 2 * slot + stream % 2
    at = start + torch.where(stream < 2, 0, (height.view(-1, 1, 1) - 1) * (LINE // 2))
    stride = torch.where(stream < 2, LINE // 2, -LINE // 2)
    values = []
    for position in range(2 * STEPS):
        step, i = divmod(position, 2)
        there = masks[:, step // 4].unsqueeze(1) >> (8 * (step % 4) + 4 * i + stream) & 1
        found = memory[torch.where(there == 1, at, 0)]
        values.append(torch.where(there == 1, found, 0))
        at = at + stride * there
    dense = _unstreamed(torch.stack(values, -1), -(-m // 32))
    return dense[:m, :k].contiguous().view(dtype)


def _heads(memory: Tensor, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Masks [stages, STEPS / 4, 32], slots [stages, 32] and the number of rows of every stage."""
    halves = memory[base.unsqueeze(1) + torch.arange(HEAD // 2, device=base.device)]
    words = halves.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    masks, slots = words[:, : 8 * STEPS], words[:, 8 * STEPS :]
    return masks.reshape(-1, STEPS // 4, 32), slots, slots[:, 0] >> 20


def _padded(dense: Tensor) -> Tensor:
    m, k = dense.shape
    return torch.nn.functional.pad(dense, (0, -k % DEPTH, 0, -m % 32))


def _streams(dense: Tensor) -> Tensor:
    """[32 B, DEPTH * D] -> int16 [2 * B * D stages, 4 streams, 32 lanes, 2 STEPS positions]."""
    blocks = dense.shape[0] // 32
    split = dense.view(torch.int16).view(blocks, 2, 2, 8, -1, STEPS // 2, 4, 2, 2, 2)  # block pair h g deep run t j q i
    return split.permute(0, 4, 1, 8, 2, 3, 6, 5, 7, 9).reshape(-1, 4, 32, 2 * STEPS)


def _unstreamed(streams: Tensor, blocks: int) -> Tensor:
    split = streams.view(blocks, -1, 2, 2, 2, 8, 4, STEPS // 2, 2, 2)  # block deep pair q h g t run j i
    return split.permute(0, 2, 4, 5, 1, 7, 6, 8, 3, 9).reshape(blocks * 32, -1)


def _pack_stages(streams: Tensor) -> tuple[Tensor, Tensor]:
    """Streams of whole stages -> (int16 [..] the stages end to end, rows of values of each)."""
    device, count = streams.device, streams.shape[0]
    there = streams & 0x7FFF != 0  # but for -0.0
    lengths = there.sum(-1, dtype=torch.int32)
    slots, height = _placed(lengths)
    base = (height + HEAD // LINE).cumsum(0) * (LINE // 2)
    memory = torch.zeros(int(base[-1]) if count else 0, dtype=torch.int16, device=device)
    base = torch.nn.functional.pad(base[:-1], (1, 0))
    head = _head(there, slots, height)
    memory[base.unsqueeze(1) + torch.arange(head.shape[1], device=device)] = head
    stream = torch.arange(4, device=device).view(1, 4, 1, 1)
    order = there.cumsum(-1, dtype=torch.int32) - 1
    row = torch.where(stream < 2, order, height.view(-1, 1, 1, 1) - 1 - order)
    within = row * (LINE // 2) + 2 * slots.unsqueeze(-1) + stream % 2
    place = within + (base + head.shape[1]).view(-1, 1, 1, 1)
    memory[place[there]] = streams[there]
    return memory, height


def _placed(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Slots [stages, 4, 32] for streams of these lengths, and how many rows each stage needs."""
    down, up = (
        torch.sort(lengths[:, :2], dim=-1, descending=True, stable=True),
        torch.sort(lengths[:, 2:], dim=-1, stable=True),
    )
    height = (down.values + up.values).flatten(1).amax(1)
    slots = torch.cat([down.indices, up.indices], 1).argsort(-1)
    return slots, height.long()


def _head(there: Tensor, slots: Tensor, height: Tensor) -> Tensor:
    """Masks and slots of every stage: int16 [stages, HEAD / 2]."""
    device, count = there.device, there.shape[0]
    bits = there.view(count, 4, 32, STEPS // 4, 4, 2).permute(0, 3, 2, 4, 5, 1).reshape(count, -1, 8)
    weights = 1 << torch.arange(8, device=device)
    masks = (bits * weights).sum(-1).to(torch.uint8)
    shifts = 5 * torch.arange(4, device=device).view(1, 4, 1)
    word = (slots << shifts).sum(1) + (height.view(-1, 1) << 20)
    return torch.cat([masks.view(torch.int16), word.int().view(torch.int16)], 1)
