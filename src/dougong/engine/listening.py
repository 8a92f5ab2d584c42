"""All that listens within a training, in the order that it must.

Here        Listening: of any network and optimizer, whoever trains them.
Elsewhere   what flows through a network (flow/); whether inputs belong to their targets (examine.py); how much of a
            gradient is chance (noise.py); what comes of it (watch/diagnose/).
Promise     no number of training is changed. A training that is gone on with is not asked about its first records.
"""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from dougong.core.events import Event
from dougong.engine.examine import Examined, Examiner
from dougong.engine.flow.meter import FlowConfig, FlowMeter
from dougong.engine.flow.step import FlowMeasured
from dougong.engine.noise import NoiseMeter
from dougong.engine.step import TermsOf


class Listening:
    """Call `step` after each optimizer step, `close` at the end."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        config: FlowConfig | None = None,
        *,
        steps: int = 0,
        terms_of: TermsOf | None = None,
    ) -> None:
        """`steps` have been taken before. `terms_of` are what the loss of a batch of ours is the sum of."""
        # Before the meter, which must stop listening first.
        self._examiner = Examiner(model) if steps == 0 else None
        self.meter = FlowMeter(model, optimizer, config, steps=steps, terms_of=terms_of)
        self._noise = NoiseMeter(model, optimizer, steps=steps)

    @property
    def examining(self) -> bool:
        """Whether the first records are still being looked at."""
        return self._examiner is not None and not self._examiner.done

    def step(self, loss: float) -> tuple[FlowMeasured | None, list[Event]]:
        """After each step, or one that was skipped: what was measured of this step, and all that is known now."""
        measured = self.meter.step(loss)
        examined: Examined | None = None if self._examiner is None else self._examiner.step()
        return measured, [told for told in (measured, examined, self._noise.step()) if told is not None]

    def close(self) -> None:
        """Take every hook away."""
        self.meter.close()
        if self._examiner is not None:
            self._examiner.close()
        self._noise.close()
