"""The range of each numeric option of fairseq's commands.

The ranges follow from fairseq's use of each number. Special values that are not listed have no
meaning in fairseq. ``None`` (not set) is always allowed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

LARGEST = 2**63 - 1
"""The largest whole number that the compiled parts of fairseq and PyTorch take."""


@dataclass(frozen=True)
class Range:
    """The numbers that an option may have. NaN and infinity are never allowed.

    Attributes:
        low, high: the smallest and the largest number.
        above, below: whether ``low`` and ``high`` themselves are not allowed.
        special: (number, meaning) of allowed numbers outside of the range.
        length: number of numbers in the option's list; 0: a single number; -1: one or more.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    special: tuple[tuple[float, str], ...] = ()
    length: int = 0

    def holds(self, number: Any) -> bool:
        """Return whether a number is in the range."""
        if not isinstance(number, int | float):
            return False
        if any(number == value for value, _ in self.special):
            return True
        low = number > self.low if self.above else number >= self.low
        high = number < self.high if self.below else number <= self.high
        return bool(low and high and math.isfinite(number))

    def reason(self, *numbers: Any) -> str:
        """Return in words what the numbers must be, given numbers that are not in the range."""
        whole = self.high == LARGEST
        parts = []
        if self.low == 0 and self.above:
            parts.append("positive")
        elif self.low > -math.inf:
            parts.append(f"{'above' if self.above else 'at least'} {self.low}")
        if self.high == math.inf:
            parts.append("finite")
        elif not whole or any(number > LARGEST for number in numbers):
            parts.append(f"{'below' if self.below else 'at most'} {self.high}")
        text = " and ".join(parts)
        if self.length:
            count = {-1: "one or more", 2: "two", 3: "three"}[self.length]
            text = f"{count} numbers, each {text}"
        for value, meaning in self.special:
            text += f", or {value} ({meaning})"
        return f"must be {text}"


def at_least(low: float, high: float = math.inf, **meanings: float) -> Range:
    """Return the range from ``low`` to ``high``, with special numbers by meaning."""
    special = tuple((value, name.replace("_", " ")) for name, value in meanings.items())
    return Range(low, high, special=special)


def whole(low: int, high: int = LARGEST, **meanings: float) -> Range:
    """Return the range of whole numbers from ``low``, with special numbers by meaning."""
    return at_least(low, high, **meanings)


FINITE = Range()
POSITIVE = Range(0, above=True)
NOT_NEGATIVE = Range(0)
RATE = Range(0, 1, below=True)
SHARE = Range(0, 1)
POSITIVE_SHARE = Range(0, 1, above=True)
COUNT, SIZE = whole(0), whole(1)
EVERY = whole(1, off=-1)
KEPT = Range(0, LARGEST, special=((-1, "all"),))
BETAS = Range(0, 1, below=True, length=2)
# fairseq adds the epoch to the seed. NumPy takes seeds below 2**32.
SEED = whole(0, 4_000_000_000)
WARMUP = {"warmup_updates": COUNT, "warmup_init_lr": Range(0, special=((-1, "chosen by fairseq"),))}


def sides(options: dict[str, Range]) -> dict[str, Range]:
    """Return options for the encoder and for the decoder, with the prefix of each."""
    return {f"{side}_{name}": r for side in ("encoder", "decoder") for name, r in options.items()}


RANGES: dict[str, dict[str, Range]] = {
    "common": {
        "log_interval": SIZE,
        "seed": SEED,
        "fp16_init_scale": SIZE,
        "fp16_scale_window": SIZE,
        "fp16_scale_tolerance": SHARE,
        "min_loss_scale": NOT_NEGATIVE,
        "threshold_loss_scale": NOT_NEGATIVE,
        "amp_batch_retries": COUNT,
        "amp_init_scale": SIZE,
        "amp_scale_window": SIZE,
        "empty_cache_freq": COUNT,
        "all_gather_list_size": SIZE,
        "model_parallel_size": SIZE,
    },
    "distributed_training": {
        "distributed_world_size": SIZE,
        "distributed_num_procs": SIZE,
        "distributed_rank": COUNT,
        "distributed_port": whole(0, 65535, none=-1),
        "device_id": COUNT,
        "bucket_cap_mb": COUNT,
        "heartbeat_timeout": Range(0, LARGEST, special=((-1, "off"),)),
        "slowmo_momentum": RATE,
        "localsgd_frequency": SIZE,
        "nprocs_per_node": SIZE,
        "pipeline_chunks": COUNT,
    },
    "dataset": {
        "num_workers": COUNT,
        "max_tokens": SIZE,
        "batch_size": SIZE,
        "required_batch_size_multiple": SIZE,
        "required_seq_len_multiple": SIZE,
        "data_buffer_size": COUNT,
        "validate_interval": SIZE,
        "validate_interval_updates": COUNT,
        "validate_after_updates": COUNT,
        "fixed_validation_seed": COUNT,
        "max_tokens_valid": SIZE,
        "batch_size_valid": SIZE,
        "max_valid_steps": COUNT,
        "curriculum": COUNT,
        "num_shards": SIZE,
        "shard_id": COUNT,
    },
    "optimization": {
        "max_epoch": COUNT,
        "max_update": COUNT,
        "stop_time_hours": NOT_NEGATIVE,
        "clip_norm": NOT_NEGATIVE,
        "update_freq": Range(1, LARGEST, length=-1),
        "lr": Range(0, length=-1),
        "stop_min_lr": Range(0, special=((-1, "off"),)),
    },
    "checkpoint": {
        "save_interval": SIZE,
        "save_interval_updates": COUNT,
        "keep_interval_updates": KEPT,
        "keep_interval_updates_pattern": EVERY,
        "keep_last_epochs": KEPT,
        "keep_best_checkpoints": KEPT,
        "patience": Range(0, LARGEST, special=((-1, "off"),)),
        "checkpoint_shard_count": SIZE,
    },
    "bmuf": {
        "block_lr": POSITIVE,
        "block_momentum": RATE,
        "global_sync_iter": SIZE,
        "warmup_iterations": COUNT,
    },
    "ema": {"ema_decay": SHARE, "ema_start_update": COUNT, "ema_update_freq": SIZE},
    "generation": {
        "beam": SIZE,
        "beam_mt": COUNT,
        "nbest": SIZE,
        "max_len_a": NOT_NEGATIVE,
        "max_len_b": COUNT,
        "max_len_a_mt": NOT_NEGATIVE,
        "max_len_b_mt": COUNT,
        "min_len": COUNT,
        "lenpen": FINITE,
        "lenpen_mt": FINITE,
        "unkpen": FINITE,
        "prefix_size": COUNT,
        "no_repeat_ngram_size": COUNT,
        "sampling_topk": EVERY,
        "sampling_topp": Range(0, 1, above=True, special=((-1, "off"),)),
        "temperature": POSITIVE,
        "diverse_beam_groups": EVERY,
        "diverse_beam_strength": FINITE,
        "diversity_rate": Range(0, special=((-1, "off"),)),
        "lm_weight": FINITE,
        "iter_decode_eos_penalty": NOT_NEGATIVE,
        "iter_decode_max_iter": COUNT,
        "iter_decode_with_beam": SIZE,
    },
    "eval_lm": {"context_window": COUNT, "softmax_batch": SIZE},
    "interactive": {"buffer_size": COUNT},
    "task": {
        "tokens_per_sample": SIZE,
        "output_dictionary_size": EVERY,
        "max_source_positions": SIZE,
        "max_target_positions": SIZE,
        "upsample_primary": EVERY,
        "num_batch_buckets": COUNT,
    },
    # The options of fairseq's Transformers, for every command.
    "model": {
        **sides(
            {
                "embed_dim": SIZE,
                "ffn_embed_dim": SIZE,
                "layers": SIZE,
                "attention_heads": SIZE,
                "layerdrop": SHARE,
            }
        ),
        "decoder_input_dim": SIZE,
        "decoder_output_dim": SIZE,
        "max_source_positions": SIZE,
        "max_target_positions": SIZE,
        "dropout": RATE,
        "attention_dropout": RATE,
        "activation_dropout": RATE,
        "relu_dropout": RATE,
        "adaptive_softmax_cutoff": Range(1, LARGEST, length=-1),
        "adaptive_input_cutoff": Range(1, LARGEST, length=-1),
        "adaptive_softmax_dropout": RATE,
        "adaptive_softmax_factor": POSITIVE,
        "adaptive_input_factor": POSITIVE,
        "character_embedding_dim": SIZE,
        "char_embedder_highway_layers": COUNT,
        "quant_noise_pq": SHARE,
        "quant_noise_pq_block_size": SIZE,
        "quant_noise_scalar": SHARE,
        "min_params_to_wrap": COUNT,
        "base_layers": COUNT,
        "base_sublayers": SIZE,
        "base_shuffle": COUNT,
    },
    "optimizer": {
        "weight_decay": NOT_NEGATIVE,
        "momentum": RATE,
        "adam_betas": BETAS,
        "adam_eps": POSITIVE,
        "adamax_betas": BETAS,
        "adamax_eps": POSITIVE,
        "lamb_betas": BETAS,
        "lamb_eps": POSITIVE,
        "adadelta_rho": SHARE,
        "adadelta_eps": POSITIVE,
        "adafactor_eps": Range(0, above=True, length=2),
        "clip_threshold": POSITIVE,
        "decay_rate": Range(high=0),
        "beta1": RATE,
    },
    "lr_scheduler": {
        **WARMUP,
        "min_lr": NOT_NEGATIVE,
        "max_lr": POSITIVE,
        "t_mult": at_least(1),
        "lr_period_updates": Range(0, above=True, special=((-1, "all of the training"),)),
        "lr_shrink": POSITIVE,
        "force_anneal": COUNT,
        "end_learning_rate": NOT_NEGATIVE,
        "power": NOT_NEGATIVE,
        "total_num_update": COUNT,
        "lr_threshold": NOT_NEGATIVE,
        "lr_patience": COUNT,
        "lr_deacy_period": SIZE,
        "lr_decay": POSITIVE_SHARE,
        "warmup_steps": COUNT,
        "hold_steps": COUNT,
        "decay_steps": COUNT,
        "phase_ratio": Range(0, 1, length=3),
        "init_lr_scale": NOT_NEGATIVE,
        "final_lr_scale": POSITIVE,
    },
    "lr_scheduler inverse_sqrt": {"warmup_updates": SIZE},
    "lr_scheduler reduce_lr_on_plateau": {"lr_shrink": Range(0, 1, above=True, below=True)},
    "lr_scheduler triangular": {"lr_period_updates": at_least(2)},
    "criterion": {
        "label_smoothing": RATE,
        "ignore_prefix_size": COUNT,
        "alignment_lambda": NOT_NEGATIVE,
        "rdrop_alpha": NOT_NEGATIVE,
    },
}
"""Option group, or group and choice -> option -> range. The range of a choice replaces the range of
its group."""
