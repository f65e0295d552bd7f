"""MethodView: what can be read from the optimizer about the method. It changes nothing."""

from torch import Tensor

from grass.config import GrassConfig
from grass.layer_scheduler import LayerScheduler
from grass.layers import LayerMap
from grass.optim.fused_backward import FusedBackward
from grass.optim.offloading import Offloading, TransferStats


class MethodView:
    """Read-only attributes of `GrassAdamW`."""

    _config: GrassConfig
    _layers: LayerMap
    _scheduler: LayerScheduler
    _fused: FusedBackward | None
    _offloading: Offloading | None
    _sq_norms: Tensor | None  # float32 [L + 1] on the device, of the last step

    @property
    def config(self) -> GrassConfig:
        """Settings of the method."""
        return self._config

    @property
    def layers(self) -> LayerMap:
        """Which parameters form which layer."""
        return self._layers

    @property
    def phase(self) -> str:
        """``"probe"`` or ``"adapt"``: of the step about to be taken."""
        return self._scheduler.schedule.phase

    @property
    def active_layers(self) -> tuple[int, ...]:
        """Layers the step about to be taken trains; () while probing."""
        return self._scheduler.active

    @property
    def next_active_layers(self) -> tuple[int, ...] | None:
        """Layers of the next period; None until they are drawn."""
        return self._scheduler.next_active

    @property
    def importance(self) -> Tensor:
        """float32 [L]: the mean gradient norm as last refreshed, what the sampler uses."""
        return self._scheduler.importance.importance.clone()

    @property
    def probabilities(self) -> Tensor:
        """float32 [L], sums to 1: what the sampler draws with."""
        return self._scheduler.sampler.probabilities.float()

    @property
    def step_count(self) -> int:
        """Steps taken, probe included."""
        return self._scheduler.schedule.step_count

    @property
    def num_draws(self) -> int:
        """Sets drawn so far."""
        return self._scheduler.sampler.num_draws

    @property
    def num_refreshes(self) -> int:
        """How often the importance has been refreshed."""
        return self._scheduler.importance.num_refreshes

    @property
    def draw_counts(self) -> list[int]:
        """For each layer, in how many sets it has been drawn."""
        return list(self._scheduler.draw_counts)

    @property
    def nonfinite_norms(self) -> int:
        """Norms that were NaN or inf and never entered the importance. Waits for the device."""
        return self._scheduler.importance.nonfinite_norms

    @property
    def layer_grad_norms(self) -> Tensor | None:
        """float32 [L] on the device: each layer's gradient norm in the last step, 0 for frozen layers."""
        return None if self._sq_norms is None else self._sq_norms[:-1].sqrt()

    @property
    def grad_norm(self) -> Tensor | None:
        """float32 scalar on the device: norm of all gradients of the last step."""
        return None if self._sq_norms is None else self._sq_norms.sum().sqrt()

    @property
    def transfer_stats(self) -> TransferStats:
        """Bytes moved to and from the device since construction, and held in the store and for it on the device."""
        return TransferStats(0, 0, 0, 0) if self._offloading is None else self._offloading.stats

    @property
    def torn_layers(self) -> tuple[int, ...]:
        """With ``fused_backward``: layers updated in a step that has not ended (L stands for what is in no layer).

        Inside and after backward that is as it should be, until `step`. After a backward that failed, these are
        one update ahead; each one's weights, moments and counters agree, and everything can be saved.
        """
        return (
            ()
            if self._fused is None
            else tuple(dict.fromkeys(min(home, len(self._layers)) for home in self._fused.done))
        )
