"""Watching: whether tensors and states are what they were at the last step, at the least cost a tensor.

The host looks at every parameter and gradient in every step. One call of Python a tensor and question costs
50 ns, as much as the addresses themselves: so layouts are compared by one call for all tensors, and states by a count.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import Tensor

try:  # what compiled functions compare their inputs with; not public
    from torch._C._dynamo import guards as torch_guards
except ImportError:
    torch_guards = None  # type: ignore[assignment]


class Layouts:
    """Dtype, device, shape, strides and sign of tensors, to be compared with others'.

    Args:
        tensors: strided; none of them is kept.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._guards: Any = None
        self._seen: list[Any] = []
        try:
            self._guards = torch_guards.TensorGuards(
                *tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None
            )
        except (AttributeError, TypeError):  # this version of torch has none, or takes something else
            self._seen = _look(tensors)

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these tensors have the same, one by one. It may say no if another mode of autograd is on."""
        if self._guards is None:
            return self._seen == _look(tensors)
        return bool(self._guards.check(*tensors))


def _look(tensors: Sequence[Tensor]) -> list[Any]:
    return [(t.dtype, t.device, t.shape, t.stride(), t.is_neg()) for t in tensors]


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
