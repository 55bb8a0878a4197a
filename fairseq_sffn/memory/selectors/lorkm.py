"""LoRKM: VanillaM with a low-rank key table."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from ..config import MemoryConfig
from ..selection import SelectorInput
from ..validation import ConfigError
from .vanilla_m import VanillaM


class LoRKM(VanillaM):
    """VanillaM with a key table of rank r, K = D U (Liu et al. 2023, arXiv 2305.13999)."""

    name = "lorkm"
    key_table = "own"
    scores_every_key = False

    @dataclass(frozen=True)
    class Config(VanillaM.Config):
        rank: int | None = field(
            default=None, metadata={"help": "rank of the key table (default: width / 8)"}
        )

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        rank = self._rank(config)
        self.down = nn.Linear(config.embed_dim, rank, bias=False)
        self.up = nn.Linear(rank, config.num_cells, bias=config.bias)
        # U keeps the variance of x. With D, pre-activations have the variance of a full table's.
        bounds = {self.down.weight: (3 / config.embed_dim) ** 0.5}
        bounds[self.up.weight] = config.init_scale * rank**-0.5
        if config.bias:
            bounds[self.up.bias] = config.init_scale * config.embed_dim**-0.5
        for parameter, bound in bounds.items():
            nn.init.uniform_(parameter, -bound, bound)

    @classmethod
    def _rank(cls, config: MemoryConfig) -> int:
        rank = config.selector_options.rank
        return max(1, config.embed_dim // 8) if rank is None else rank

    @classmethod
    def validate(cls, config: MemoryConfig) -> None:
        if not 1 <= cls._rank(config) <= config.embed_dim:
            raise ConfigError("rank", cls._rank(config), f"is not 1 to {config.embed_dim}")

    @classmethod
    def num_params(cls, config: MemoryConfig) -> int:
        bias = config.num_cells if config.bias else 0
        return cls._rank(config) * (config.embed_dim + config.num_cells) + bias

    @classmethod
    def flops_per_token(cls, config: MemoryConfig) -> int:
        return 2 * cls._rank(config) * (config.embed_dim + config.num_cells)

    def factors(self, inputs: SelectorInput) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.down(inputs.x), self.up.weight, self.up.bias
