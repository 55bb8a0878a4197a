"""Which layers of an encoder or a decoder are sparse, and their options.

``--sffn-freq`` makes every n-th layer sparse. All these layers have the same options. A layer plan,
``--sffn-layers``, names the layers of each selector instead, and may give them own sizes::

    hash_layer:0-2,avgk/block_size=64/expansion=8:3-
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from ..memory import Selector
from .overlay import Overlay

FLAG = "--sffn-layers"
DENSE = "dense"
"""Name in a plan of layers that are not sparse."""
SIZES = ("block_size", "active_blocks", "shared_blocks", "expansion")
"""Numbers that an entry may give, each in place of the option ``sffn_`` + name."""
FRACTIONS = ("balance_rate", "route_scale")
"""Numbers with a fraction that an entry may give, in the same way."""
NUMBER = r"-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE]-?[0-9]+)?"
OPTIONS = (*SIZES, *FRACTIONS, "gate")
FORM = "SELECTOR[/OPTION=VALUE...]:LAYERS, such as avgk/block_size=64:3-"


@dataclass(frozen=True)
class Entry:
    """An entry of a layer plan.

    Attributes:
        text: the entry as it was given.
        selector: name of the selector, or ``DENSE``.
        options: option of the model -> value in these layers.
        first: number of the first layer, from 0.
        last: number of the last layer; ``None``: the last one of the model.
    """

    text: str
    selector: str
    options: dict[str, Any]
    first: int
    last: int | None


@dataclass(frozen=True)
class LayerGroup:
    """Sparse layers with the same options.

    Attributes:
        numbers: numbers of the layers, from 0. A pruned model keeps the numbers of training.
        options: the model's options, as they hold for these layers.
        entry: text of the entry of the plan; ``None``: the model has no plan.
    """

    numbers: range
    options: Any
    entry: str | None = None


def layer_groups(args: Any, side: str) -> list[LayerGroup]:
    """Return the sparse layers of a side, before any are pruned.

    Args:
        args: the model's options.
        side: ``encoder`` or ``decoder``.

    Raises:
        UsageError: the layer plan is malformed, or does not fit the number of layers.
    """
    freq, layers = args.sffn_freq, getattr(args, f"{side}_layers")
    # Checkpoints of earlier versions have no plan.
    if (plan := getattr(args, "sffn_layers", None)) is None:
        return [LayerGroup(range(freq - 1, layers, freq), args)]
    entries = parse_plan(plan)
    numbers = [layers_of(entry, layers, side) for entry in entries]
    ordered = sorted(zip(numbers, entries, strict=True), key=lambda pair: pair[0].start)
    for (before, other), (after, entry) in itertools.pairwise(ordered):
        if after.start < before.stop:
            raise UsageError(
                f"{FLAG} {entry.text}: layer {after.start} is also in the entry {other.text}"
            )
    return [
        LayerGroup(found, Overlay(args, sffn_selector=entry.selector, **entry.options), entry.text)
        for found, entry in ordered
        if entry.selector != DENSE
    ]


def parse_plan(plan: str) -> list[Entry]:
    """Return the entries of a layer plan.

    Args:
        plan: the value of ``--sffn-layers``.

    Raises:
        UsageError: an entry is malformed or names an unknown selector or option, or no layer is
            sparse. The message names the flag, the entry and the reason.
    """
    entries = [parse_entry(text.strip(), plan) for text in plan.split(",")]
    if all(entry.selector == DENSE for entry in entries):
        raise UsageError(f"{FLAG} {plan}: has no sparse layer")
    return entries


def parse_entry(text: str, plan: str) -> Entry:
    """Return an entry of a layer plan; see :func:`parse_plan`.

    Args:
        text: the entry.
        plan: the whole plan, for the message.
    """
    if not text:
        raise UsageError(f"{FLAG} {plan or repr(plan)}: has an empty entry")
    match = re.fullmatch(r"([^/:]+)((?:/[^/:]+)*):([0-9]{1,18})(-?)([0-9]{0,18})", text)
    if match is None or (match[5] and not match[4]):
        raise UsageError(f"{FLAG} {text}: is not of the form {FORM}")
    selector, options, first, dash, last = match.groups()
    known = [DENSE, *sorted(Selector.registry)]
    if selector not in known:
        raise UsageError(f"{FLAG} {text}: {selector} is none of {', '.join(known)}")
    if selector == DENSE and options:
        raise UsageError(f"{FLAG} {text}: dense layers take no options")
    given: dict[str, Any] = {}
    for option in options.split("/")[1:]:
        name, _, value = option.partition("=")
        if name not in OPTIONS:
            raise UsageError(f"{FLAG} {text}: {name} is none of {', '.join(OPTIONS)}")
        if f"sffn_{name}" in given:
            raise UsageError(f"{FLAG} {text}: gives {name} twice")
        if name in SIZES and not re.fullmatch("-?[0-9]{1,18}", value):
            raise UsageError(f"{FLAG} {text}: {name} {value or repr(value)} is not a whole number")
        if name in FRACTIONS and not re.fullmatch(NUMBER, value):
            raise UsageError(f"{FLAG} {text}: {name} {value or repr(value)} is not a number")
        kind = int if name in SIZES else float if name in FRACTIONS else str
        given[f"sffn_{name}"] = kind(value)
    end = (int(last) if last else None) if dash else int(first)
    return Entry(text, selector, given, int(first), end)


def layers_of(entry: Entry, layers: int, side: str) -> range:
    """Return the numbers of the layers of an entry.

    Args:
        entry: the entry.
        layers: number of layers of the side.
        side: ``encoder`` or ``decoder``.

    Raises:
        UsageError: the side has no such layers.
    """
    last = layers - 1 if entry.last is None else entry.last
    if (highest := max(entry.first, last)) >= layers:
        raise UsageError(
            f"{FLAG} {entry.text}: layer {highest} is not one of 0 to {layers - 1} of "
            f"--{side}-layers {layers}"
        )
    if last < entry.first:
        raise UsageError(f"{FLAG} {entry.text}: the last layer is before the first")
    return range(entry.first, last + 1)


def check_plan(args: Any, default_freq: int, selector: str | None, general: str) -> None:
    """Refuse a layer plan that contradicts other options or the name of the model.

    Args:
        args: the model's options, with a plan.
        default_freq: the model's default of ``--sffn-freq``.
        selector: the selector in the model's name; ``None``: any.
        general: the architecture that takes any selector.

    Raises:
        UsageError: the message names the flag, the value and the reason.
    """
    plan = args.sffn_layers
    if args.sffn_freq != default_freq:
        raise UsageError(
            f"--sffn-freq {args.sffn_freq}: {FLAG} {plan} says already which layers are sparse"
        )
    only = selector or (args.sffn_selector and str(args.sffn_selector))
    for entry in parse_plan(plan):
        if only is None or entry.selector in (DENSE, only):
            continue
        reason = f"this model selects by {only}; use --arch {general} to choose"
        if selector is None:
            reason = f"--sffn-selector {only} is for all layers; leave it out"
        raise UsageError(f"{FLAG} {entry.text}: {reason}")
