from importlib.metadata import EntryPoint

import pytest

from gossamer import formats
from gossamer.formats.dense import Dense
from gossamer.registry import Registry


class Outside(Dense):
    name = "outside"


def with_plugin(name: str, value: str) -> Registry:
    registry = Registry("gossamer.formats", formats.Format)
    registry.__dict__["_plugins"] = {name: EntryPoint(name, value, "gossamer.formats")}
    return registry


def test_the_folder_is_the_registry() -> None:
    assert {"bitmask", "dense", "nm24", "product"} <= set(formats.registry.names())
    assert not any(n.startswith("_") for n in formats.registry)
    assert formats.registry["dense"] is Dense


def test_entry_points_are_found() -> None:
    registry = with_plugin("outside", f"{__name__}:Outside")
    import sys

    sys.modules.setdefault(__name__, sys.modules[Outside.__module__])
    assert "outside" in registry and registry["outside"].name == "outside"
    assert registry["dense"] is Dense, "a file of ours wins"


def test_an_entry_point_of_the_wrong_kind_is_named() -> None:
    with pytest.raises(TypeError, match="entry point 'path' in group gossamer.formats is not a subclass of Format"):
        with_plugin("path", "pathlib:Path")["path"]
