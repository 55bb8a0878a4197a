"""What all models of the plugin share: their flags, how they load, how they are registered."""

import re
import sys
from argparse import Namespace
from dataclasses import field, make_dataclass
from typing import Any, ClassVar, Optional

from fairseq.dataclass import FairseqDataclass
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import BaseFairseqModel, register_model
from omegaconf import OmegaConf
from torch import nn

from ..errors import UsageError
from ..memory import MemoryConfig, ProcessGroups, SparseMemory
from .config import flag, selector_flags
from .precision import check_precision
from .stack import SparseStack


class PluginModel(BaseFairseqModel):
    """Goes before one of fairseq's models among the bases of a class."""

    config_class: ClassVar[type[FairseqDataclass]]

    @classmethod
    def add_args(cls, parser: Any) -> None:
        """Like fairseq's, but a flag always does what its name says: fairseq would make
        ``--share-decoder-input-output-embed`` untie the embeddings where tied is the default."""
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
        """Return a model's options as plain values, and its defaults for what is left out.

        fairseq's configurations hold choices whose classes have no name, so that no model that
        keeps one can be pickled.
        """
        if OmegaConf.is_config(args):
            plain = OmegaConf.to_container(args, resolve=True, enum_to_str=True)
            args = Namespace(**plain)
        return cls.config_class.from_namespace(args)

    def ask_for_losses(self, wanted: bool) -> bool:
        """Whether the routing of the next forward passes is to have balance and z losses. They take
        a softmax over all blocks, and of some selectors scores that nothing else reads; in several
        processes all must then run together. Without a call there are none.

        Returns:
            what was wanted before.
        """
        stacks = [module for module in self.modules() if isinstance(module, SparseStack)]
        before = all(stack.losses for stack in stacks)
        for stack in stacks:
            stack.losses = wanted
        return before

    def expect_dummies(self, wanted: bool) -> None:
        """Whether the next tokens stand for none (see :class:`SparseStack`)."""
        for module in self.modules():
            if isinstance(module, SparseStack):
                module.is_dummy = wanted

    def work_alone(self) -> None:
        """Routes its tokens without a look at those of other processes."""
        for module in self.modules():
            if isinstance(module, SparseMemory):
                module.groups = ProcessGroups()

    @property
    def expert_parallel(self) -> int:
        """Processes over which the blocks are shared out."""
        shards = (m.groups.shards for m in self.modules() if isinstance(m, SparseMemory))
        return next(shards, 1)

    def prepare_for_inference_(self, cfg: Any) -> None:
        check_precision(cfg.common, ("fp16", "bf16", "amp"))
        super().prepare_for_inference_(cfg)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Like fairseq's.

        Raises:
            UsageError: the parameters are not those of this model.
        """
        try:
            return super().load_state_dict(*args, **kwargs)
        except RuntimeError as error:
            # PyTorch lists every difference; the first one tells which flag differs.
            difference = str(error).split("\n")[1].strip()
            raise UsageError(
                "the checkpoint does not fit this model: "
                f"{shorten_mismatch(difference, getattr(self, 'memory_config', None))}; "
                "train with the same --arch and model flags, or into another --save-dir"
            ) from error


def plugin_model_in(model: nn.Module) -> Optional[PluginModel]:
    """The plugin's model in what a trainer has, which ``--ddp-backend fully_sharded`` wraps;
    ``None``: another's."""
    return next((module for module in model.modules() if isinstance(module, PluginModel)), None)


def check_selector(args: Any, promised: Optional[str], general: str) -> None:
    """Refuse a model without a selector, or with another one than its name promises.

    Args:
        promised: the selector that the model's name promises; ``None``: any.
        general: the architecture that takes any.
    """
    if args.sffn_selector is None:
        raise UsageError("--sffn-selector: is required by this model")
    if promised not in (None, str(args.sffn_selector)):
        raise UsageError(
            f"--sffn-selector {args.sffn_selector}: this model selects by {promised}; "
            f"use --arch {general} to choose"
        )


def shorten_mismatch(difference: str, config: Optional[MemoryConfig]) -> str:
    """One of PyTorch's lines on a state dict that does not fit, in a few words, with the flags that
    decide what differs.

    Args:
        config: the memory of the model's sparse layers.
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
    return f"{text} (see {', '.join(_flags_that_decide(name, config))})"


def _flags_that_decide(name: str, config: Optional[MemoryConfig]) -> list[str]:
    if "embed_tokens" in name or "output_projection" in name:
        return ["dict.txt of the data", "--decoder-embed-dim"]
    if name.endswith((".memory.block_size", ".memory.value_lr_scale")):
        return [flag(f"sffn_{name.rpartition('.')[2]}")]
    if ".memory.selector." in name:
        own = selector_flags(config.selector_class) if config else []
        return ["--sffn-selector", "--sffn-expansion", "--sffn-block-size", *map(flag, own)]
    if ".memory." in name:
        return ["--sffn-freq", "--sffn-expansion", "--decoder-ffn-embed-dim", "--decoder-embed-dim"]
    if ".fc1." in name or ".fc2." in name:
        return ["--arch", "--sffn-freq", "--decoder-ffn-embed-dim", "--decoder-embed-dim"]
    return ["--arch", "--decoder-layers", "--decoder-embed-dim"]


def register(
    name: str, base: type[PluginModel], defaults: dict[str, Any], **attributes: Any
) -> None:
    """Register a subclass of ``base`` whose options have other defaults.

    The subclass and its config become attributes of ``base``'s module, so that models and
    configs can be pickled.
    """
    inherited = base.config_class.__dataclass_fields__
    options = [
        (option, inherited[option].type, field(default=value, metadata=inherited[option].metadata))
        for option, value in defaults.items()
    ]
    config = make_dataclass(f"{name}_config", options, bases=(base.config_class,))
    model = type(name, (base,), {"config_class": config, **attributes})
    for made in (config, model):
        made.__module__ = base.__module__
        setattr(sys.modules[base.__module__], made.__name__, made)
    register_model(name, dataclass=config)(model)
