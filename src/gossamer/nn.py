"""SparseLinear: a linear layer that holds a format and calls the op."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from . import dispatch, formats, ops
from .formats import Format, Spec
from .ops import grad, is_compiling
from .stack import Stack

log = logging.getLogger("gossamer")

VALUES = ("weight", "scale", "right_weight")  # of a stored matrix, at most two of these

Calls = tuple[torch.dtype | None, Tensor | None, dispatch.Bound]  # of x, for this bias
Known = dict[torch.Size, tuple[Callable[[Tensor], Tensor], bool]]
Seen = tuple[Tensor | None, int | None, Tensor | None, int | None]
# The same past `nn.Module`: what is called for an x that was there before, of this dtype; the layer's parameters, and
# the bias as it was bound; hooks that must be none; up to two tensors and their versions; all calls, the stack's first.
Direct = tuple[Known, torch.dtype, dict, Tensor | None, dict, dict, *Seen, dispatch.Bound]
MAX_SHAPES = 64  # of x, that calls are known for
EDITED = "a prepared layer's tensors were edited and it runs as it is stored; fix: call gossamer.prepare(model) again"
MOVED = "a prepared layer moved to another device; fix: call gossamer.prepare(model) again"


class SparseLinear(nn.Module):
    """y = x A^T + bias with A [out_features, in_features] stored in any format.

    The stored tensors are parameters without gradient, named as `Format.tensors()` names them, and keep the dtype they
    are stored in: `.to(dtype)`, `.half()` and `.float()` move the bias only, the arithmetic follows x.
    A product may borrow its right factor from another SparseLinear (`lender`): one shared dictionary, stored once.
    `gossamer.prepare` puts the choices of kernels, and what they packed, beside the stored tensors; neither is saved.
    On a GPU what was packed takes their place (`released`): they are made again from it, bit for bit, whenever they are
    asked for, by `state_dict`, by name, or because the layer moves.
    """

    _direct: Direct | tuple[()] | None = None  # None: to be made; (): there is no such way

    def __init__(
        self,
        spec: Spec,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        lender: SparseLinear | None = None,
    ) -> None:
        """An empty layer of this spec, to load tensors into; `dtype` is the bias's."""
        super().__init__()
        self.out_features, self.in_features = spec["shape"]
        self.layout = self.stored_layout = dispatch.to_layout(spec)
        self._packed: tuple[Tensor, ...] = ()
        self._released = False
        self._calls: Calls | None = None
        self._stack: Stack | None = None
        self._place = 0
        self.watched: tuple[Tensor, Tensor] | None = None
        self.seen = 0
        self._number = ops.number(self)
        self._address = ops.to_address(self._number, self.out_features)
        self._names = tuple(formats.layout(spec))
        # In a tuple, so that the lender is not registered as a child and its tensors are saved once.
        self._lender: tuple[SparseLinear, ...] = () if lender is None else (lender,)
        for name, (shape, kind) in formats.layout(spec).items():
            if not self._borrows(name):
                self.register_parameter(name, _frozen(torch.empty(shape, dtype=kind, device=device)))
        held = _frozen(torch.empty(self.out_features, device=device, dtype=dtype)) if bias else None
        self.bias: nn.Parameter | None
        self.register_parameter("bias", held)

    @classmethod
    def from_format(cls, a: Format, bias: Tensor | None = None, lender: SparseLinear | None = None) -> Self:
        """A layer around `a`; with a `lender`, the right factor of `a` must be the lender's."""
        device = next(iter(a.tensors().values())).device
        layer = cls(a.spec(), device="meta", lender=lender)
        for name, tensor in a.tensors().items():
            if not layer._borrows(name):
                setattr(layer, name, _frozen(tensor.detach()))
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(device), requires_grad=False)
        return layer

    def _borrows(self, name: str) -> bool:
        return bool(self._lender) and name.startswith("right_")

    @property
    def spec(self) -> Spec:
        return dispatch.route(self.stored_layout).spec

    @property
    def device(self) -> torch.device:
        """Where the stored tensors lie."""
        return (self._packed if self._released else self.parts())[0].device

    @property
    def released(self) -> bool:
        """Are the stored tensors gone, and what was packed in their place?"""
        return self._released

    @property
    def stored_bytes(self) -> int:
        """Of the stored tensors, there or not, borrowed ones included."""
        found = formats.layout(self.spec).values()
        return sum(math.prod(shape) * kind.itemsize for shape, kind in found)

    @property
    def packed_bytes(self) -> int:
        """What the prepared kernels keep beside the stored tensors: dense copies, layouts of their own.

        Of a layer without its stored tensors, what it keeps beyond their size; it can be less than nothing.
        """
        packed = sum(t.numel() * t.element_size() for t in self._packed)
        return packed - self.stored_bytes if self._released else packed

    @property
    def prepared(self) -> bool:
        """Does the layer carry choices of kernels, made by `gossamer.prepare`?"""
        return self.layout != self.stored_layout

    @property
    def held_bytes(self) -> int:
        """All that the layer keeps but for its bias, borrowed tensors included."""
        return self.stored_bytes + self.packed_bytes

    def use(
        self, dtype: torch.dtype, ways: dispatch.Ways, packed: Sequence[Tensor], source: dispatch.Step | None = None
    ) -> None:
        """Take these choices for x of `dtype`; their steps count `packed` from the end of the stored tensors.

        With a `source`, a step whose operands hold the matrix exactly, the stored tensors go, and steps count from 0.
        """
        self.layout = dispatch.to_layout(self.spec, dtype, ways, source)
        self._packed, self._stack, self._calls = tuple(packed), None, None
        if source is not None:
            self._released, self._parameters = True, {"bias": self.bias}
        self._settle()

    def join(self, stack: Stack, place: int, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Run as part of a stack; `tensors` are the layer's own, if they lie in the stack's memory now."""
        self._stack, self._place, self._calls = stack, place, None
        tensors = tensors or {}
        for name, tensor in tensors.items():
            self._parameters[name] = _frozen(tensor)
        stack.members[place] = weakref.ref(self)
        self._settle()

    def _settle(self) -> None:
        """The choices are made: take note of what they were made for, and tell compiled graphs."""
        held = [] if self._released or not (self.prepared or self._stack) else self.parts()
        watched = [t for n, t in zip(self._names, held, strict=False) if n in VALUES and not t.is_inference()]
        if self._stack is not None and self.bias is not None and not self.bias.is_inference():
            watched.append(self.bias)
        # Two at most, and one number: this is asked before every product.
        self.watched = (watched[0], watched[-1]) if watched else None
        self.seen = watched[0]._version + watched[-1]._version if watched else 0
        shared = None if self._stack is None else self._stack.shared(self._place)
        self._address = ops.to_address(self._number, self.out_features, shared)

    @property
    def stack(self) -> Stack | None:
        """The stack that the layer runs in at decode sizes, if any."""
        return self._stack

    def unprepare(self) -> None:
        """Forget the choices and free what was packed for them; the stored tensors are there again."""
        if self._released:
            stored = {n: _frozen(t) for n, t in self.format.tensors().items()}
            self._released, self._parameters = False, stored | {"bias": self.bias}
        self.layout, self._packed, self._stack, self._calls = self.stored_layout, (), None, None
        self._settle()

    @property
    def format(self) -> Format:
        """What the layer holds now, as a format (shares the layer's tensors, unless they are `released`)."""
        if self._released:
            return formats.class_of(self.spec).encode(self.decode())
        return dispatch.route(self.stored_layout).assemble([p.detach() for p in self.parts()])

    def parts(self) -> list[Tensor]:
        """The stored tensors in the order of `Format.tensors()`, borrowed ones included."""
        if self._released:
            return [_frozen(t) for t in self.format.tensors().values()]
        # Not get_parameter, which splits dotted names: this runs on every call.
        own: Mapping[str, Any] = self._parameters
        if not self._lender:
            return [own[n] for n in self._names]  # type: ignore[misc]
        lent = self._lender[0]._parameters
        return [lent[n] if self._borrows(n) else own[n] for n in self._names]  # type: ignore[misc]

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """A, dense [out_features, in_features]."""
        if self._released:
            return dispatch.route(self.layout).assemble(self._packed).decode(dtype)
        return self.format.decode(dtype)

    @property
    def edited(self) -> bool:
        """Have stored values, or the bias of a stack, changed since the choices were made?

        Changes through `.data` leave no trace: call `unprepare` before these.
        """
        watched = self.watched
        return watched is not None and watched[0]._version + watched[1]._version != self.seen

    def start_over(self) -> None:
        """Run as what is stored now says."""
        log.warning(EDITED)
        self.unprepare()

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """`forward` between its hooks. Where nothing but the product is to be done, `nn.Module` is passed by.

        It takes as long as a small product, and a step of decoding makes hundreds of calls.
        """
        if is_compiling():  # the rest of `nn.Module.__call__`: what is read here is checked before every token
            return nn.Module._call_impl(self, x, *args, **kwargs)
        if (direct := self._direct) and type(x) is Tensor and not (grad() or args or kwargs):
            known, dtype, own, bias, hooks, pre_hooks, first, version, second, other, _ = direct
            if (
                (found := known.get(x.shape))
                and x.dtype == dtype
                and own["bias"] is bias
                and not (hooks or pre_hooks or _global_forward_hooks or _global_forward_pre_hooks)
                and (first is None or first._version == version)
                and (second is None or second._version == other)
                and (found[1] or ops.unobserved())
            ):
                return found[0](x)
        return super().__call__(x, *args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        if is_compiling():
            if ops.inference(x):
                return torch.ops.gossamer.part(x, self._address)
        elif (watched := self.watched) is not None and watched[0]._version + watched[1]._version != self.seen:
            self.start_over()  # as `edited` says, without the time of a call
        plain = ops.plain(x)
        if plain:
            self._remember(x)
        if (stack := self._stack) is not None and stack.takes(x):
            return stack.part(self._place, x)
        if plain:
            return self._run(x)
        return ops.linear(x, self._operands(), self.layout, self._parameters["bias"])

    def run(self, x: Tensor) -> Tensor:
        """The product without gradient, by the layer itself."""
        if self.edited:
            self.start_over()
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        # Past all that is the same in the hundreds of a step.
        if x.ndim and x.shape[-1] == self.in_features:
            dtype, bias, bound = self._calls or self._bind()
            if x.dtype == dtype and bias is self._parameters["bias"]:
                size = x.numel()
                for most, call, _ in bound:
                    if size <= most:
                        return call(x)
        return dispatch.route(self.layout).linear(x, self._operands(), self._parameters["bias"])

    def _operands(self) -> Sequence[Tensor]:
        return self._packed if self._released else (*self.parts(), *self._packed)

    def _bind(self) -> Calls:
        """The choices of kernels as functions of x, for as long as the layer stays as it is."""
        found, bias = dispatch.route(self.layout), self._parameters["bias"]
        bound = found.bind(self._operands(), bias) if self.in_features else []
        self._calls = found.dtype, bias, bound
        return self._calls

    def _remember(self, x: Tensor) -> None:
        """Let `__call__` know what it may call for an x of this shape."""
        if self._direct is None:
            self.__dict__["_direct"] = self._to_direct()
        if self._direct:
            known, dtype, *_, bound = self._direct
            found = next((calls[1:] for calls in bound if x.numel() <= calls[0]), None)
            if found and x.dtype == dtype and x.ndim and x.shape[-1] == self.in_features:
                if len(known) >= MAX_SHAPES:
                    known.clear()
                known[x.shape] = found

    def _to_direct(self) -> Direct | tuple[()]:
        """What `__call__` needs; nothing where a call is more than the product or the layer was not prepared."""
        dtype, bias, bound = self._calls or self._bind()
        if (stack := self._stack) is not None:
            bound = [(stack.most, partial(stack.part, self._place), False), *bound] if stack.dtype == dtype else []
        changed = "forward" in self.__dict__ or type(self).forward is not SparseLinear.forward
        if dtype is None or not bound or changed or self._compiled_call_impl is not None:
            return ()
        first, second = self.watched or (None, None)
        second = None if second is first else second
        versions = [None if t is None else t._version for t in (first, second)]
        hooks = self._forward_hooks, self._forward_pre_hooks
        return {}, dtype, self._parameters, bias, *hooks, first, versions[0], second, versions[1], bound

    def extra_repr(self) -> str:
        held = " x ".join(s["format"] for s in (self.spec.get("left"), self.spec.get("right")) if s)
        return f"{self.in_features}, {self.out_features}, {held or self.spec['format']}, bias={self.bias is not None}"

    def __getattr__(self, name: str) -> Any:
        held = self.__dict__
        if held.get("_released") and name in held["_names"]:
            return self.parts()[held["_names"].index(name)]
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        held = self.__dict__
        stored, stacked = name in held.get("_names", ()), held.get("_stack") is not None
        if stored or (name == "bias" and stacked):
            if stacked or held["_released"] or self.prepared:
                self.unprepare()  # what was packed belongs to the old tensors
            self._calls = None
            old = held["_parameters"].get(name)
            if old is not None and name.startswith("right_") and not old.is_inference():
                increment_version(old)  # for those that borrow it
        held["_direct"] = None
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        if self.edited:
            self.start_over()
        return self.__dict__ | {"_calls": None, "_direct": None, "watched": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._number = ops.number(self)
        if self._stack is not None:
            self._stack.members[self._place] = weakref.ref(self)
        self._settle()
        if self.prepared and not dispatch.route(self.layout).runs_on(self.device):
            self.unprepare()  # unpickled on another kind of device, or where another library packs otherwise

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self._released:
            stored = zip(self._names, self.parts(), strict=True)
            destination.update({prefix + n: p if keep_vars else p.detach() for n, p in stored})
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.unprepare()  # what was packed belongs to the old tensors
        super()._load_from_state_dict(*args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Moves to a device, never to a dtype: `fn` sees the stored tensors as bytes, which no cast touches.
        self._calls = None
        if self._released and fn(self._packed[0].new_empty(0, dtype=torch.uint8)).device != self.device:
            log.warning(MOVED)
            self.unprepare()
        bias, stored = self.bias, {n: p for n, p in self._parameters.items() if n != "bias" and p is not None}
        self._parameters = {"bias": bias}
        super()._apply(fn, recurse)
        self._parameters = {n: _moved(p, fn) for n, p in stored.items()} | self._parameters
        if self.prepared and any(p.device != self.get_parameter(n).device for n, p in stored.items()):
            log.warning(MOVED)
            self.unprepare()
        return self


def _moved(p: nn.Parameter, fn: Callable[[Tensor], Tensor]) -> nn.Parameter:
    moved = fn(p.detach().view(torch.uint8) if p.ndim else p.detach())
    return p if moved.device == p.device else _frozen(moved.view(p.dtype))


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    """Every SparseLinear of a model by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear)}


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Per sparse layer what a checkpoint's config needs: `spec`, `bias`, and `lender`, the name it borrows from."""
    layers = sparse_layers(model)
    names = {id(m): n for n, m in layers.items()}
    return {
        name: {"spec": m.spec, "bias": m.bias is not None} | ({"lender": names[id(m._lender[0])]} if m._lender else {})
        for name, m in layers.items()
    }


def swap(model: nn.Module, described: Mapping[str, Mapping[str, Any]], device: str | None = None) -> None:
    """Replace the named layers of `model` by empty SparseLinear ones, the inverse of `describe`."""
    for name, entry in sorted(described.items(), key=lambda item: "lender" in item[1]):
        old = model.get_submodule(name)
        lender = model.get_submodule(entry["lender"]) if "lender" in entry else None
        dtype = getattr(getattr(old, "bias", None), "dtype", None)
        new = SparseLinear(entry["spec"], entry["bias"], device=device, dtype=dtype, lender=lender)  # type: ignore[arg-type]
        model.set_submodule(name, new)
