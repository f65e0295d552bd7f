"""An optimizer's ``state``, which counts its changes so that a step need not look at every entry.

Would catch: a way of changing it that is not counted; a count that finds its way into a file; a dict that somebody
puts in its place and that nobody watches.

Runs in both passes: with ``TRITON_INTERPRET=1`` steps go by plans, without it by the kernels' function.
"""

import copy
import io
import pickle
from collections import defaultdict

import pytest
import torch
from torch import Tensor, nn

import grass
from grass.optim.watching import CountedStates, entries_of


def square(seed: int) -> Tensor:
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))


MUTATIONS = {
    "set": lambda s: s.__setitem__(1, {"a": 2}),
    "set new": lambda s: s.__setitem__(3, {}),
    "missing": lambda s: s[4],
    "delete": lambda s: s.__delitem__(1),
    "pop": lambda s: s.pop(1),
    "popitem": lambda s: s.popitem(),
    "clear": lambda s: s.clear(),
    "update": lambda s: s.update({1: {}}),
    "in-place or": lambda s: s.__ior__({1: {}}),
    "setdefault": lambda s: s.setdefault(9, {}),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("kind", [CountedStates, defaultdict])
def test_every_change_of_entries_is_seen(mutation, kind):
    state = kind(dict, {1: {"a": 1}, 2: {}})
    before = entries_of(state)
    assert entries_of(state) == before
    kept = list(state.values())  # else a new dict may take an old one's id
    MUTATIONS[mutation](state)
    assert entries_of(state) != before
    del kept


def test_every_method_that_changes_a_dict_is_counted():
    """A later Python may bring another one."""
    reading = {
        "__class_getitem__", "__contains__", "__eq__", "__ge__", "__getitem__", "__gt__", "__iter__", "__le__",
        "__len__", "__lt__", "__ne__", "__or__", "__repr__", "__reversed__", "__ror__", "__sizeof__", "copy",
        "fromkeys", "get", "items", "keys", "values", "__getattribute__", "__init__", "__new__", "__doc__",
        "__hash__", "__copy__", "__reduce__", "default_factory",
    }  # fmt: skip
    mutating = {name for kind in (dict, defaultdict) for name in vars(kind)} - reading
    assert mutating <= set(vars(CountedStates))


def test_copies_and_files_hold_a_plain_dict():
    p = nn.Parameter(square(0))
    optimizer = grass.AdamW([p])
    p.grad = square(1)
    optimizer.step()
    assert isinstance(optimizer.state, CountedStates)
    assert type(pickle.loads(pickle.dumps(CountedStates(dict, {1: {"a": 2}})))) is defaultdict
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=True)
    torch.testing.assert_close(again["state"][0]["exp_avg"], optimizer.state[p]["exp_avg"])
    twin = copy.deepcopy(optimizer)
    assert isinstance(twin.state, CountedStates)
    (held,) = twin.state.values()
    torch.testing.assert_close(held["exp_avg_sq"], optimizer.state[p]["exp_avg_sq"])


def test_a_state_put_in_by_assignment_is_watched_too():
    """As accelerate's wrapper does: the dict that was given goes on to be the optimizer's."""
    p, q = nn.Parameter(square(0)), nn.Parameter(square(0))
    ours = grass.AdamW([p], lr=0.1)
    theirs = torch.optim.AdamW([q], lr=0.1, foreach=False)
    for step in range(5):
        for t, optimizer in ((p, ours), (q, theirs)):
            if step == 1:
                optimizer.state = defaultdict(dict, optimizer.state)
            given, kept = optimizer.state, dict(optimizer.state)  # kept: moments alive, where a plan has them
            if step == 3:
                given.clear()
            t.grad = square(10 + step)
            optimizer.step()
            assert optimizer.state is given
            del kept
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
