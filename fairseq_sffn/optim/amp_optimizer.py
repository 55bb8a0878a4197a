"""The optimizer of ``--amp``."""

from __future__ import annotations

from fairseq import optim


class AMPOptimizer(optim.AMPOptimizer):
    """fairseq's optimizer for mixed precision, which divides gradients by the loss scale only once.

    fairseq divides gradients by the loss scale before it clips them. PyTorch's GradScaler then
    divides them again before the step, because fairseq passes the outer optimizer to it. This class
    passes the inner optimizer to both. Checkpoints store the name of the class, so it is fairseq's.
    """

    def step(self) -> None:
        """Take a step, unless a gradient is not finite, and update the loss scale."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
