"""Training criterions with the balance and z losses of sparse layers."""

from . import sffn_cross_entropy, sffn_label_smoothed_cross_entropy

__all__ = ["sffn_cross_entropy", "sffn_label_smoothed_cross_entropy"]
