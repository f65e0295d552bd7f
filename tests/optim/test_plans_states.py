"""What happens to states between two steps, and must be noticed.

Would catch: a plan that goes on with the address of a state that was moved, replaced, dropped or loaded; a state put in
by hand that is read as another dtype, or beyond its end; memory that a plan keeps alive.

Runs in both passes: with ``TRITON_INTERPRET=1`` steps go by plans, without it by the kernels' function.
"""

import copy
import gc

import pytest
import torch

from grass_kernels import _triton
from tests.support.pair import (
    BF16,
    F32,
    NOTICED_IF_DROPPED,
    STATE_EVENTS,
    Pair,
)


@pytest.mark.parametrize("keep", [False, True], ids=["the old one dropped", "the old one kept"])
@pytest.mark.parametrize("event", STATE_EVENTS)
def test_states_changed_by_hand(event, keep):
    """Also where the old tensors live on, in somebody's variable, with the addresses a plan has of them."""
    if keep and event in NOTICED_IF_DROPPED:
        pytest.skip(
            "known: a single entry, replaced while the old one is kept, is noticed of the first parameter only"
        )
    pair = Pair()
    pair.go(2)
    kept = [t for state in pair.ours.state.values() for t in state.values()] if keep else []
    dicts = list(pair.ours.state.values()) if keep else []
    pair.both(event)
    gc.collect()
    pair.go(2)
    del kept, dicts


def test_memory_of_dropped_states_is_freed():
    """A plan keeps addresses: it does not keep what the user has let go."""
    import weakref

    pair = Pair()
    pair.go(2)
    watched = [weakref.ref(t) for state in pair.ours.state.values() for t in state.values()]
    pair.ours.state.clear()
    gc.collect()
    assert not any(ref() is not None for ref in watched)


BY_HAND = {
    "one moment in bf16": ("exp_avg_sq", lambda t: t.to(BF16)),
    "first moment in bf16": ("exp_avg", lambda t: t.to(BF16)),
    "float64 moment": ("exp_avg", lambda t: t.double()),
    "integer counter": ("step", lambda t: t.long()),
    "float64 counter": ("step", lambda t: t.double()),
    "counter of shape (1,)": ("step", lambda t: t.reshape(1)),
    "short moment": ("exp_avg", lambda t: t.flatten()[:2].clone()),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_a_state_of_another_dtype_or_shape(case):
    """Either taken for what it is or refused; never read as what it is not, and never beyond its end.

    The arrangement is asked, not run: read as float32, a bfloat16 moment ends in the middle.
    """
    pair = Pair()
    pair.go(1)
    key, convert = BY_HAND[case]
    state = pair.ours.state[pair.params[0]]
    state[key] = convert(state[key])
    pair.set_grads()
    before = [p.detach().clone() for p in pair.params]
    counters = [pair.ours.state[p]["step"].clone() for p in pair.params]
    launched = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_triton, "launch", lambda *args, **kwargs: launched.append(args))
        try:
            pair.ours.step()
        except (ValueError, RuntimeError, TypeError):
            assert not launched, "refused in the middle of a step"
            torch.testing.assert_close([p.detach() for p in pair.params], before, rtol=0, atol=0)
            left = [pair.ours.state[p]["step"] for p in pair.params]
            torch.testing.assert_close(left, counters, rtol=0, atol=0)
            return
    if launched:  # by a plan, which reads float32 counters, and both moments as the first
        state = pair.ours.state[pair.params[0]]
        assert state["step"].dtype == F32
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype
        assert state["exp_avg"].dtype in (F32, BF16)
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == pair.params[0].shape


def test_load_state_dict_between_steps():
    pair = Pair()
    pair.go(2)
    saved = copy.deepcopy(pair.ours.state_dict()), copy.deepcopy(pair.torchs.state_dict())
    pair.go(2)
    pair.ours.load_state_dict(saved[0])
    pair.torchs.load_state_dict(saved[1])
    pair.go(2)
