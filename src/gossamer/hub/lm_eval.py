"""lm-evaluation-harness on a live model. `lm-eval run` itself cannot see a model that it has not loaded."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any


def check_installed() -> None:
    """ValueError with the pip command if lm-eval is missing."""
    if find_spec("lm_eval") is None:
        raise ValueError("--tasks needs the package lm-eval; fix: pip install lm-eval")


def evaluate(model: Any, tokenizer: Any, tasks: Sequence[str], batch_size: int = 1, limit: int | None = None) -> Any:
    """{task: {metric: value}} of a transformers model, sparse layers and all; `limit` examples per task at most.

    ValueError if lm-eval is missing or does not know a task.
    """
    check_installed()
    from lm_eval import simple_evaluate  # type: ignore  # pyright takes lm_eval for this file
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    names = [t.strip() for t in tasks if t.strip()]
    if unknown := [t for t in names if t not in manager.all_tasks]:
        raise ValueError(f"lm-eval knows no task {', '.join(unknown)}; fix: lm-eval ls tasks")
    if not names:
        raise ValueError("no task named; fix: for example --tasks piqa,arc_easy")
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    results = simple_evaluate(model=wrapped, tasks=names, task_manager=manager, limit=limit)
    return {task: numbers(metrics) for task, metrics in (results or {})["results"].items()}


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """The metrics of one task without names and standard errors: {'acc,none': 0.5, ...} -> {'acc': 0.5, ...}."""
    kept = {k: v for k, v in metrics.items() if isinstance(v, int | float) and "_stderr" not in k and k != "sample_len"}
    return {k.removesuffix(",none"): float(v) for k, v in kept.items()}
