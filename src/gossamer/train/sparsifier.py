"""sparsify(): a model's 2:4 pre-training, stepped, measured, resumed and finalised."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..patterns import is_24
from .choose import Filter, chosen
from .measures import flips, three_zeros, virtual_mask
from .method import Method, State
from .products import Products
from .schedule import Schedule, schedule
from .sharding import finite, local, summed
from .sparse24 import Sparse24Linear, restore, swap


def sparsify(
    model: nn.Module,
    method: Method,
    *,
    steps: int | None = None,
    filter: Filter | None = None,
    dense_start: float = 0.0,
    products: Products | Literal["sparse"] | None = None,
    every: int = 100,
) -> Sparsifier:
    """Make the linear layers that `filter` names train 2:4, in place; all others stay as they are.

    Call it when the weights have their first values, the same on every rank (one seed, or loaded), before or after
    `fully_shard`, and before torch.compile. `steps`: the optimizer steps of the whole run, which a dense start or tail
    needs. `filter`: a pattern like "*.mlp.*", several, a function of (name, module), or None for the linear layers of
    feed-forward blocks. `products` computes the GEMMs in place of the method's dense ones; "sparse": on sparse tensor
    cores, each where it was measured faster. Measures are taken every `every` steps. ValueError names a layer that does
    not fit.
    """
    if every < 1:
        raise ValueError(f"every={every}; fix: 1 or more steps between measures")
    plan = schedule(method, steps, dense_start)
    found = chosen(model, filter, method)
    gemms = _sparse(method, products) if isinstance(products, str) else products or method.products()
    held = [swap(layer, name, method, gemms) for name, layer in found]
    return Sparsifier(held, method, plan, every)


class Sparsifier:
    """The 2:4 layers of one run: steps its schedule, decays, measures.

    `attach(optimizer)` does both steps by itself. Otherwise call `before_step` when the gradients are unscaled and
    clipped, right before optimizer.step(), and `after_step` right behind it.
    """

    def __init__(self, layers: list[Sparse24Linear], method: Method, plan: Schedule, every: int) -> None:
        self.layers, self.method, self.schedule, self.every = layers, method, plan, every
        self.step = 0
        self.pattern: Callable[[Tensor], Tensor] = virtual_mask  # whose flips are measured
        self._dying: Callable[..., Tensor] = _dying
        self._before: list[Tensor] | None = None  # masks of the step before a measure
        self._measured: dict[str, Any] = {}
        self._hooks: list[Any] = []
        self._enter(plan.dense(0))
        self._snapshot()

    @property
    def phase(self) -> Literal["dense", "sparse"]:
        return "dense" if self.schedule.dense(self.step) else "sparse"

    def attach(self, optimizer: torch.optim.Optimizer) -> Sparsifier:
        """Hook both steps to optimizer.step(); for loops that clip before they step, GradScaler included.

        Not for closures (LBFGS, Lightning), whose gradients come inside step().
        """
        if self._hooks:
            raise RuntimeError("an optimizer is attached already; fix: attach the one that steps last, once")
        self._hooks = [
            optimizer.register_step_pre_hook(lambda o, *_: self.before_step(o)),
            optimizer.register_step_post_hook(lambda *_: self.after_step()),
        ]
        return self

    def compile(self) -> Sparsifier:
        """Let torch.compile fuse what happens to the weights between steps: a pass for each, not dozens."""
        if self.pattern is virtual_mask:
            self.pattern = torch.compile(virtual_mask, dynamic=False)
        self._dying = torch.compile(_dying, dynamic=False)
        return self

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """The method's decay; `optimizer` gives the learning rates that decay on weights is multiplied with."""
        if not self.method.decay or self.phase == "dense":
            return
        rates = _learning_rates(optimizer, self.method)
        for layer in self._unique():
            weight = local(layer.weight)
            dying = self._dying(weight, self.method, layer.local_state())
            if self.method.decay_on == "weights":
                weight.sub_(dying * (_rate(rates, layer) * self.method.decay))  # a rate may be a tensor
            elif layer.weight.grad is not None:
                grad = local(layer.weight.grad)
                grad.add_(dying.to(grad.dtype), alpha=self.method.decay)

    @torch.no_grad()
    def after_step(self) -> None:
        """Counts the step; new masks, the next phase and measures when they are due."""
        was = self.phase
        self.step += 1
        if self.step % self.every == 0:
            self._measure()
        self._snapshot()
        if self.phase != was:
            self._enter(self.phase == "dense")
        elif self.phase == "sparse" and self.method.refresh and self._age % self.method.refresh == 0:
            for layer in self.layers:
                layer.renew()

    @property
    def _age(self) -> int:
        return self.step - self.schedule.begin

    def _enter(self, dense: bool) -> None:
        for layer in self.layers:
            layer.dense = dense
            if not dense:
                layer.renew()

    def _unique(self) -> Iterator[Sparse24Linear]:
        """The layers, one for each weight."""
        return iter({id(layer.weight): layer for layer in self.layers}.values())

    def measure_every(self, steps: int) -> None:
        """From now on."""
        self.every = steps
        self._snapshot()

    def _snapshot(self) -> None:
        due = (self.step + 1) % self.every == 0
        self._before = [self.pattern(local(layer.weight)) for layer in self._unique()] if due else None

    def _measure(self) -> None:
        """Kept on the device: no synchronisation until someone asks."""
        assert self._before is not None
        rows, layers = [], list(self._unique())
        for layer, before in zip(layers, self._before, strict=True):
            held = local(layer.weight)
            zeros = three_zeros(held if layer.dense else local(layer.projected()))
            broken = (~finite(held)).long()
            rows.append(summed(torch.stack([flips(before, self.pattern(held)), zeros, broken]), layer.weight))
        entries = sum(layer.weight.numel() for layer in layers)
        names = [layer.label for layer in layers]
        self._measured = {"step": self.step, "counts": torch.stack(rows), "entries": entries, "names": names}

    def metrics(self) -> dict[str, float]:
        """The newest measures: {"step", "flip_rate", "three_zeros"}; nothing before the first. Waits for the device.

        The flip rate is that of the two largest of four of the weights themselves between two steps in a row, for every
        method alike; `three_zeros` the share of groups of the multiplied weights with three zeros or more.
        FloatingPointError where a weight is not finite.
        """
        if not self._measured:
            return {}
        counts, entries = self._measured["counts"].cpu(), self._measured["entries"]
        self._refuse(self._measured["names"], counts[:, 2].tolist())
        return {
            "step": self._measured["step"],
            "flip_rate": int(counts[:, 0].sum()) / entries,
            "three_zeros": int(counts[:, 1].sum()) / (entries // 4),
        }

    def check_finite(self) -> None:
        """FloatingPointError naming the layers whose weights are not finite (a collective where they are sharded)."""
        layers = list(self._unique())
        broken = torch.stack([summed((~finite(layer.weight)).long(), layer.weight) for layer in layers])
        self._refuse([layer.label for layer in layers], broken.tolist())

    def _refuse(self, names: list[str], broken: list[int]) -> None:
        bad = [name for name, many in zip(names, broken, strict=True) if many]
        if bad:
            raise FloatingPointError(
                f"step {self.step}: {len(bad)} weights are not finite ({', '.join(bad[:3])}), as NaN gradients leave "
                "them; fix: resume from the last checkpoint with a lower learning rate, clip gradients, or use a "
                "GradScaler"
            )

    def _running(self) -> None:
        if not self.layers:
            raise RuntimeError("the run is finalized already; fix: take its state before, and finalize once")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides model, optimizer and generators; FloatingPointError on broken weights."""
        self._running()
        self.check_finite()
        kept = {layer.label: {n: t.clone() for n, t in layer.state().items()} for layer in self.layers}
        shapes = {layer.label: list(layer.weight.shape) for layer in self.layers}
        return {"version": 1, "step": self.step, "run": self._run(), "shapes": shapes, "layers": kept}

    def _run(self) -> dict[str, Any]:
        return {"method": {"name": self.method.name} | asdict(self.method), "schedule": asdict(self.schedule)}  # type: ignore[call-overload]

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Load the model's weights first. ValueError where it is of another run."""
        self._check_state(state)
        self.step = state["step"]
        self._enter(self.phase == "dense")
        for layer in self.layers:
            for name, tensor in layer.state().items():
                tensor.copy_(state["layers"][layer.label][name])
        self._measured = {}
        self._snapshot()

    def _check_state(self, state: dict[str, Any]) -> None:
        if state.get("version") != 1:
            raise ValueError(f"a state of version {state.get('version')}; fix: resume with the Gossamer that wrote it")
        if state["run"] != self._run():
            raise ValueError(
                f"the state is of {state['run']}, this run is {self._run()}; fix: resume with the same method and steps"
            )
        ours = {layer.label: list(layer.weight.shape) for layer in self.layers}
        if state["shapes"] != ours:
            odd = sorted(n for n in ours.keys() | state["shapes"].keys() if ours.get(n) != state["shapes"].get(n))
            raise ValueError(
                f"the state is of another model: {', '.join(odd[:3])} differ; fix: resume with the state "
                "that was saved beside these weights, and the same filter"
            )

    @torch.no_grad()
    def finalize(self, keep: Literal["sparse", "dense"] = "sparse") -> None:
        """End the run: nn.Linear again, holding exactly 2:4 weights with +0.0 for what is gone.

        RuntimeError where the method ends dense, unless `keep="dense"` asks for that model, or when called twice.
        """
        if keep not in ("sparse", "dense"):
            raise ValueError(f"keep={keep!r} is unknown; fix: sparse or dense")
        self._running()
        if keep == "sparse" and (self.schedule.ends_dense or self.phase == "dense" or self.method.name == "dense"):
            raise RuntimeError(
                f"a run of {self.method.name} that is dense now, or at its end, has no 2:4 model to keep, and pruning "
                'it would lose what the dense steps learned; fix: finalize(keep="dense"), or train with dense_tail=0'
            )
        self.check_finite()
        if keep == "sparse":
            for layer in self._unique():
                _settle(layer)
        for hook in self._hooks:
            hook.remove()
        for layer in self.layers:
            restore(layer)
        self.layers, self._hooks = [], []


def _sparse(method: Method, word: str) -> Products:
    from .sparse_products import SparseProducts  # brings cuSPARSELt's bindings

    dense = method.products()
    if word != "sparse":
        raise ValueError(f"products={word!r} is unknown; fix: sparse, a Products, or None for dense ones")
    if method.name == "dense":
        raise ValueError("the weights of Dense() are not 2:4, sparse products would prune them; fix: products=None")
    if type(dense) is not Products:
        raise ValueError(f"{method} multiplies as {type(dense).__name__} does; fix: products=None, or fp8=False")
    return SparseProducts(mvue=dense.mvue, tiles=method.tiles)


def _dying(weight: Tensor, method: Method, state: State) -> Tensor:
    """The weights that the mask hides, zeros for the others."""
    return weight * ~method.mask(weight, state)


def _settle(layer: Sparse24Linear) -> None:
    held = local(layer.weight)
    held.copy_(local(layer.projected()) + 0.0)  # -0.0 + 0.0 is +0.0
    if not is_24(held):
        raise RuntimeError(
            f"{layer.label}: {layer.method.name} projects to weights that are not 2:4; fix its project()"
        )


def _learning_rates(optimizer: torch.optim.Optimizer | None, method: Method) -> dict[int, Any]:
    if optimizer is None:
        if method.decay_on == "weights":
            raise ValueError("decay on weights needs learning rates; fix: before_step(optimizer), or attach(optimizer)")
        return {}
    return {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}


def _rate(rates: dict[int, Any], layer: Sparse24Linear) -> Any:
    if id(layer.weight) not in rates:
        raise ValueError(
            f"{layer.label}.weight is not in this optimizer, so its learning rate is unknown; fix: attach the one "
            "that holds it, made from the model's parameters after fully_shard"
        )
    return rates[id(layer.weight)]
