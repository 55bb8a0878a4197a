"""The interface of selectors: their input, their result, and the registry."""

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
    """The input of a selector.

    Attributes:
        x: (N, D) hidden states.
        keys: (C, D) the memory's key table if ``Selector.key_table`` is ``full``, else ``None``.
        key_bias: (C,) the bias of the keys, or ``None``.
        token_ids: (N, T) trailing token ids, the current one last, if the selector reads any.
        valid: (N,) bool, ``False`` at padding; ``None``: no padding.
        needs_scores: whether the gate or the losses read the scores of the selection.
        gather: concatenates what each rank computes of its own blocks, in their order, with
            gradients. Where blocks are sharded, the tables are this rank's.
        gather_tokens: concatenates the rows of the ranks that share a micro-batch, and says which
            are this rank's; no gradients. The host waits for the device, to learn the number of
            rows of each rank.
        stack_over_tokens: stacks tensors of the same shape on each of these ranks,
            (...) -> (ranks, ...); no gradients, no waiting.
        bias: (B,) added to the scores by :meth:`top`, or ``None``.
        score_function: to which the bias is added; see :meth:`.scores.Scores.top`.
        values: (C, D) the memory's value table, divided by ``MemoryConfig.value_lr_scale``.
        up, up_bias: (C, D) and (C,) the second key table of gated cells and its bias, or ``None``.
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
    bias: Tensor | None = None
    score_function: str = "logits"
    values: Tensor | None = None
    up: Tensor | None = None
    up_bias: Tensor | None = None

    def top(self, scores: Scores, active_blocks: int) -> Tensor:
        """Return the blocks to select, best first: (N, A) int64.

        Args:
            scores: of all blocks. A block with the score -inf is not selected.
            active_blocks: A.
        """
        return scores.top(active_blocks, self.bias, self.score_function)


class Selection(NamedTuple):
    """The blocks of each token, and what the selector already computed of them.

    Attributes:
        blocks: (N, A) int64, the selected blocks of each token.
        scores: logits of all blocks, higher is better; ``None`` if the selector does not score
            blocks or nothing needs the scores. Gates and losses read them.
        weights: (N, A) gate values; ``None``: all 1.
        kept: (N, A) bool, ``False`` for assignments that are not used; ``None``: all are. An
            assignment that a selector leaves out does not count as an assignment; one that a full
            block drops counts as dropped.
        pre_activations: (N, A, G) x . k + c of the selected cells, from a selector that computes
            them anyway; they are not computed again.
        coefficients: (N, A) factors of the values, from a selector with its own keys and blocks of
            one cell; they replace keys and activation.
        num_kept: number of kept assignments, if the host knows it.
    """

    blocks: Tensor
    scores: Scores | None = None
    weights: Tensor | None = None
    kept: Tensor | None = None
    pre_activations: Tensor | None = None
    coefficients: Tensor | None = None
    num_kept: int | None = None

    def counted(self, valid_N: Tensor | None) -> Tensor | None:
        """Return which assignments count in usage, losses and capacity.

        Args:
            valid_N: bool, ``False`` at padding; ``None``: no padding.

        Returns:
            bool, broadcasts to (N, A); ``None``: all count.
        """
        if valid_N is None:
            return self.kept
        return valid_N.unsqueeze(1) if self.kept is None else self.kept & valid_N.unsqueeze(1)


@dataclass(frozen=True)
class SelectorConfig:
    """Options of a selector.

    Each field is also a command-line flag. It therefore has a plain type (``int``, ``float``,
    ``bool`` or ``Literal`` strings, or one of these or ``None``), a default, and metadata ``help``.
    """

    selector_class: ClassVar[type[Selector]]

    @classmethod
    def choices(cls) -> dict[str, tuple[str, ...]]:
        """Return the allowed values of each option with a ``Literal`` type."""
        hints = get_type_hints(cls).items()
        return {name: get_args(kind) for name, kind in hints if get_origin(kind) is Literal}

    def plain_types(self) -> dict[str, type]:
        """Return the type of each option that is a number or a switch and is not ``None``."""
        result: dict[str, type] = {}
        for name, kind in get_type_hints(type(self)).items():
            kinds = get_args(kind) or (kind,)
            found = next((each for each in (bool, int, float) if each in kinds), None)
            if found and not (type(None) in kinds and getattr(self, name) is None):
                result[name] = found
        return result


class Selector(nn.Module):
    """Selects ``active_blocks`` of ``num_blocks`` blocks for each token.

    A method is a subclass with a ``name``, in a file of its own in ``selectors/``. Defining the
    class registers it. Class attributes declare what the method needs beyond :meth:`forward`.

    Args:
        config: the memory's sizes; ``config.selector_options`` has the selector's own options.

    Raises:
        TypeError: a class is defined with the name of another selector.
    """

    registry: ClassVar[dict[str, type[Selector]]] = {}
    Config: ClassVar[type[SelectorConfig]] = SelectorConfig

    name: ClassVar[str]
    """The name in ``MemoryConfig.selector`` and ``--sffn-selector``."""
    flag_prefix: ClassVar[str]
    """Options become flags ``--{flag_prefix}-{field}``; by default the name, with dashes."""
    key_table: ClassVar[Literal["full", "own", "none"]] = "full"
    """``full``: the selector uses the memory's key table. ``own``: it has its own keys and returns
    ``coefficients`` or ``pre_activations``. ``none``: it returns ``coefficients`` without keys."""
    scores_every_key: ClassVar[bool] = False
    """Whether selection reads every row of the key table, so that no key is inactive."""
    scores_blocks: ClassVar[bool] = True
    """Whether :meth:`forward` returns scores, which gates and the balance loss need."""
    selects_by_scores: ClassVar[bool] = True
    """Whether the scores choose the blocks. Otherwise no balance loss can change the load."""
    default_gate: ClassVar[str] = "none"
    default_balance_weight: ClassVar[float] = 0.0
    """Default weight of the balance loss."""
    balance_loss_kind: ClassVar[Literal["load", "entropy"]] = "load"
    """``load``: :func:`.balance.balance_loss`. ``entropy``: :func:`.balance.entropy_loss`."""
    balanced_choices: ClassVar[int | None] = None
    """Number of a token's choices, best first, that the balance loss counts; ``None``: all."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in cls.__dict__:  # an abstract class between Selector and its methods
            return
        if (other := cls.registry.get(cls.name)) is not None:
            new, old = (f"{each.__module__}.{each.__qualname__}" for each in (cls, other))
            if new != old:  # a module that is loaded again may replace its own class
                raise TypeError(f"{new}: the name {cls.name} belongs to the selector {old}")
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
        """Return the default number of cells per block, in place of a dense FFN of this width."""
        return ffn_embed_dim

    @classmethod
    def context_tokens(cls, config: MemoryConfig) -> int:
        """Return the number of trailing token ids that it reads, the current one included."""
        return 0

    @classmethod
    def validate(cls, config: MemoryConfig) -> None:
        """Raise ConfigError if the method does not support the sizes or its options."""

    @classmethod
    def num_params(cls, config: MemoryConfig) -> int:
        """Return the number of trained parameters of the selector itself."""
        return 0

    @classmethod
    def flops_per_token(cls, config: MemoryConfig) -> int:
        """Return the forward FLOPs to select the blocks of a token, beyond the active cells."""
        return 0

    @classmethod
    def flops_per_step(cls, config: MemoryConfig) -> int:
        """Return the forward FLOPs of a pass that do not depend on the number of tokens."""
        return 0

    def forward(self, inputs: SelectorInput) -> Selection:
        """Select the blocks of each token."""
        raise NotImplementedError
