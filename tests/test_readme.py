"""The numbers that README.md quotes are those of the committed results."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_result_table_is_current() -> None:
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "benchmarks" / "readme_table.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    readme = (ROOT / "README.md").read_text()
    assert module.render(readme) == readme, "run: python benchmarks/readme_table.py"
