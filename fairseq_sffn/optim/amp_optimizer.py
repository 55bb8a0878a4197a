"""The optimizer of ``--amp``."""

from __future__ import annotations

from fairseq import optim


class AMPOptimizer(optim.AMPOptimizer):
    """fairseq's optimizer for mixed precision, which unscales gradients once.

    fairseq divides gradients by the loss scale to clip them. PyTorch's GradScaler then divides them
    again before the step, since fairseq gives it another optimizer, the one around. Here both get
    the same one. Checkpoints name the class, so that it has fairseq's name.
    """

    def step(self) -> None:
        """Take a step, unless a gradient is not finite, and update the loss scale."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
