"""Mean gradient norm: the importance of a layer, measured on the device.

    m_l = (1/T) sum_t sqrt(||g_t^(l)||^2 / N_l)

``g_t^(l)`` is the gradient of layer l in step t and ``N_l`` the number of its elements: the root-mean-square
gradient, averaged over those steps of a window in which the layer had gradients. `MeanGradientNorm.observe` runs a
few operations on tensors of L elements, without device sync; `MeanGradientNorm.refresh` copies L sums to the host.

Source: paper, "mean gradient norm" and "adaptation". Additions of this library: norms that are not finite are
counted and left out, and the correction for gradient accumulation (see `MeanGradientNorm.refresh`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class MeanGradientNorm:
    """Mean of the root-mean-square gradient of each layer over a window, with a moving average over windows.

    Args:
        num_params: N_l, number of elements of each layer that can have a gradient; 0 if there are none.
        ema: alpha, weight of the newest window in the moving average.
        device: device on which gradient norms are computed.

    Attributes:
        importance: float32 [L] on the CPU, as of the last refresh.
        num_refreshes: number of windows closed so far.
        accumulated: True if a step of the probe had several backward passes; its norms are then per micro-batch.
    """

    def __init__(self, num_params: Sequence[int], ema: float, device: torch.device) -> None:
        self.ema = ema
        self.importance = torch.zeros(len(num_params), device="cpu")
        self.num_refreshes = 0
        self.accumulated = False
        self.set_num_params(num_params, device)
        self._sum = torch.zeros_like(self._num_params)  # of root-mean-square gradients
        self._count = torch.zeros_like(self._num_params)  # of finite observations
        self._nonfinite = torch.zeros((), device=device)

    def set_num_params(self, num_params: Sequence[int], device: torch.device) -> None:
        """Replace N_l."""
        counts = [max(1, n) for n in num_params]
        self._num_params = torch.tensor(counts, dtype=torch.float32, device=device)

    @property
    def device(self) -> torch.device:
        """Device of the sums of the current window."""
        return self._sum.device

    @property
    def nonfinite_norms(self) -> int:
        """Number of norms that were NaN or inf and were left out. Reading it is a device sync."""
        return int(self._nonfinite.item())

    def observe(self, sq_norms: Tensor, observed: Tensor, skipped: Tensor | None = None) -> None:
        """Add the norms of one step to the window.

        Args:
            sq_norms: float32 [L], squared norms of the gradients.
            observed: bool [L], True for layers that had gradients.
            skipped: scalar tensor, nonzero if the step was skipped (a GradScaler found an overflow).
        """
        if sq_norms.device != self._sum.device:  # the model was moved after construction
            self._num_params, self._sum, self._count, self._nonfinite = (
                t.to(sq_norms.device) for t in (self._num_params, self._sum, self._count, self._nonfinite)
            )
        rms = (sq_norms / self._num_params).sqrt()
        finite = torch.isfinite(rms)
        counted = finite & observed
        if skipped is not None:
            counted = counted & (skipped == 0).to(counted.device)
        self._sum += torch.where(counted, rms, 0.0)
        self._count += counted
        self._nonfinite += (observed & ~finite).sum()

    def refresh(self, *, probe: bool) -> None:
        """Close the window: copy its sums to the host and update the moving average.

        With gradient accumulation, the probe measures the gradients of single micro-batches, whose norms are on
        another scale than those of the accumulated gradient. The first window after such a probe therefore
        multiplies the importance of layers that it has not observed by the mean ratio window / probe of those
        that it has.

        Args:
            probe: True if the window is the probe, whose means become the importance directly.
        """
        total, count = torch.stack([self._sum, self._count]).cpu()
        observed = count > 0
        mean = total / count.clamp_min(1)
        if probe:
            # A layer without a finite norm gets the mean over the other layers.
            default = mean[observed].mean() if observed.any() else 0.0
            self.importance = torch.where(observed, mean, default)
        else:
            before = self.importance
            self.importance = torch.where(observed, self.ema * mean + (1 - self.ema) * before, before)
            if self.accumulated:
                comparable = observed & (before > 0)
                if comparable.any():
                    ratio = (mean[comparable] / before[comparable]).mean()
                    self.importance = torch.where(observed, self.importance, before * ratio)
                    self.accumulated = False
        self._sum.zero_()
        self._count.zero_()
        self.num_refreshes += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a dict of tensors and numbers."""
        return {
            "importance": self.importance.clone(),
            "num_refreshes": self.num_refreshes,
            "accumulated": int(self.accumulated),
            "window_sum": self._sum.clone(),
            "window_count": self._count.clone(),
            "nonfinite": self._nonfinite.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state returned by `state_dict`."""
        self.importance = state["importance"].detach().cpu().float().clone()
        self.num_refreshes = int(state["num_refreshes"])
        self.accumulated = bool(state["accumulated"])
        self._sum.copy_(state["window_sum"])
        self._count.copy_(state["window_count"])
        self._nonfinite.copy_(state["nonfinite"])
