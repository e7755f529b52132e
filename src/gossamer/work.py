"""The work folder of one compression: what it belongs to, and the result of every group that is done.

    fingerprint.json          what the run depends on; another run is refused
    groups/NAME.safetensors   the formats of one group, named by its first layer; written once, whole
    hidden/                   the hidden states between two blocks (see `calibrate`), while the run lasts
    choice.json, report.json  what "auto" chose; what each layer cost

Every file appears under its name only when it is complete, so a folder can be resumed after a kill at any moment.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .formats import Format, FormatError, from_spec
from .formats.product import RIGHT

SPARE = 64 << 20  # bytes of disk to leave free


class WorkError(RuntimeError):
    """A work folder that holds another run, is damaged, or has no room."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder that becomes `path` when the body succeeds, and vanishes when it fails."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb") as f:
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=1) + "\n")


def fingerprint(model: nn.Module) -> dict[str, str]:
    """What a result depends on, of the model and of the software; ValueError for NaN or Inf in the weights."""
    config = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}  # type: ignore[union-attr]
    # Where a model came from does not change what it computes.
    settings = {k: v for k, v in settings.items() if k not in ("_name_or_path", "transformers_version")}
    return {
        "weights": check_weights(model)[:16],
        "config": digest(settings),
        "torch": torch.__version__,
        "gossamer": _version(),
    }


def digest(value: Any) -> str:
    """A short digest of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _version() -> str:
    try:
        return version("gossamer")
    except PackageNotFoundError:
        return "from source"


def check_weights(model: nn.Module) -> str:
    """A digest of every parameter and buffer that a checkpoint holds; ValueError names one with NaN or Inf."""
    digest = hashlib.blake2b()  # the fastest of hashlib's on any CPU
    for name, tensor in model.state_dict().items():
        if not _finite(tensor):
            raise ValueError(
                f"{name}: NaN or Inf in the weights; fix: load the checkpoint again, in float32 or bfloat16"
            )
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(raw(tensor))
    return digest.hexdigest()


def _finite(tensor: Tensor) -> bool:
    # Through the extremes, which make no copy of the tensor.
    return not tensor.is_floating_point() or not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor of any dtype, row-major."""
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]


class Folder:
    """A work folder opened for one run; `fingerprint` maps each thing the result depends on to a short string."""

    def __init__(self, path: Path, fingerprint: Mapping[str, str], fresh: bool = False) -> None:
        self.path, self.groups, self.hidden = path, path / "groups", path / "hidden"
        if fresh and (path / "fingerprint.json").exists():
            self._clear()
        self._claim(dict(fingerprint))
        self.groups.mkdir(exist_ok=True)
        self.hidden.mkdir(exist_ok=True)
        # Ours, and those that safetensors itself writes through.
        for stale in (*path.rglob("*.part"), *self.groups.glob(".tmp*")):
            stale.unlink(missing_ok=True)

    def _clear(self) -> None:
        # Only what a run writes: the folder may be the user's own. The fingerprint, which marks it as ours, goes last.
        for name in ("groups", "hidden"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in ("choice.json", "report.json", "fingerprint.json"):
            (self.path / name).unlink(missing_ok=True)

    def _claim(self, ours: dict[str, str]) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise WorkError(f"{self.path} is a file; fix: name a folder to work in")
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / "fingerprint.json"
        if file.exists():
            _compare(self.path, _read_json(file), ours)
        elif any(self.path.iterdir()) and not _only_parts(self.path):
            raise WorkError(
                f"{self.path} is not empty and holds no Gossamer run; fix: name a new or an empty work folder"
            )
        else:
            write_json(file, ours)

    def need(self, nbytes: int) -> None:
        """WorkError unless the disk has room for `nbytes` more."""
        if (free := shutil.disk_usage(self.path).free) < nbytes + SPARE:
            raise WorkError(
                f"{self.path}: this run needs {nbytes >> 20} MiB of disk, {free >> 20} MiB are free; "
                "fix: choose a work folder on another disk, or fewer samples"
            )

    def finish(self) -> None:
        """Remove what only an unfinished run needs."""
        shutil.rmtree(self.hidden, ignore_errors=True)

    def has(self, group: str) -> bool:
        return self._file(group).exists()

    def save(self, group: str, formats: Sequence[Format], facts: Mapping[str, Any]) -> None:
        """Store the formats of a group, a right factor that they share once, and JSON-able `facts` beside them."""
        tensors, kept = {}, []
        for i, a in enumerate(formats):
            borrowed = i > 0 and borrows(a, formats[0])
            kept.append({"spec": a.spec(), "borrows": borrowed})
            tensors |= {f"{i}.{n}": t for n, t in a.tensors().items() if not (borrowed and n.startswith(RIGHT))}
        # A clone of its own each: safetensors refuses views of one storage.
        tensors = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
        meta = {"gossamer": json.dumps({"formats": kept, "facts": dict(facts)})}
        try:
            with replacing(self._file(group)) as part:
                save_file(tensors, part, metadata=meta)
        except (SafetensorError, OSError) as e:
            raise WorkError(
                f"{group}: its result could not be written to {self.path} ({e}); "
                "fix: free some disk, then run the same command again"
            ) from e

    def load(self, group: str, device: torch.device | str) -> tuple[list[Format], dict[str, Any]]:
        """The formats of a finished group, and its facts; WorkError if the file is damaged."""
        try:
            return self._load(self._file(group), device)
        except (SafetensorError, FormatError, KeyError, ValueError, OSError) as e:
            raise WorkError(f"{self._file(group)} is damaged ({e}); fix: delete this file and run again") from e

    def _load(self, file: Path, device: torch.device | str) -> tuple[list[Format], dict[str, Any]]:
        with safe_open(file, framework="pt") as f:
            meta = json.loads((f.metadata() or {})["gossamer"])
            # Clones, because the file may go away while the layers live.
            stored = {n: f.get_tensor(n).clone().to(device) for n in f.keys()}  # noqa: SIM118
        formats: list[Format] = []
        for i, entry in enumerate(meta["formats"]):
            tensors = {n.partition(".")[2]: t for n, t in stored.items() if n.startswith(f"{i}.")}
            if entry["borrows"]:
                tensors |= {n: t for n, t in formats[0].tensors().items() if n.startswith(RIGHT)}
            formats.append(from_spec(entry["spec"], tensors))
            formats[-1].validate()
        return formats, meta["facts"]

    def _file(self, group: str) -> Path:
        return self.groups / f"{group}.safetensors"


def borrows(a: Format, lender: Format) -> bool:
    """Whether `a` is a product whose right factor is the very one of `lender`."""
    ours, theirs = a.tensors(), lender.tensors()
    right = [n for n in ours if n.startswith(RIGHT)]
    return bool(right) and all(n in theirs and ours[n] is theirs[n] for n in right)


def _compare(path: Path, theirs: dict[str, str], ours: dict[str, str]) -> None:
    if theirs == ours:
        return
    differ = [k for k in sorted(ours.keys() | theirs.keys()) if ours.get(k) != theirs.get(k)]
    shown = "; ".join(f"{k}: {theirs.get(k)} there, {ours.get(k)} here" for k in differ)
    raise WorkError(
        f"{path} holds another run, they differ in {shown}; fix: choose another work folder, "
        "or start over in this one with --fresh (fresh=True)"
    )


def _read_json(file: Path) -> dict[str, str]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as e:
        raise WorkError(f"{file} cannot be read ({e}); fix: choose another work folder, or --fresh") from e


def _only_parts(path: Path) -> bool:
    # What a kill before the fingerprint was complete leaves behind.
    return all(p.name.startswith("fingerprint.json.") for p in path.iterdir())
