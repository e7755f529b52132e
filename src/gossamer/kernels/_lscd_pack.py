"""The run-time layout of `cuda_lscd`: packed and unpacked with torch alone, on any device.

A matrix [M, K] is cut into stages of 16 rows by DEPTH columns, padded with zeros. The warp that reads a stage holds it
as the left operands of STEPS matrix products of depth 16: register h + 2 q of lane 4 g + t has, in its two halves,
row g + 8 h and columns 8 q + 2 t and 8 q + 2 t + 1. Its values come in streams, in the order of use:

    halves: one stream per register, of single values; a mask bit per value
    words:  one stream for registers 0 and 1 and one for 2 and 3, of whole registers; a mask bit per register, which is
            left out if both its values are zero

    stage = masks [.., 32] uint32, for each lane a bit per item:
                halves, word [step // 4]: bit 8 (step % 4) + 4 i + register, i the half
                words, word [step // 8]: bit 4 (step % 8) + register
            slots [32] uint32, five bits per stream, then (from bit 20) the number of rows that follow
            rows [rows, 32] of 4 bytes: two values of two streams (halves), or one register (words)

The bank of shared memory that a lane reads is its slot, another one for each lane of a stream. The first half of the
streams runs down from the first row, the other half up from the last; of halves, even streams lie in the low and odd
ones in the high half of a slot. Slots go by length, the longest downward stream above the shortest upward one, so that
all meet at about the same height and little is padding.
Two stages, one below the other in the matrix, follow each other: a warp may take both at once. After the pair comes the
next one to the right; `offsets` says where each stage begins, in units of 128 bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

STEPS = 16
DEPTH = 16 * STEPS
LINE = 128  # bytes
CHUNK = 1 << 23  # weights that are packed at a time


def head_bytes(words: bool) -> int:
    """Bytes of a stage before its rows of values."""
    return (16 if words else 32) * STEPS + LINE


class Layout(NamedTuple):
    """What of the layout depends on the kind of item."""

    words: bool

    @property
    def dtype(self) -> torch.dtype:
        return torch.int32 if self.words else torch.int16

    @property
    def streams(self) -> int:
        return 2 if self.words else 4

    @property
    def line(self) -> int:
        """Items of a row."""
        return LINE // self.dtype.itemsize

    @property
    def head(self) -> int:
        """Items that the head takes."""
        return head_bytes(self.words) // self.dtype.itemsize

    def column(self, slots: Tensor, stream: Tensor) -> Tensor:
        """The item of a row that a stream uses."""
        return slots if self.words else 2 * slots + stream % 2


def share_of_items(dense: Tensor) -> tuple[float, float]:
    """(share of the values of [M, K] that are not zero, share of its registers of which not both values are)."""
    there = pad(dense, (0, dense.shape[1] % 2)) != 0
    return float(there.sum()) / dense.numel(), float(there.view(-1, 2).any(1).sum()) * 2 / there.numel()


def pack_matrix(dense: Tensor, words: bool) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Dense [M, K] of a 16-bit dtype -> (stages [bytes] uint8, offsets [stages + 1] int32, bytes of the largest
    stage and of the largest pair)."""
    m, k = dense.shape
    layout = Layout(words)
    deep = -(-k // DEPTH)
    rows = 32 * max(1, CHUNK // (32 * DEPTH * deep))
    packed, heights = [], []
    for begin in range(0, m, rows):
        streams = _streams(_padded(dense[begin : begin + rows]), layout)
        stages, height = _pack_stages(streams, layout)
        packed.append(stages)
        heights.append(height)
    sizes = torch.cat(heights) + head_bytes(words) // LINE
    offsets = pad(sizes.cumsum(0), (1, 0))
    if int(offsets[-1]) >= 1 << 31:
        raise ValueError(f"a matrix of {m} x {k} takes more than 256 GB; fix: split it by rows")
    room = int(sizes.max()) * LINE, int(sizes.view(-1, 2).sum(1).max()) * LINE
    return torch.cat(packed).view(torch.uint8), offsets.int(), room


def unpack_matrix(stages: Tensor, offsets: Tensor, shape: tuple[int, int], dtype: torch.dtype, words: bool) -> Tensor:
    """The inverse of `pack_matrix`, walking each stream as a lane of the kernel does."""
    m, k = shape
    layout = Layout(words)
    memory, base = stages.view(layout.dtype), offsets[:-1].long() * layout.line
    masks, slots, height = _heads(stages.view(torch.int32), offsets[:-1].long() * (LINE // 4), layout)
    stream = torch.arange(layout.streams, device=stages.device).view(1, -1, 1)
    slot = slots.unsqueeze(1) >> 5 * stream & 31
    down = stream < layout.streams // 2
    at = (base + layout.head).view(-1, 1, 1) + layout.column(slot, stream)
    at = at + torch.where(down, 0, (height.view(-1, 1, 1) - 1) * layout.line)
    stride = torch.where(down, layout.line, -layout.line)
    values = []
    for position in range(2 * STEPS):
        step, i = divmod(position, 2)
        word = masks[:, step // 8 if words else step // 4].unsqueeze(1)
        there = word >> (4 * (step % 8) + 2 * stream + i if words else 8 * (step % 4) + 4 * i + stream) & 1
        found = memory[torch.where(there == 1, at, 0)]
        values.append(torch.where(there == 1, found, 0))
        at = at + stride * there
    dense = _unstreamed(torch.stack(values, -1), -(-m // 32), layout)
    return dense[:m, :k].contiguous().view(dtype)


def _heads(memory: Tensor, base: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Masks [stages, words of a lane, 32], slots [stages, 32] and the number of rows of every stage."""
    count = head_bytes(layout.words) // 4
    head = memory[base.unsqueeze(1) + torch.arange(count, device=base.device)].long() & 0xFFFFFFFF
    masks, slots = head[:, :-32], head[:, -32:]
    return masks.reshape(len(base), -1, 32), slots, slots[:, 0] >> 20


def _padded(dense: Tensor) -> Tensor:
    m, k = dense.shape
    return pad(dense, (0, -k % DEPTH, 0, -m % 32))


def _streams(dense: Tensor, layout: Layout) -> Tensor:
    """[32 B, DEPTH * D] -> items [2 * B * D stages, streams, 32 lanes, 2 STEPS positions]; no -0.0 is left."""
    blocks, bits = dense.shape[0] // 32, dense.view(torch.int16)
    bits = bits.masked_fill(bits & 0x7FFF == 0, 0)
    if layout.words:
        split = bits.view(torch.int32).view(blocks, 2, 2, 8, -1, STEPS, 2, 4)  # block pair h g deep step q t
        return split.permute(0, 4, 1, 6, 3, 7, 5, 2).reshape(-1, 2, 32, 2 * STEPS)
    split = bits.view(blocks, 2, 2, 8, -1, STEPS, 2, 4, 2)  # block pair h g deep step q t i
    return split.permute(0, 4, 1, 6, 2, 3, 7, 5, 8).reshape(-1, 4, 32, 2 * STEPS)


def _unstreamed(streams: Tensor, blocks: int, layout: Layout) -> Tensor:
    if layout.words:
        split = streams.view(blocks, -1, 2, 2, 8, 4, STEPS, 2)  # block deep pair q g t step h
        whole = split.permute(0, 2, 7, 4, 1, 6, 3, 5).reshape(blocks * 32, -1)
        return whole.view(torch.int16)
    split = streams.view(blocks, -1, 2, 2, 2, 8, 4, STEPS, 2)  # block deep pair q h g t step i
    return split.permute(0, 2, 4, 5, 1, 7, 3, 6, 8).reshape(blocks * 32, -1)


def _pack_stages(streams: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Streams of whole stages -> (items [..]: the stages end to end, rows of values of each)."""
    device, count = streams.device, streams.shape[0]
    there = streams != 0
    slots, height = _placed(there.sum(-1, dtype=torch.int32))
    base = (height * layout.line + layout.head).cumsum(0)
    memory = torch.zeros(int(base[-1]) if count else 0, dtype=layout.dtype, device=device)
    base = pad(base[:-1], (1, 0))
    head = _head(there, slots, height, layout).view(layout.dtype)
    memory[base.unsqueeze(1) + torch.arange(layout.head, device=device)] = head
    stream = torch.arange(layout.streams, device=device).view(1, -1, 1, 1)
    order = there.cumsum(-1, dtype=torch.int32) - 1
    row = torch.where(stream < layout.streams // 2, order, height.view(-1, 1, 1, 1) - 1 - order)
    place = row * layout.line + layout.column(slots.unsqueeze(-1), stream)
    place = place + (base + layout.head).view(-1, 1, 1, 1)
    memory[place[there]] = streams[there]
    return memory, height


def _placed(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Slots [stages, streams, 32] for streams of these lengths, and how many rows each stage needs."""
    half = lengths.shape[1] // 2
    down = torch.sort(lengths[:, :half], dim=-1, descending=True, stable=True)
    up = torch.sort(lengths[:, half:], dim=-1, stable=True)
    height = (down.values + up.values).flatten(1).amax(1)
    slots = torch.cat([down.indices, up.indices], 1).argsort(-1)
    return slots, height.long()


def _head(there: Tensor, slots: Tensor, height: Tensor, layout: Layout) -> Tensor:
    """Masks and slots of every stage: bytes [stages, head]."""
    device, count = there.device, there.shape[0]
    if layout.words:
        bits = there.view(count, 2, 32, STEPS // 8, 4, 2, 2).permute(0, 3, 2, 4, 5, 1, 6)
    else:
        bits = there.view(count, 4, 32, STEPS // 4, 4, 2).permute(0, 3, 2, 4, 5, 1)
    masks = (bits.reshape(count, -1, 8) * (1 << torch.arange(8, device=device))).sum(-1).to(torch.uint8)
    shifts = 5 * torch.arange(layout.streams, device=device).view(1, -1, 1)
    word = (slots << shifts).sum(1) + (height.view(-1, 1) << 20)
    return torch.cat([masks, word.int().view(torch.uint8)], 1)
