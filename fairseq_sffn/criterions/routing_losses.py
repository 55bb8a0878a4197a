"""Balance and z losses, and statistics of routing, for any criterion."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from fairseq.criterions import FairseqCriterion
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.dataclass.constants import LOG_FORMAT_CHOICES
from fairseq.logging import metrics
from fairseq.logging.meters import AverageMeter, MetersDict
from omegaconf import II
from torch import Tensor

from ..errors import UsageError
from ..memory import MemoryConfig
from ..models.layer import LayerRouting
from .routing_statistics import PER_LAYER, RATIOS, SENT, SUMS, MeanOverLayers, logged_meters

SCOPES = ("micro", "sequence", "global")
"""Choices of ``--balance-loss-scope``."""


@dataclass
class RoutingLossConfig(FairseqDataclass):
    balance_loss_weight: Optional[float] = field(
        default=None,
        metadata={
            "help": "weight of the balance loss, which is 1.0 per layer at perfect balance, and "
            "minus the entropy of the mean router softmax for sigma_moe (default: the selector's "
            "own: 0.01 for switch and gshard, 0.001 for sigma_moe, else 0)"
        },
    )
    balance_loss_reduce: ChoiceEnum(["sum", "mean"]) = field(  # type: ignore[valid-type]
        default="sum", metadata={"help": "how the balance losses of the sparse layers are combined"}
    )
    balance_loss_scope: ChoiceEnum(SCOPES) = field(  # type: ignore[valid-type]
        default="micro",
        metadata={
            "help": "the tokens of one balance loss: 'micro': the micro-batch of all processes; "
            "'sequence': each sequence, averaged (DeepSeek-V3, arXiv 2412.19437); 'global': "
            "the loads of the update's micro-batches so far, with the scores of this one (arXiv "
            "2501.11873; the loads of the whole update are known in its last micro-batch only)"
        },
    )
    z_loss_weight: float = field(
        default=0.0,
        metadata={
            "help": "weight of the router z-loss, the mean squared log-sum-exp of the scores"
        },
    )
    log_format: Optional[LOG_FORMAT_CHOICES] = II("common.log_format")
    tensorboard_logdir: Optional[str] = II("common.tensorboard_logdir")


class RoutingLosses(FairseqCriterion):
    """Base class to put before one of fairseq's criterions: adds the losses of the sparse layers.

    The loss is fairseq's loss + weight * balance loss + weight * z loss. The logged ``loss`` is
    fairseq's loss alone, so that it is comparable. The load of the blocks is logged beside it.
    ``balance_loss`` is logged in validation, and in training if it or the z loss has a weight. With
    ``--log-format json`` or tensorboard, each ratio is also logged for each layer. A model without
    sparse layers trains as with fairseq's criterion.

    The extra losses are losses of a micro-batch (Fedus et al. 2021, section 2.2). They are
    multiplied by the sample size, because fairseq divides gradients by it. Over micro-batches, they
    are therefore averaged with the sample sizes as weights.

    Raises:
        UsageError: a weight is negative, infinite or NaN.
    """

    cfg: RoutingLossConfig

    def __init__(self, cfg: RoutingLossConfig, *args: Any) -> None:
        super().__init__(*args)
        for name in ("balance_loss_weight", "z_loss_weight"):
            if (value := getattr(cfg, name)) is not None and not 0 <= value < math.inf:
                raise UsageError(
                    f"--{name.replace('_', '-')} {value}: must not be negative, infinite or NaN"
                )
        self.cfg = cfg
        self.log_layers = str(cfg.log_format) == "json" or bool(cfg.tensorboard_logdir)

    def forward(self, model: Any, sample: Any, reduce: bool = True) -> tuple[Any, Any, Any]:
        """Return the loss, the sample size and the logs of a micro-batch, as fairseq does.

        Args:
            model: any model.
            sample: a micro-batch.
            reduce: see fairseq's criterion.

        Raises:
            UsageError: a loss has a weight, but no selector has scores.
        """
        if not (configs := memory_configs_of(model)):
            return super().forward(model, sample, reduce)
        # In training, a loss without a weight would only take time. Validation logs it.
        wanted = not model.training or any(self.weights(configs).values())
        scope = str(self.cfg.balance_loss_scope)
        net_input = {**sample["net_input"], "routing_losses": wanted, "balance_scope": scope}
        sample = {**sample, "net_input": net_input}  # a copy, to which compute_loss adds routing
        loss, sample_size, logging_output = super().forward(model, sample, reduce)
        routing = sample["routing"]
        loss = loss + self.extra_loss(configs, routing) * sample_size
        sends = getattr(model, "expert_parallel", 1) > 1
        logging_output |= self.routing_logs(configs, routing, sample_size, wanted, sends)
        return loss, sample_size, logging_output

    def compute_loss(
        self, model: Any, net_output: Any, sample: Any, reduce: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return fairseq's losses, and store the routing of ``net_output`` in the sample.

        fairseq's ``forward`` does not return ``net_output``. :meth:`forward` made the sample for
        this call only.
        """
        if memory_configs_of(model):
            sample["routing"] = net_output[1]["routing"]
        return super().compute_loss(model, net_output, sample, reduce)

    def weights(self, configs: Mapping[str, MemoryConfig]) -> dict[str, dict[str, float]]:
        """Return the weights of the losses, each for the layers whose selectors score blocks.

        A weight of 0 is left out, so that no zero gradients flow through the scores.

        Args:
            configs: name of each sparse layer -> its memory.

        Returns:
            Name of each loss -> name of each layer on which it acts -> weight.

        Raises:
            UsageError: a loss has a weight, but no selector has scores, or none selects by them, or
                the scope does not fit.
        """
        selectors = {layer: config.selector_class for layer, config in configs.items()}
        asked = {"balance_loss": self.cfg.balance_loss_weight, "z_loss": self.cfg.z_loss_weight}
        weights = {}
        for name, weight in asked.items():
            scoring = {layer: cls for layer, cls in selectors.items() if cls.scores_blocks}
            if weight and selectors and not scoring:
                names = list(dict.fromkeys(cls.name for cls in selectors.values()))
                give = "gives" if len(names) == 1 else "give"
                option = f"--{name.replace('_', '-')}-weight {weight}"
                raise UsageError(
                    f"{option}: {' and '.join(names)} {give} blocks no score to act on"
                )
            if name == "balance_loss":
                scoring = {layer: cls for layer, cls in scoring.items() if cls.selects_by_scores}
                if weight and selectors and not scoring:
                    names = list(dict.fromkeys(cls.name for cls in selectors.values()))
                    selects = "selects" if len(names) == 1 else "select"
                    raise UsageError(
                        f"--balance-loss-weight {weight}: {' and '.join(names)} {selects} by a "
                        "fixed table"
                    )
            found = {
                layer: cls.default_balance_weight if weight is None else weight
                for layer, cls in scoring.items()
            }
            weights[name] = {layer: value for layer, value in found.items() if value}
        scope = str(self.cfg.balance_loss_scope)
        if scope != "micro" and selectors and not weights["balance_loss"]:
            raise UsageError(
                f"--balance-loss-scope {scope}: no balance loss has a weight; see "
                "--balance-loss-weight"
            )
        for layer in weights["balance_loss"]:
            if selectors[layer].balance_loss_kind == "entropy" and scope != "micro":
                raise UsageError(
                    f"--balance-loss-scope {scope}: {selectors[layer].name} balances by the "
                    "entropy of a micro-batch"
                )
        return weights

    def extra_loss(
        self, configs: Mapping[str, MemoryConfig], routing: dict[str, LayerRouting]
    ) -> Tensor | float:
        """Return the weighted balance and z losses of all layers: a scalar.

        Args:
            configs: name of each sparse layer -> its memory.
            routing: name of each sparse layer -> routing.
        """
        total: Tensor | float = 0.0
        for name, weights in self.weights(configs).items():
            # Layers of one weight together: models whose layers are alike sum up as they always
            # did, to the last bit.
            for weight in dict.fromkeys(weights.values()):
                losses = [
                    getattr(routing[layer], name) for layer in weights if weights[layer] == weight
                ]
                combined = torch.stack(losses).sum()
                if str(self.cfg.balance_loss_reduce) == "mean":
                    combined = combined / len(weights)
                total = total + weight * combined
        return total

    def routing_logs(
        self,
        configs: Mapping[str, MemoryConfig],
        routing: dict[str, LayerRouting],
        sample_size: Any,
        has_losses: bool,
        sends: bool = False,
    ) -> dict[str, Any]:
        """Return the sums of a micro-batch, which :meth:`reduce_metrics` adds up.

        Values stay on the accelerator, because reading them would make the host wait. The keys
        alone determine what is logged.

        Args:
            configs: name of each sparse layer -> its memory.
            routing: name of each sparse layer -> routing.
            sample_size: weight of the micro-batch.
            has_losses: whether layers that score blocks have losses.
            sends: whether layers send hidden states to other processes.

        Returns:
            Key -> sum.
        """
        logs: dict[str, Any] = {PER_LAYER: 1.0} if self.log_layers else {}
        for name, layer in routing.items():
            if has_losses and configs[name].selector_class.scores_blocks:
                logs[f"routing_balance_{name}"] = layer.balance_loss.data * sample_size
                logs[f"routing_scored_{name}"] = layer.counts.any() * sample_size
                logs[f"routing_tokens_{name}"] = layer.scored.data
                logs[f"routing_mass_{name}"] = layer.routed_mass.data
                logs[f"routing_entropy_{name}"] = layer.entropy.data
            if configs[name].balance_rate:
                logs[f"routing_bias_{name}"] = layer.bias_range.data
                logs[f"routing_passes_{name}"] = layer.counts.any()
            logs[f"routing_counts_{name}"] = layer.counts.data
            logs[f"routing_dropped_{name}"] = layer.dropped.data
            logs[f"routing_importance_{name}"] = layer.importance.data
            if sends:
                logs[f"{SENT}{name}"] = layer.sent.data
        return logs

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        """Add up the logs of micro-batches and processes.

        fairseq calls this function in each update, and reads values at its log interval. The
        function itself reads no value.
        """
        super().reduce_metrics(logging_outputs)
        first = logging_outputs[0]
        prefix = SUMS["counts"]
        layers = [key.removeprefix(prefix) for key in first if key.startswith(prefix)]
        if not layers:
            return

        def total(key: str) -> Any:
            return sum(log.get(key, 0) for log in logging_outputs)

        # A layer without scores has no balance loss.
        logged = {
            layer: {name for name, prefix in SUMS.items() if f"{prefix}{layer}" in first}
            for layer in layers
        }
        for layer in layers:
            for name in SUMS:
                if name in logged[layer]:
                    metrics.log_scalar_sum(f"_{name}_{layer}", total(f"{SUMS[name]}{layer}"))
        if f"{SENT}{layers[0]}" in first:
            sent = sum(total(f"{SENT}{layer}") for layer in layers)
            for meters in logged_meters():
                if "sent_bytes" not in meters:
                    meters.add_meter("sent_bytes", AverageMeter(round=0), priority=10)
                meters["sent_bytes"].update(sent.double())  # fp64: the mean is exact
        derived: dict[str, MeanOverLayers] = {}
        for name, ratio in RATIOS.items():
            having = [layer for layer in layers if logged[layer].issuperset(ratio.sums)]
            if not having:
                continue
            derived[name] = MeanOverLayers(ratio, having)
            if PER_LAYER in first:
                derived |= {f"{name}_{layer}": MeanOverLayers(ratio, [layer]) for layer in having}
        for meters in logged_meters():
            for name, derive in derived.items():
                if name not in meters:
                    meters.add_meter(name, MetersDict._DerivedMeter(derive), priority=20)


def memory_configs_of(model: Any) -> dict[str, MemoryConfig]:
    """Return name of each sparse layer of any model -> its memory; empty if it has none."""
    configs: dict[str, MemoryConfig] = getattr(model, "memory_configs", {})
    return configs
