"""Watching: whether tensors and states are what they were at the last step, at the least cost a tensor.

The host looks at every parameter and gradient in every step. One call of Python a tensor and question costs
50 ns, as much as reading an address: so a few lines of C look at all of them at once (``watching.c``), and changes
of states are counted.
"""

import functools
import logging
from array import array
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grass_kernels._triton import compile_c


class Watch(NamedTuple):
    """Two functions, in C or in Python."""

    describe: Callable[[list[Tensor]], Any]
    """What is to be compared of these parameters: which have gradients; address, dtype, device, shape and strides of
    those that have; and the same of the gradients, but for their addresses. It may raise RuntimeError where a tensor
    has no memory of its own, as a sparse one."""
    addresses_if_same: Callable[[list[Tensor], Any, bytes], bytes | None]
    """Addresses of the gradients that there are, 8 bytes each, if these parameters are as described; given those of
    before. None also for a negative view, looked for where an address has changed. RuntimeError as before."""


@functools.cache
def watch() -> Watch:
    """The functions in C, where they can be built and this version of torch has what they ask."""
    try:
        interface = torch.Tensor.__dlpack_c_exchange_api__
        compiled = compile_c("grass_watching", Path(__file__).with_suffix(".c").read_text())
        compiled.use(interface)
    except Exception as error:  # compilers and what calls them fail in many ways, and nothing depends on them
        logging.getLogger(__name__).info("steps cost the host more than they need: %s", error)
        return IN_PYTHON
    return Watch(compiled.describe, compiled.addresses_if_same)


def _describe(params: list[Tensor]) -> Any:
    return [p.grad is not None and (p.data_ptr(), _layout(p), type(p.grad), _layout(p.grad)) for p in params]


def _layout(t: Tensor) -> tuple[Any, ...]:
    return t.layout, t.dtype, t.device, t.shape, t.stride()


def _addresses_if_same(params: list[Tensor], description: Any, before: bytes) -> bytes | None:
    if _describe(params) != description:
        return None
    grads = [p.grad for p in params if p.grad is not None]
    addresses = array("q", map(Tensor.data_ptr, grads)).tobytes()
    old = array("q", before)
    for place, (address, grad) in enumerate(zip(array("q", addresses), grads, strict=True)):
        if address == 0 and grad.numel() > 0:
            raise RuntimeError("a tensor has no memory")
        if (place >= len(old) or address != old[place]) and grad.is_neg():
            return None
    return addresses


IN_PYTHON = Watch(_describe, _addresses_if_same)


class CountedStates(defaultdict[Tensor, dict[str, Any]]):
    """An optimizer's ``state`` that counts how often entries were put in, replaced or taken away.

    Attributes:
        changes: the count. What is inside of an entry is not counted.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.changes = 0

    def __reduce__(self) -> tuple[Any, ...]:
        """As a plain defaultdict: that is what files should hold."""
        return defaultdict, (self.default_factory,), None, None, iter(self.items())


def _counting(name: str) -> Any:
    method = getattr(defaultdict, name)

    def counted(self: CountedStates, *args: Any, **kwargs: Any) -> Any:
        self.changes += 1
        return method(self, *args, **kwargs)

    counted.__name__, counted.__doc__ = name, method.__doc__
    return counted


for _name in (
    "__setitem__", "__delitem__", "__missing__", "__ior__", "clear", "pop", "popitem", "setdefault", "update",
):  # fmt: skip
    setattr(CountedStates, _name, _counting(_name))


def entries_of(state: dict[Tensor, dict[str, Any]]) -> object:
    """What is equal at two times if no entry was put in, replaced or taken away between them."""
    if isinstance(state, CountedStates):
        return id(state), state.changes
    return list(map(id, state.values()))  # somebody has put in a dict of their own
