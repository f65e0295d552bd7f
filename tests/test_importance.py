"""Failures these tests catch: norms without the layer's size, the root of a mean of squares instead of a
mean of roots, frozen steps counted into a window, a window that is not emptied, no moving average or one
over layers that were not seen, a NaN or a skipped step in the importance, micro-batch values of a probe
left on another scale than the windows after it, sums that a checkpoint forgets.
"""

import io
import math

import pytest
import torch
from torch import Tensor

from grass.importance import MeanGradientNorm

CPU = torch.device("cpu")
SIZES = [4, 100, 25]
ALL = torch.tensor([True, True, True])


def observe(mgn: MeanGradientNorm, steps: list[list[float]], observed: Tensor = ALL) -> None:
    for sq_norms in steps:
        mgn.observe(torch.tensor(sq_norms), observed)


def mean_rms(steps: list[list[float]], layer: int) -> float:
    return sum(math.sqrt(step[layer] / SIZES[layer]) for step in steps) / len(steps)


STEPS = [[1.0, 2.0, 3.0], [9.0, 0.5, 0.0], [0.25, 7.0, 1e-8]]


def test_the_probe_gives_the_mean_of_root_mean_square_gradients() -> None:
    mgn = MeanGradientNorm(SIZES, 0.5, CPU)
    assert mgn.importance.tolist() == [0, 0, 0]
    observe(mgn, STEPS)
    assert mgn.importance.tolist() == [0, 0, 0], "nothing changes before a refresh"
    mgn.refresh(probe=True)
    wanted = torch.tensor([mean_rms(STEPS, layer) for layer in range(3)])
    torch.testing.assert_close(mgn.importance, wanted, rtol=1e-6, atol=0)
    assert mgn.importance.dtype == torch.float32
    assert mgn.num_refreshes == 1


@pytest.mark.parametrize("ema", [0.25, 1.0])
def test_windows_move_what_was_seen_and_keep_what_was_not(ema: float) -> None:
    mgn = MeanGradientNorm(SIZES, ema, CPU)
    observe(mgn, STEPS)
    mgn.refresh(probe=True)
    before = mgn.importance.tolist()
    observe(mgn, STEPS[:2], torch.tensor([True, False, True]))
    observe(mgn, STEPS[2:], torch.tensor([True, False, False]))
    mgn.refresh(probe=False)
    window = [mean_rms(STEPS, 0), None, mean_rms(STEPS[:2], 2)]  # the mean is over the steps observed
    wanted = [
        old if new is None else ema * new + (1 - ema) * old for old, new in zip(before, window, strict=True)
    ]
    torch.testing.assert_close(mgn.importance, torch.tensor(wanted), rtol=1e-6, atol=0)
    assert mgn.importance[1] == before[1]


def test_a_window_is_empty_after_it_closed() -> None:
    mgn = MeanGradientNorm(SIZES, 1.0, CPU)
    observe(mgn, [[1e4, 1e4, 1e4]] * 5)
    mgn.refresh(probe=True)
    observe(mgn, STEPS[:1])
    mgn.refresh(probe=False)
    wanted = torch.tensor([mean_rms(STEPS[:1], layer) for layer in range(3)])
    torch.testing.assert_close(mgn.importance, wanted, rtol=1e-6, atol=0)
    before = mgn.importance
    mgn.refresh(probe=False)  # nothing observed: nothing moves
    assert torch.equal(mgn.importance, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_counted_and_left_out(bad: float) -> None:
    mgn = MeanGradientNorm(SIZES, 1.0, CPU)
    observe(mgn, [[bad, 2.0, 3.0], *STEPS[1:]])
    mgn.refresh(probe=True)
    wanted = [mean_rms(STEPS[1:], 0), mean_rms([[0, 2.0, 3.0], *STEPS[1:]], 1), mean_rms(STEPS, 2)]
    torch.testing.assert_close(mgn.importance, torch.tensor(wanted), rtol=1e-6, atol=0)
    assert mgn.nonfinite_norms == 1
    observe(mgn, [[bad, bad, 1.0]], torch.tensor([True, False, True]))
    assert mgn.nonfinite_norms == 2, "a layer that was not observed cannot be counted"


def test_a_layer_without_one_finite_norm_gets_the_mean_of_the_others() -> None:
    mgn = MeanGradientNorm(SIZES, 0.5, CPU)
    observe(mgn, [[math.nan, 1.0, 1.0]])
    mgn.refresh(probe=True)
    assert mgn.importance[0].item() == pytest.approx((0.1 + 0.2) / 2)
    nothing = MeanGradientNorm(SIZES, 0.5, CPU)
    observe(nothing, [[math.nan] * 3])
    nothing.refresh(probe=True)
    assert nothing.importance.tolist() == [0, 0, 0]


def test_a_step_that_a_scaler_skipped_is_not_observed() -> None:
    mgn = MeanGradientNorm(SIZES, 1.0, CPU)
    mgn.observe(torch.tensor(STEPS[0]), ALL, skipped=torch.tensor(0.0))
    mgn.observe(torch.tensor([5e5, 5e5, math.inf]), ALL, skipped=torch.tensor(1.0))
    mgn.refresh(probe=True)
    wanted = torch.tensor([mean_rms(STEPS[:1], layer) for layer in range(3)])
    torch.testing.assert_close(mgn.importance, wanted, rtol=1e-6, atol=0)


def probed_by_micro_batches() -> MeanGradientNorm:
    mgn = MeanGradientNorm(SIZES, 0.5, CPU)
    mgn.accumulated = True
    observe(mgn, [[4.0, 100.0, 25.0]])  # importance 1 everywhere
    mgn.refresh(probe=True)
    return mgn


def test_after_an_accumulating_probe_unsampled_layers_come_to_the_scale_of_windows() -> None:
    mgn = probed_by_micro_batches()
    observe(mgn, [[4 * 0.16, 0.0, 25 * 0.64]], torch.tensor([True, False, True]))  # 0.4 and 0.8
    mgn.refresh(probe=False)
    torch.testing.assert_close(mgn.importance, torch.tensor([0.7, 0.6, 0.9]))  # (0.4 + 0.8) / 2 of 1
    observe(mgn, [[4.0, 0.0, 0.0]], torch.tensor([True, False, False]))
    mgn.refresh(probe=False)
    assert mgn.importance[1].item() == pytest.approx(0.6), "the correction comes once"


def test_the_correction_waits_for_a_window_that_shows_something() -> None:
    mgn = probed_by_micro_batches()
    mgn.refresh(probe=False)
    assert mgn.importance.tolist() == [1, 1, 1]
    observe(mgn, [[4 * 0.25, 0.0, 0.0]], torch.tensor([True, False, False]))
    mgn.refresh(probe=False)
    assert mgn.importance.tolist() == [0.75, 0.5, 0.5]


def test_without_accumulation_nothing_is_corrected() -> None:
    mgn = MeanGradientNorm(SIZES, 0.5, CPU)
    observe(mgn, [[4.0, 100.0, 25.0]])
    mgn.refresh(probe=True)
    observe(mgn, [[1.0, 0.0, 0.0]], torch.tensor([True, False, False]))
    mgn.refresh(probe=False)
    assert mgn.importance.tolist() == [0.75, 1, 1]


def test_a_layer_without_parameters_divides_by_one() -> None:
    mgn = MeanGradientNorm([0, 4], 0.5, CPU)
    mgn.observe(torch.tensor([0.0, 4.0]), torch.tensor([False, True]))
    mgn.refresh(probe=True)
    assert torch.isfinite(mgn.importance).all()


@pytest.mark.parametrize("stop", range(4))
def test_a_saved_window_continues_exactly(stop: int) -> None:
    def prepared() -> MeanGradientNorm:
        mgn = probed_by_micro_batches()
        observe(mgn, [[1.0, math.nan, 2.0]])
        return mgn

    whole, first, resumed = prepared(), prepared(), MeanGradientNorm(SIZES, 0.5, CPU)
    seen = torch.tensor([True, False, True])
    observe(whole, STEPS, seen)
    observe(first, STEPS[:stop], seen)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    observe(resumed, STEPS[stop:], seen)
    assert resumed.nonfinite_norms == whole.nonfinite_norms == 1
    for mgn in (whole, resumed):
        mgn.refresh(probe=False)
    assert torch.equal(resumed.importance, whole.importance)
    assert resumed.num_refreshes == whole.num_refreshes == 2


def test_a_saved_state_is_a_copy() -> None:
    mgn = MeanGradientNorm(SIZES, 0.5, CPU)
    observe(mgn, STEPS)
    state = mgn.state_dict()
    window = state["window_sum"].clone()
    observe(mgn, STEPS)
    mgn.refresh(probe=True)
    assert torch.equal(state["window_sum"], window)
    other = MeanGradientNorm(SIZES, 0.5, CPU)
    other.load_state_dict(state)
    other.refresh(probe=True)
    assert torch.equal(state["window_sum"], window)
    assert state["importance"].tolist() == [0, 0, 0]
