"""Base class of the plugin's models, and their registration."""

import re
import sys
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import field, make_dataclass
from typing import Any, ClassVar, Optional

from fairseq.dataclass import FairseqDataclass
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import (
    MODEL_DATACLASS_REGISTRY,
    BaseFairseqModel,
    register_model,
    register_model_architecture,
)
from hydra.core.config_store import ConfigNode, ConfigStore
from omegaconf import OmegaConf
from torch import nn

from ..errors import UsageError, flag
from ..memory import MemoryConfig, ProcessGroups, SparseMemory
from ..precision import check_precision
from .config import selector_flags
from .layer_plan import check_plan
from .stack import SparseStack


class PluginModel(BaseFairseqModel):
    """Base class to put before one of fairseq's models.

    ``forward`` of a model with sparse layers takes three more arguments than fairseq's:

    - ``routing_losses``: whether to compute the balance and z losses of the returned routing;
    - ``balance_scope``: the tokens of one balance loss;
    - ``is_dummy``: whether the tokens count nowhere, as on a rank that has no sentences left.
    """

    config_class: ClassVar[type[FairseqDataclass]]

    @classmethod
    def add_args(cls, parser: Any) -> None:
        """Add the model's flags, as fairseq does, except for switches that are on by default.

        In fairseq, ``--name`` turns such a switch off. Here, ``--name`` turns it on and
        ``--no-name`` turns it off.
        """
        defaults = cls.config_class()
        switches = [name for name, value in vars(defaults).items() if value is True]
        for name in switches:
            setattr(defaults, name, False)
        gen_parser_from_dataclass(parser, defaults, delete_default=True)
        for name in switches:
            parser.add_argument(
                flag(f"no_{name}"), dest=name, action="store_false", help=f"turns off {flag(name)}"
            )

    @classmethod
    def options(cls, args: Any) -> Any:
        """Return a model's options as plain values, with the model's defaults for missing ones.

        fairseq's configurations hold enums whose classes cannot be pickled. A model that stored one
        could not be pickled either.
        """
        if OmegaConf.is_config(args):
            plain: Any = OmegaConf.to_container(args, resolve=True, enum_to_str=True)
            args = Namespace(**plain)
        return cls.config_class.from_namespace(args)

    @property
    def memory_configs(self) -> dict[str, MemoryConfig]:
        """Name of each sparse layer in the routing -> its memory."""
        stacks = (module for module in self.children() if isinstance(module, SparseStack))
        return {name: config for stack in stacks for name, config in stack.memory_configs.items()}

    def work_alone(self) -> None:
        """Make every sparse layer work without other processes."""
        for module in self.modules():
            if isinstance(module, SparseMemory):
                module.groups = ProcessGroups()

    @property
    def expert_parallel(self) -> int:
        """Number of processes over which the blocks of each sparse layer are sharded."""
        shards = (m.groups.shards for m in self.modules() if isinstance(m, SparseMemory))
        return next(shards, 1)

    def prepare_for_inference_(self, cfg: Any) -> None:
        check_precision(cfg.common, ("fp16", "bf16", "amp"))
        super().prepare_for_inference_(cfg)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint's parameters, as fairseq does.

        Raises:
            UsageError: the parameters do not fit this model.
        """
        try:
            return super().load_state_dict(*args, **kwargs)
        except RuntimeError as error:
            # PyTorch lists every difference. The first one shows which flag differs.
            difference = str(error).split("\n")[1].strip()
            raise UsageError(
                "the checkpoint does not fit this model: "
                f"{shorten_mismatch(difference, self.memory_configs.values())}; "
                "train with the same --arch and model flags, or into another --save-dir"
            ) from error


class ModelSchema(ConfigNode):
    """The schema of a model in hydra's store. It is made when it is first read, as the schemas of
    all models take as long to make as the whole plugin takes to import.

    Args:
        name: name of the model.
        config_class: class of its options.
    """

    def __init__(self, name: str, config_class: type[FairseqDataclass]) -> None:
        self.name, self.group, self.package = f"{name}.yaml", "model", None
        self.provider, self.config_class = "fairseq", config_class

    def __getattr__(self, name: str) -> Any:
        if name != "node":
            raise AttributeError(name)
        options = self.config_class()
        options._name = self.name.removesuffix(".yaml")
        self.node = OmegaConf.structured(options)
        return self.node


def plugin_model_in(model: nn.Module) -> Optional[PluginModel]:
    """Return the plugin's model in a module, which may wrap it (``--ddp-backend fully_sharded``).

    Returns:
        The model; ``None``: the module has no model of the plugin.
    """
    return next((module for module in model.modules() if isinstance(module, PluginModel)), None)


def check_selector(args: Any, promised: Optional[str], general: str) -> None:
    """Refuse a model without a selector, or with another selector than its name says.

    Args:
        args: the model's options, which an instance of its config class holds.
        promised: the selector in the model's name; ``None``: any.
        general: the architecture that takes any selector.

    Raises:
        UsageError: the message names the flag, the value and the architecture to use.
    """
    if args.sffn_layers is not None:
        check_plan(args, type(args).sffn_freq, promised, general)
    elif args.sffn_selector is None:
        raise UsageError("--sffn-selector: is required by this model, or --sffn-layers")
    if promised not in (None, str(args.sffn_selector)):
        raise UsageError(
            f"--sffn-selector {args.sffn_selector}: this model selects by {promised}; "
            f"use --arch {general} to choose"
        )


def shorten_mismatch(difference: str, configs: Iterable[MemoryConfig]) -> str:
    """Shorten PyTorch's line on a state dict that does not fit, and add the flags that matter.

    Args:
        difference: the line.
        configs: the memories of the model's sparse layers.
    """
    if match := re.match(r"size mismatch for (\S+):.*?Size\((.*?)\).*?Size\((.*?)\)", difference):
        name, saved, wanted = match.groups()
        text = f"{name} is {saved} in the checkpoint and {wanted} in the model"
    elif match := re.match(r'(\w+) key\(s\) in state_dict: "(.*?)"', difference):
        kind, name = match.groups()
        where = "model" if kind == "Missing" else "checkpoint"
        text = f"only the {where} has {name}"
    else:
        name, text = difference.split()[0], difference
    return f"{text} (see {', '.join(_flags_that_decide(name, configs))})"


def _flags_that_decide(name: str, configs: Iterable[MemoryConfig]) -> list[str]:
    if "embed_tokens" in name or "output_projection" in name:
        return ["dict.txt of the data", "--decoder-embed-dim"]
    if name.endswith((".memory.block_size", ".memory.value_lr_scale")):
        return [flag(f"sffn_{name.rpartition('.')[2]}"), "--sffn-layers"]
    if name.endswith(".memory.balancer.bias"):
        return ["--sffn-balance-rate", "--sffn-expansion", "--sffn-block-size"]
    if re.search(r"\.fc1\.(memory\.(glu|up|up_bias)$|gate_proj\.|up_proj\.)", name):
        return ["--sffn-glu", "--sffn-glu-width"]
    if ".memory.selector." in name:
        own = dict.fromkeys(own for c in configs for own in selector_flags(c.selector_class))
        chosen = ["--sffn-selector", "--sffn-layers", "--sffn-expansion", "--sffn-block-size"]
        return [*chosen, *map(flag, own)]
    if ".memory.shared." in name:
        return ["--sffn-shared-blocks", "--sffn-block-size", "--decoder-embed-dim"]
    sparse = ["--sffn-freq", "--sffn-layers"]
    gated = any(config.glu for config in configs)
    widths = ["--sffn-glu-width" if gated else "--decoder-ffn-embed-dim", "--decoder-embed-dim"]
    if ".memory." in name:
        shared = ["--sffn-shared-blocks"] if any(c.shared_blocks for c in configs) else []
        return [*sparse, "--sffn-expansion", *shared, *widths]
    if ".fc1." in name or ".fc2." in name:
        return ["--arch", *sparse, "--sffn-glu", *widths]
    return ["--arch", "--decoder-layers", "--decoder-embed-dim"]


def register(
    name: str, base: type[PluginModel], defaults: dict[str, Any], **attributes: Any
) -> None:
    """Register a subclass of ``base`` whose options have other defaults.

    The subclass and its config become attributes of the module of ``base``. Models and configs can
    therefore be pickled.

    Args:
        name: name of the model.
        base: the base class.
        defaults: option -> default.
        attributes: attributes of the subclass.
    """
    inherited = base.config_class.__dataclass_fields__
    options = [
        (option, inherited[option].type, field(default=value, metadata=inherited[option].metadata))
        for option, value in defaults.items()
    ]
    # The base's comparison and text do for the subclass, which has no further options.
    config = make_dataclass(
        f"{name}_config", options, bases=(base.config_class,), eq=False, repr=False
    )
    model = type(name, (base,), {"config_class": config, **attributes})
    for made in (config, model):
        made.__module__ = base.__module__
        setattr(sys.modules[base.__module__], made.__name__, made)
    # fairseq would make the schemas of all models now.
    register_model(name)(model)
    setattr(model, "__dataclass", config)
    MODEL_DATACLASS_REGISTRY[name] = config
    register_model_architecture(name, name)(lambda _: None)
    models = ConfigStore.instance().repo.setdefault("model", {})
    models[f"{name}.yaml"] = ModelSchema(name, config)
