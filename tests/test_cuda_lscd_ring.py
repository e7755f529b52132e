"""The ring through which the warps of cuda/lscd.cuh share x, in every order in which its steps may happen.

racecheck sees neither tensor copies nor what wgmma reads, so the protocol is checked here as a model: one warp copies,
each chunk of stages has `warps` readers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from gossamer.kernels._lscd_cut import X_PER_STAGE, Gpu, Work, cuts

EMPTY, COPYING = -1, -2


@dataclass(frozen=True)
class Reader:
    """`done`: positions whose slots it has given back; `held`: further ones that it reads."""

    chunk: int
    done: int = 0
    held: int = 0


@dataclass(frozen=True)
class State:
    issued: int  # positions of which the copy was begun
    landed: int  # of which it has ended: copies of a thread arrive in the order of their issue
    slots: tuple[int, ...]  # the position that each holds
    empty: tuple[int, ...]  # arrivals, over all phases
    readers: tuple[Reader, ...]


@dataclass(frozen=True)
class Ring:
    per: int  # slots per stage
    split: int
    size: int
    stages: int
    warps: int
    late: bool  # a slot is given back when the next one has begun, as wgmma reads on while a warp goes on

    @property
    def positions(self) -> int:
        return self.per * self.stages

    def own(self, chunk: int) -> list[int]:
        stages = range(chunk, self.stages, self.split)
        return [self.per * stage + part for stage in stages for part in range(self.per)]

    def first(self) -> State:
        readers = tuple(Reader(chunk) for chunk in range(self.split) for _ in range(self.warps))
        return State(0, 0, (EMPTY,) * self.size, (0,) * self.size, readers)

    def full_phase(self, state: State, slot: int) -> int:
        """How often the barrier of a slot has turned."""
        return len(range(slot, state.landed, self.size))

    def steps(self, state: State) -> Iterator[State]:
        if state.issued < self.positions:
            yield from self.issue(state)
        if state.landed < state.issued:
            slots = _with(state.slots, state.landed % self.size, state.landed)
            yield replace(state, landed=state.landed + 1, slots=slots)
        for k in range(len(state.readers)):
            yield from self.read(state, k)

    def issue(self, state: State) -> Iterator[State]:
        slot, turn = state.issued % self.size, state.issued // self.size
        if turn and state.empty[slot] // self.warps % 2 == (turn - 1) % 2:
            return  # waits, by the parity of the phase
        for reader in state.readers:
            held = self.own(reader.chunk)[reader.done : reader.done + reader.held]
            assert all(p % self.size != slot for p in held), "overwritten while it is read"
        yield replace(state, issued=state.issued + 1, slots=_with(state.slots, slot, COPYING))

    def read(self, state: State, k: int) -> Iterator[State]:
        reader = state.readers[k]
        own, at = self.own(reader.chunk), reader.done + reader.held
        if at < len(own) and reader.held < 1 + self.late:
            slot, turn = own[at] % self.size, own[at] // self.size
            if self.full_phase(state, slot) % 2 != turn % 2:
                assert state.slots[slot] == own[at], "read before it was there"
                yield replace(state, readers=_with(state.readers, k, replace(reader, held=reader.held + 1)))
        if reader.held == 1 + self.late or (reader.held and at == len(own)):
            slot = own[reader.done] % self.size
            after = replace(reader, done=reader.done + 1, held=reader.held - 1)
            empty = _with(state.empty, slot, state.empty[slot] + (at < len(own) or not self.late or reader.held > 1))
            yield replace(state, readers=_with(state.readers, k, after), empty=empty)

    def over(self, state: State) -> bool:
        return state.landed == self.positions and all(r.done == len(self.own(r.chunk)) for r in state.readers)


def _with(values: tuple, at: int, value: object) -> tuple:
    return (*values[:at], value, *values[at + 1 :])


def explore(ring: Ring) -> None:
    """Raises AssertionError where an order of steps reads a wrong slot, overwrites one or comes to a halt."""
    seen = {ring.first()}
    todo = list(seen)
    while todo:
        state = todo.pop()
        after = list(ring.steps(state))
        assert after or ring.over(state), "everybody waits"
        new = set(after) - seen
        seen |= new
        todo += new


def rings() -> set[tuple[int, int, int]]:
    """(warps per team, split, slots) of every cut of a small product on an H100 that has at most three chunks."""
    device = Gpu(132, 232448, True, True)
    works = [Work(64, 5, (4096, 8192), 4096, tiles, False) for tiles in (1, 8)]
    return {(c.team, c.split, c.x_ring) for work in works for c in cuts(work, device) if c.split < 4}


@pytest.mark.parametrize(("team", "split", "size"), sorted(rings()))
def test_no_order_of_steps_goes_wrong(team: int, split: int, size: int) -> None:
    for stages in range(split, 6):
        for warps in (1, 2) if split == 1 else (1,):
            explore(Ring(X_PER_STAGE[team], split, size, stages, warps, team > 1))


@pytest.mark.parametrize(
    ("ring", "fault"),
    [
        (Ring(1, 2, 1, 3, 1, False), "before it was there|everybody waits"),
        (Ring(2, 2, 3, 5, 1, True), "everybody waits|before it was there"),
        (Ring(2, 1, 1, 2, 1, True), "everybody waits"),
    ],
)
def test_the_model_finds_a_ring_that_is_too_small(ring: Ring, fault: str) -> None:
    with pytest.raises(AssertionError, match=fault):
        explore(ring)
