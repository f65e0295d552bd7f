"""Would catch: a copy or a pickle of an optimizer inside a step that did not end, which says nothing of it, says it
twice, or goes on otherwise than its original.
"""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from tests.support import tiny
from tests.support.fused import MODES, STEPS, compare, stack, torn

pytestmark = pytest.mark.plain_only(reason="not about kernels, and slow in the interpreter")


def pickled(both: Any) -> Any:
    return pickle.loads(pickle.dumps(both))


WAYS = pytest.mark.parametrize("way", [copy.deepcopy, pickled])


@WAYS
@pytest.mark.parametrize("offload", MODES)
def test_a_copy_of_a_torn_step_warns(offload: str, way: Callable) -> None:
    model, opt = torn(offload)
    layers = opt.torn_layers
    assert layers
    with pytest.warns(UserWarning, match="inside a step that did not end") as caught:
        twin, other = way((model, opt))
    assert len(caught) == 1
    assert f"layers {list(layers)} are one update ahead" in str(caught[0].message)
    assert opt.torn_layers == layers, "the original is as torn as it was"
    assert other.torn_layers == ()
    opt.zero_grad()
    other.zero_grad()
    tiny.train(model, opt, 4, STEPS)
    tiny.train(twin, other, 4, STEPS)
    compare(model, opt, twin, other)


@WAYS
def test_a_copy_of_a_whole_step_does_not(way: Callable) -> None:
    model, opt = stack()
    tiny.train(model, opt, 1, 4)
    way((model, opt))  # warnings are errors
    opt.zero_grad()
    model, opt = torn()
    opt.step()
    opt.zero_grad()
    way((model, opt))
