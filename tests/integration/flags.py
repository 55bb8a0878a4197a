"""Flags of fairseq's commands, and the example as flags and as settings of hydra."""

from omegaconf import OmegaConf

from tests import commands
from tests.models.small_lm import PLAN

MODELS = (*commands.MODELS, "sffn")
EVERY_SAMPLE = ("--required-batch-size-multiple", "1")
"""Flags without which fairseq-train leaves out a last batch whose size is no multiple of 8."""
SENTENCES = ("--task", "language_modeling", "--sample-break-mode", "eos")
CONFIG_DIR = commands.EXAMPLES / "config"
EXAMPLE = OmegaConf.load(CONFIG_DIR / "avgk_tiny.yaml")
RECIPE = (
    *("--task", "sffn_language_modeling", "--no-epoch-checkpoints", "--adam-betas", "(0.9,0.98)"),
    *("--lr", f"{EXAMPLE.optimization.lr[0]}", "--clip-norm", f"{EXAMPLE.optimization.clip_norm}"),
    *("--warmup-updates", f"{EXAMPLE.lr_scheduler.warmup_updates}"),
    *("--total-num-update", f"{EXAMPLE.lr_scheduler.total_num_update}"),
    *("--lr-scheduler", "polynomial_decay"),
)
"""The example as flags, without those that ``commands.train`` sets."""
SMALLER = (
    *("common.log_format=json", "common.log_interval=1", "common.no_progress_bar=true"),
    *("task.tokens_per_sample=16", "dataset.batch_size=8", "dataset.num_workers=0"),
    *("optimization.max_update=6", "+model.decoder_layers=2", "+model.decoder_embed_dim=16"),
    *("+model.decoder_ffn_embed_dim=32", "+model.decoder_attention_heads=2"),
)
"""The settings of ``commands.train`` for hydra."""
OF_MODEL = {
    "avgk": ("+model.sffn_block_size=8",),
    "rand_hash": ("+model.sffn_block_size=8",),
    "moe": ("+model.sffn_block_size=8",),
    "sigma_moe": ("+model.sffn_block_size=8",),
    "hash_moe": ("+model.sffn_block_size=8",),
    "pkm": ("+model.sffn_active_blocks=16",),
    "sffn": (
        *("+model.sffn_selector=avgk", "+model.sffn_block_size=8"),
        "+model.sffn_gate=sigmoid",
    ),
    # Hydra splits an option at commas unless it is quoted.
    "mixed": (
        *("model.decoder_layers=3", f"+model.sffn_layers='{PLAN}'"),
        "+model.hash_table=bigram",
    ),
}
