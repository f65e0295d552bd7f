"""MeanGradientNorm: the importance of a layer, measured on the device, read at a refresh.

    m_l = (1/T) sum_t sqrt(||g_t^(l)||^2 / N_l)

``g_t^(l)`` are all gradients of layer l that step t consumed, ``N_l`` how many elements they have: the
root-mean-square gradient, averaged over the steps of a window in which the layer was observed.
Observing is a few operations on tensors of L elements and never waits for the device; `refresh` copies
L sums to the host, once.

Source: paper, "mean gradient norm" and "adaptation". Ours: a norm that is not finite is counted and left
out, and the correction for accumulation (see `refresh`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class MeanGradientNorm:
    """Windowed mean of root-mean-square gradients by layer, with a moving average over windows.

    Args:
        num_params: N_l, elements whose gradients count for each layer; 0 where nothing can be observed.
        ema: alpha, the newest window's share.
        device: where gradients' norms are computed.

    Attributes:
        importance: float32 [L] on the CPU, as last refreshed.
        num_refreshes: windows closed so far.
        accumulated: the probe saw more than one backward in a step, so its values are per micro-batch.
    """

    def __init__(self, num_params: Sequence[int], ema: float, device: torch.device) -> None:
        self.ema = ema
        self.importance = torch.zeros(len(num_params))
        self.num_refreshes = 0
        self.accumulated = False
        self.count(num_params, device)
        self._sum = torch.zeros_like(self._num_params)  # of root-mean-square gradients
        self._count = torch.zeros_like(self._num_params)  # of finite observations
        self._nonfinite = torch.zeros((), device=device)

    def count(self, num_params: Sequence[int], device: torch.device) -> None:
        """Take N_l anew."""
        counts = torch.tensor([max(1, n) for n in num_params], dtype=torch.float32)
        self._num_params = counts.to(device)

    @property
    def device(self) -> torch.device:
        """Where the window's sums are."""
        return self._sum.device

    @property
    def nonfinite_norms(self) -> int:
        """How many norms were NaN or inf and left out. Waits for the device."""
        return int(self._nonfinite.item())

    def observe(self, sq_norms: Tensor, observed: Tensor, skipped: Tensor | None = None) -> None:
        """Add one step's norms to the window.

        Args:
            sq_norms: float32 [L], squared norms of the gradients the step consumed.
            observed: bool [L], the layers that had gradients.
            skipped: device scalar, not zero if the step was skipped (a GradScaler found an overflow).
        """
        if sq_norms.device != self._sum.device:  # the model has been moved since construction
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
        """Close the window: one copy to the host, then the moving average.

        Args:
            probe: the window is the probe; its means become the importance as they are.

        A probe under gradient accumulation measures single micro-batches, whose norms are not on the scale
        of the accumulated gradient. So the first window after it multiplies the layers it has not sampled
        by the mean ratio window / probe of those it has.
        """
        total, count = torch.stack([self._sum, self._count]).cpu()
        seen = count > 0
        mean = total / count.clamp_min(1)
        if probe:
            # A layer without one finite norm is given what the others have on average.
            fallback = mean[seen].mean() if seen.any() else torch.tensor(0.0)
            self.importance = torch.where(seen, mean, fallback)
        else:
            before = self.importance
            self.importance = torch.where(seen, self.ema * mean + (1 - self.ema) * before, before)
            if self.accumulated:
                comparable = seen & (before > 0)
                if comparable.any():
                    ratio = (mean[comparable] / before[comparable]).mean()
                    self.importance = torch.where(seen, self.importance, before * ratio)
                    self.accumulated = False
        self._sum.zero_()
        self._count.zero_()
        self.num_refreshes += 1

    def state_dict(self) -> dict[str, Any]:
        """All that changes, as plain tensors and numbers."""
        return {
            "importance": self.importance.clone(),
            "num_refreshes": self.num_refreshes,
            "accumulated": int(self.accumulated),
            "window_sum": self._sum.clone(),
            "window_count": self._count.clone(),
            "nonfinite": self._nonfinite.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        self.importance = state["importance"].detach().cpu().float().clone()
        self.num_refreshes = int(state["num_refreshes"])
        self.accumulated = bool(state["accumulated"])
        self._sum.copy_(state["window_sum"])
        self._count.copy_(state["window_count"])
        self._nonfinite.copy_(state["nonfinite"])
