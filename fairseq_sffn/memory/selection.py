"""What a selector is and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import (
    TYPE_CHECKING,
    ClassVar,
    Literal,
    NamedTuple,
    get_args,
    get_origin,
    get_type_hints,
)

from torch import Tensor, nn

from .scores import Scores

if TYPE_CHECKING:
    from .config import MemoryConfig


class SelectorInput(NamedTuple):
    """What a selector may look at.

    Attributes:
        x: (N, D) hidden states.
        keys: (C, D) the memory's key table, where ``Selector.key_table`` is ``full``.
        key_bias: (C,) likewise, unless the memory has no bias.
        token_ids: (N, context_tokens) trailing token ids, the current one last, where the selector
            looks at any.
        valid: (N,) bool, ``False`` at padding; ``None``: no padding.
        needs_scores: whether gate or losses read the scores of the selection.
        gather: where the blocks are shared out to several ranks, and ``keys`` are this rank's, puts
            what each rank has of its own blocks together, in their order; gradients go back.
        gather_tokens: where several ranks' tokens are one micro-batch, what each rank has of its
            own, one after the other, and which is this rank's; without gradients. The host waits
            for the device, to learn how many rows each rank has.
        stack_over_tokens: likewise for a tensor that has the same shape on each rank: stacks those
            of all ranks, (...) -> (ranks, ...), without gradients and without waiting.
    """

    x: Tensor
    keys: Tensor | None = None
    key_bias: Tensor | None = None
    token_ids: Tensor | None = None
    valid: Tensor | None = None
    needs_scores: bool = True
    gather: Callable[[Tensor], Tensor] = lambda part: part
    gather_tokens: Callable[[Tensor], tuple[Tensor, slice]] = lambda own: (own, slice(0, len(own)))
    stack_over_tokens: Callable[[Tensor], Tensor] = lambda own: own.unsqueeze(0)


class Selection(NamedTuple):
    """The blocks that each token uses, and what the selector already knows about them.

    Attributes:
        blocks: (N, A) int64, the selected blocks of each token.
        scores: what each block was chosen by, higher is better, as logits; ``None`` where a
            selector does not score blocks, or nothing needs them. Gates and the balance loss read
            them.
        weights: (N, A) gate values, or ``None`` where every selected block counts fully.
        kept: (N, A) bool, ``False`` where the block is not used after all; ``None``: all are. What
            a selector leaves out is no assignment; what a full block drops is counted as dropped.
        pre_activations: (N, A, G) x . k + c of the selected cells, from a selector that had to
            compute them anyway; they are not computed again.
        coefficients: (N, A) what multiplies the values, from a selector with its own keys and
            blocks of one cell; keys and activation are passed by.
        num_kept: how many pairs are kept, where that is known without asking the device.
    """

    blocks: Tensor
    scores: Scores | None = None
    weights: Tensor | None = None
    kept: Tensor | None = None
    pre_activations: Tensor | None = None
    coefficients: Tensor | None = None
    num_kept: int | None = None


@dataclass(frozen=True)
class SelectorConfig:
    """Options of a selector. Each field is also a command-line flag, so it has a plain type
    (``int``, ``float``, ``bool`` or ``Literal`` strings, or one of these or ``None``), a default,
    and metadata ``help``."""

    selector_class: ClassVar[type[Selector]]

    @classmethod
    def choices(cls) -> dict[str, tuple[str, ...]]:
        """The values of each option that has a ``Literal`` type."""
        hints = get_type_hints(cls).items()
        return {name: get_args(kind) for name, kind in hints if get_origin(kind) is Literal}

    def plain_types(self) -> dict[str, type]:
        """The type of each option that is a number or a switch, unless it is left ``None``."""
        result: dict[str, type] = {}
        for name, kind in get_type_hints(type(self)).items():
            kinds = get_args(kind) or (kind,)
            found = next((each for each in (bool, int, float) if each in kinds), None)
            if found and not (type(None) in kinds and getattr(self, name) is None):
                result[name] = found
        return result


class Selector(nn.Module):
    """Chooses ``active_blocks`` of ``num_blocks`` blocks for each token.

    A new method is a subclass in ``selectors/`` with a ``name``; it is registered by being
    defined. What a method needs beyond :meth:`forward` it declares in class attributes.

    Args:
        config: the memory's sizes; ``config.selector_options`` are the selector's own options.
    """

    registry: ClassVar[dict[str, type[Selector]]] = {}
    Config: ClassVar[type[SelectorConfig]] = SelectorConfig

    name: ClassVar[str]
    """Name in ``MemoryConfig.selector`` and ``--sffn-selector``."""
    flag_prefix: ClassVar[str]
    """Options become flags ``--{flag_prefix}-{field}``; by default the name, with dashes."""
    key_table: ClassVar[Literal["full", "own", "none"]] = "full"
    """``full``: uses the memory's key table. ``own``: has keys of its own and returns
    ``coefficients`` or ``pre_activations``. ``none``: returns ``coefficients`` without keys."""
    scores_every_key: ClassVar[bool] = False
    """Whether every row of the key table takes part in selecting, so that none is inactive."""
    scores_blocks: ClassVar[bool] = True
    """Whether :meth:`forward` returns scores; gates and balance loss need them."""
    default_gate: ClassVar[str] = "none"
    default_balance_weight: ClassVar[float] = 0.0
    """Weight of the balance loss where nothing is asked for."""
    balanced_choices: ClassVar[int | None] = None
    """How many of a token's choices, best first, the balance loss counts; ``None``: all."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in cls.__dict__:  # an abstract helper between Selector and its methods
            return
        if "flag_prefix" not in cls.__dict__:
            cls.flag_prefix = cls.name.replace("_", "-")
        if "Config" not in cls.__dict__:
            names = {"__module__": cls.__module__, "__qualname__": f"{cls.__qualname__}.Config"}
            cls.Config = dataclass(frozen=True)(type("Config", (cls.Config,), names))
        cls.Config.selector_class = cls
        cls.registry[cls.name] = cls

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()

    @classmethod
    def default_block_size(cls, ffn_embed_dim: int) -> int:
        """Cells per block where nothing is asked for, in place of a dense FFN of this width."""
        return ffn_embed_dim

    @classmethod
    def context_tokens(cls, config: MemoryConfig) -> int:
        """How many trailing token ids it looks at, the current one included."""
        return 0

    @classmethod
    def validate(cls, config: MemoryConfig) -> None:
        """Raises ConfigError where the method cannot honour the sizes or its options."""

    @classmethod
    def num_params(cls, config: MemoryConfig) -> int:
        """Trained parameters of the selector itself."""
        return 0

    @classmethod
    def flops_per_token(cls, config: MemoryConfig) -> int:
        """Forward FLOPs to choose the blocks of a token, beyond those of the active cells."""
        return 0

    @classmethod
    def flops_per_step(cls, config: MemoryConfig) -> int:
        """Forward FLOPs of a pass that do not depend on how many tokens it has."""
        return 0

    def forward(self, inputs: SelectorInput) -> Selection:
        """Select blocks."""
        raise NotImplementedError
