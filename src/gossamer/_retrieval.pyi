"""
The inverted index over raw pointers; gossamer.retrieval is the typed, checked way in.
"""

MAX_DOCS: int = 1048576

def isas() -> list[str]:
    """The instruction sets this CPU can run, best first."""

def isa() -> str:
    """The instruction set in use: GOSSAMER_ISA, else the best."""

def set_isa(name: str) -> None:
    """Use this instruction set from now on, in every thread."""

def tidy(
    docs: int,
    starts: int,
    columns: int,
    itemsize: int,
    values: int,
    nnz: int,
    dim: int,
    starts_out: int,
    columns_out: int,
    values_out: int,
) -> tuple[int, int, int]:
    """Sorts rows and drops zeros: (fault, row, non-zeros kept)."""

class Builder:
    """Lays a segment out, then writes it into memory of the caller's."""

    def __init__(
        self,
        docs: int,
        starts: int,
        columns: int,
        values: int,
        dim: int,
        keep_values: bool,
        ids: int,
        first_id: int,
        threads: int,
    ) -> None: ...
    @property
    def bytes(self) -> int: ...
    def write(self, block: int) -> None: ...

class Segment:
    """
    A view of a block that its user keeps alive; ValueError if the block is damaged.
    """

    def __init__(self, block: int, bytes: int) -> None: ...
    @property
    def docs(self) -> int: ...
    @property
    def dim(self) -> int: ...
    @property
    def nnz(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def ranges(self) -> int: ...
    @property
    def exact(self) -> bool: ...
    @property
    def first_id(self) -> int: ...
    @property
    def running_ids(self) -> bool:
        """Ids count up from the first."""

    def copy_ids(self, ids: int) -> None:
        """Fills int64 [docs]."""

    def document_counts(self, counts: int) -> None:
        """Adds the documents of each dimension to int64 [dim]."""

class Grouping:
    """Documents grouped by likeness."""

    def __init__(
        self, docs: int, starts: int, columns: int, values: int, dim: int, size: int, threads: int
    ) -> None: ...
    @property
    def groups(self) -> int: ...
    @property
    def nnz(self) -> int: ...
    def copy(self, order: int, starts: int, centre_starts: int, columns: int, values: int) -> None: ...

def check_groups(segment: Segment, centres: Segment, starts: int, count: int) -> None:
    """ValueError unless the groups fit the segment."""

def permute(
    docs: int,
    starts: int,
    columns: int,
    values: int,
    order: int,
    starts_out: int,
    columns_out: int,
    values_out: int,
    threads: int,
) -> None:
    """Rows in another order."""

def count_rows(segment: Segment, keep: int, lengths: int) -> None:
    """Non-zeros of each document whose bit is set."""

def extract_rows(segment: Segment, keep: int, starts: int, columns: int, values: int) -> None:
    """Those documents as rows."""

def search(
    targets: list[tuple[Segment, int, int, Segment | None, int]],
    queries: int,
    starts: int,
    columns: int,
    values: int,
    k: int,
    exact: bool,
    trust: float,
    survivors: int,
    cut: float,
    groups: int,
    threads: int,
    scores: int,
    ids: int,
) -> tuple[int, int, int]:
    """
    Fills scores and ids [queries, k]: (documents scored, ranges read, queries scored completely).
    """

def count_postings(
    targets: list[tuple[Segment, int, int, Segment | None, int]],
    queries: int,
    starts: int,
    columns: int,
    values: int,
    counts: int,
) -> None:
    """Postings that each query touches."""

def checksum(data: int, bytes: int, threads: int) -> int:
    """64 bits of a block of memory."""
