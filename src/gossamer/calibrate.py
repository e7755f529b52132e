"""Calibration: windows of tokens -> what every layer's input looks like, one block at a time.

The hidden states between two blocks lie on disk, one raw file [samples, length, hidden] per boundary: `NNN.bin` is what
goes into block NNN. Memory holds one block's Grams and one batch. A boundary is written whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .layers import first_input, quiet
from .stats import CalibrationError, Stats
from .windows import Calibration
from .work import raw, replacing

CPU_TOKENS, ACCELERATOR_TOKENS = 2048, 8192  # per batch

Tick = Callable[[int, int], object]  # called with (batches done, batches in all)


@dataclass(frozen=True)
class _Call:
    """How a block is called, but for its hidden states, which go in first or under the name `key`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    key: str | None

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        named = {self.key: hidden} if self.key else {}
        out = block(*(() if self.key else (hidden,)), *self.args, **named, **self.kwargs)
        return out if isinstance(out, Tensor) else out[0]

    def to(self, device: torch.device) -> _Call:
        return _Call(_moved(self.args, device), _moved(self.kwargs, device), self.key)

    def same(self, other: _Call) -> bool:
        return _equal(self.args, other.args) and _equal(self.kwargs, other.kwargs)


class Stream:
    """The calibration windows on their way through the blocks of a model.

    To be made while the model is whole and dense. `device`: where blocks run; None leaves them where they are.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        calibration: Calibration,
        folder: Path,
        device: torch.device | str | None = None,
    ) -> None:
        self.model, self.blocks, self.ids, self.folder, self.device = model, blocks, calibration.ids, folder, device
        folder.mkdir(parents=True, exist_ok=True)
        self.batch = _batch_size(self.ids, torch.device(device or next(model.parameters()).device))
        with quiet(model):
            captured = _capture(model, blocks, self.ids[: self.batch])
        self._calls = [call for call, _ in captured]
        self._shape, self._dtype = captured[0][1].shape, captured[0][1].dtype

    @property
    def batches(self) -> int:
        return self.ids.shape[0] // self.batch

    @property
    def boundary_bytes(self) -> int:
        """Disk that the hidden states between two blocks take."""
        return self._shape.numel() * self._dtype.itemsize * self.batches

    def has(self, index: int) -> bool:
        """Whether the input of block `index` is on disk, complete."""
        file = self._file(index)
        return file.exists() and file.stat().st_size == self.boundary_bytes

    def drop(self, index: int) -> None:
        self._file(index).unlink(missing_ok=True)

    def start(self) -> None:
        """Write the input of the first block."""
        with quiet(self.model), self._writing(0) as write:
            for ids in self.ids.split(self.batch):
                [(call, hidden)] = _capture(self.model, self.blocks[:1], ids)
                if not call.same(self._calls[0]):
                    raise CalibrationError(
                        f"the blocks of {type(self.model).__name__} take more than hidden states that differs from "
                        "window to window, which calibration block by block does not support; fix: use method magnitude"
                    )
                write(hidden)

    def run(
        self, index: int, watch: Mapping[str, nn.Module] | None = None, onward: bool = True, tick: Tick | None = None
    ) -> dict[str, Stats]:
        """Run block `index` over its input: the Stats of the inputs of the `watch`ed layers, by name.

        `onward`: write the output, which is the input of the next block. CalibrationError names a layer whose input
        holds NaN or Inf.
        """
        grams = {name: _Gram() for name in watch or {}}
        with quiet(self.model), placed(self.blocks[index], self.device) as device, _hooked(watch or {}, grams):
            hidden = self._outputs(index, device, tick)
            if not onward:
                for _ in hidden:
                    pass
                return _checked(grams)
            with self._writing(index + 1) as write:
                for h in hidden:
                    write(h)
                # Before the boundary gets its name: what follows NaN is of no use.
                return _checked(grams)

    def _outputs(self, index: int, device: torch.device, tick: Tick | None) -> Iterator[Tensor]:
        call = self._calls[index].to(device)
        for i, hidden in enumerate(self._read(index)):
            yield call(self.blocks[index], hidden.to(device))
            if tick:
                tick(i + 1, self.batches)

    def _read(self, index: int) -> Iterator[Tensor]:
        size = self.boundary_bytes // self.batches
        with self._file(index).open("rb") as f:
            for _ in range(self.batches):
                yield torch.frombuffer(bytearray(f.read(size)), dtype=self._dtype).view(self._shape)

    @contextmanager
    def _writing(self, index: int) -> Iterator[Callable[[Tensor], None]]:
        def write(hidden: Tensor) -> None:
            if (hidden.shape, hidden.dtype) != (self._shape, self._dtype):
                raise CalibrationError(
                    f"the input of block {index} is {tuple(hidden.shape)} {hidden.dtype}, that of block 0 is "
                    f"{tuple(self._shape)} {self._dtype}; blocks that change the width cannot be calibrated one by one"
                )
            out.write(raw(hidden))

        with replacing(self._file(index)) as part, part.open("wb") as out:
            yield write

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:03d}.bin"


class _Gram:
    """Sums X^T X: a float32 product per batch (float64 for float64 activations), summed in float64."""

    def __init__(self) -> None:
        self.sum: Tensor | None = None
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        x = x.detach().flatten(0, -2)
        x = x if x.dtype == torch.float64 else x.float()
        product = x.mT @ x
        self.sum = product.double() if self.sum is None else self.sum.add_(product)
        self.tokens += x.shape[0]


class _Stop(Exception):
    """Ends a forward pass once the last block's input is known."""


@contextmanager
def placed(module: nn.Module, device: torch.device | str | None) -> Iterator[torch.device]:
    """Have a module on `device` (None: where it is) for a while, then where it was."""
    home = next(module.parameters()).device
    here = torch.device(device) if device else home
    try:
        module.to(here)
        yield here
    finally:
        module.to(home)


@contextmanager
def _hooked(watch: Mapping[str, nn.Module], grams: Mapping[str, _Gram]) -> Iterator[None]:
    def hook(gram: _Gram) -> Callable[..., None]:
        return lambda _, args, kwargs: gram.add(first_input(args, kwargs))

    handles = [m.register_forward_pre_hook(hook(grams[n]), with_kwargs=True) for n, m in watch.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _checked(grams: Mapping[str, _Gram]) -> dict[str, Stats]:
    found = {}
    for name, gram in grams.items():
        if gram.sum is None:
            raise CalibrationError(f"{name}: no calibration tokens reached it; fix: leave it out with a rule, 'dense'")
        found[name] = Stats(gram.sum, gram.tokens)
        found[name].check(name)
    return found


def _capture(model: nn.Module, blocks: Sequence[nn.Module], ids: Tensor) -> list[tuple[_Call, Tensor]]:
    """How each block is called in a forward pass over `ids` [batch, length], and the hidden states of the first."""
    captured: list[tuple[_Call, Tensor]] = []
    outputs: list[Any] = []

    def recording(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            key = None if args else next(iter(kwargs))
            rest = {n: v for n, v in kwargs.items() if n != key}
            # Of later blocks nobody asks for the hidden states, and all of them at once take much memory.
            hidden = captured[0][1] if captured else first_input(args, kwargs)
            captured.append((_Call(args[1:], rest, key), hidden))
            if len(captured) == len(blocks):
                raise _Stop
            # How a block is called does not depend on hidden states, so one block's output does for all.
            outputs[:] = outputs or [forward(*args, **kwargs)]
            return outputs[0]

        return call

    try:
        with _replaced_forward(blocks, recording):
            model(input_ids=ids.to(next(model.parameters()).device))
    except _Stop:
        return captured
    raise CalibrationError(f"{type(model).__name__}: {len(captured)} of {len(blocks)} blocks ran in a forward pass")


@contextmanager
def _replaced_forward(blocks: Sequence[nn.Module], wrap: Callable[..., Any]) -> Iterator[None]:
    # Some libraries put a forward of their own on the instance; those have it back afterwards.
    own = [b.__dict__.get("forward") for b in blocks]
    try:
        for block in blocks:
            block.forward = wrap(block.forward)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward:
                block.forward = forward


def _batch_size(ids: Tensor, device: torch.device) -> int:
    """The largest divisor of the number of windows that keeps a batch small: every batch has the captured shape."""
    samples, length = ids.shape
    most = max(1, (CPU_TOKENS if device.type == "cpu" else ACCELERATOR_TOKENS) // length)
    return max(d for d in range(1, min(most, samples) + 1) if samples % d == 0)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {k: _moved(v, device) for k, v in value.items()}
    return type(value)(_moved(v, device) for v in value) if type(value) in (tuple, list) else value


def _equal(a: Any, b: Any) -> bool:
    """Whether the tensors in two nested arguments are the same; other values are the model's own business."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(v, b[k]) for k, v in a.items())
    return all(map(_equal, a, b)) if type(a) in (tuple, list) else True
