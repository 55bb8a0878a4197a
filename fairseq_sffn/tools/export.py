"""Write a language model as a folder that transformers loads without fairseq."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from fairseq import checkpoint_utils, models
from fairseq.data import Dictionary
from fairseq.models.transformer_lm import TransformerLanguageModel
from omegaconf import OmegaConf
from torch import Tensor

from ..checkpoints.loading import KEY, add_flags_to
from ..errors import UsageError
from ..export.description import check_exportable, describe, describe_losses
from ..export.tensor_files import library, parse_size, save_model
from ..export.tokenizer_check import check_words
from ..export.tokenizer_files import read_gpt2_bpe, read_sentencepiece, write_tokenizer
from ..export.vendoring import copy_modules
from ..models.plugin_model import PluginModel
from .zero_shot import load_model, parse_overrides

TIED = "decoder.output_projection.weight"
"""Parameter that an exported model lacks if it is the embedding."""
MODULES = ("export.hugging_face.modeling_sffn",)
TOKENIZER_MODULE = "export.hugging_face.tokenization_sffn"
PIPELINES = {
    "text-generation": {
        "impl": "tokenization_sffn.SFFNTextGenerationPipeline",
        "pt": ["AutoModelForCausalLM"],
    }
}
"""Task of ``transformers.pipeline`` -> the class for it, in a folder with a tokenizer."""
STORED = ("model", "task", "criterion", "common")
"""Parts of the training's configuration that the folder keeps."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``fairseq-sffn export``."""
    parser.add_argument("checkpoint", type=Path, help="the .pt file, sharded or not")
    parser.add_argument("output", type=Path, help="the folder to write")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with the model's dict.txt, as in training"
    )
    parser.add_argument(
        "--sentencepiece",
        type=Path,
        metavar="MODEL",
        help="SentencePiece model (BPE or unigram) that split the training text, for a tokenizer",
    )
    parser.add_argument(
        "--gpt2-bpe",
        type=Path,
        nargs=2,
        metavar=("ENCODER.JSON", "VOCAB.BPE"),
        help="the files of GPT-2's encoder that split the training text, for a tokenizer",
    )
    parser.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="largest size of a file with weights, such as 500MB (default: 5GB)",
    )
    parser.add_argument(
        "--model-overrides", default="{}", metavar="DICT", help="as for fairseq-eval-lm"
    )
    add_flags_to(parser)


def run(args: argparse.Namespace) -> str:
    """Write the folder, and return what ``fairseq-sffn export`` prints.

    Everything is read and checked before anything is written.

    Raises:
        UsageError: the checkpoint or a tokenizer cannot be read or exported, or the folder is
            there. The message names the flag and the value.
    """
    library()
    max_size = parse_size(args.max_shard_size)
    if args.output.exists():
        raise UsageError(f"{args.output}: is there already")
    if not args.output.parent.is_dir():
        raise UsageError(f"{args.output}: there is no folder {args.output.parent}")
    if args.sentencepiece and args.gpt2_bpe:
        raise UsageError("--gpt2-bpe: there is --sentencepiece already")
    overrides = parse_overrides(args.model_overrides)
    state = checkpoint_utils.load_checkpoint_to_cpu(str(args.checkpoint), overrides)
    options = model_options(state["cfg"].model)
    check_exportable(options)
    model, task = load_model(args.checkpoint, args.data, overrides)
    dictionary = task.source_dictionary
    tokenizer = read_tokenizer(args, dictionary)
    add_bos = bool(task.args.add_bos_token)
    description = describe(model, options)
    tensors = exported_tensors(model, state["model"], description["tied_embeddings"])
    start = dictionary.bos() if add_bos else dictionary.eos()
    ids = {
        "bos_token_id": start,
        "eos_token_id": dictionary.eos(),
        "pad_token_id": dictionary.pad(),
    }
    config = {
        "architectures": ["SFFNForCausalLM"],
        "model_type": "fairseq_sffn",
        "auto_map": {
            "AutoConfig": "modeling_sffn.SFFNConfig",
            "AutoModelForCausalLM": "modeling_sffn.SFFNForCausalLM",
        },
        "torch_dtype": dtype_name(tensors["decoder.embed_tokens.weight"]),
        **description,
        **ids,
        **({} if tokenizer is None else {"custom_pipelines": PIPELINES}),
        **describe_losses(model, state["cfg"].get("criterion")),
        "fairseq": stored_configuration(state),
    }
    generation = {
        **ids,
        # fairseq's generator never predicts padding, and no end directly behind the start.
        "suppress_tokens": [dictionary.pad()],
        "min_length": 2,
    }
    partial = args.output.with_name(f".{args.output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
    except OSError as error:
        raise UsageError(f"{args.output}: cannot be made: {error.strerror}") from error
    try:
        files = save_model(tensors, partial, max_size)
        write_json(partial / "config.json", config)
        write_json(partial / "generation_config.json", generation)
        selectors = [memory["selector"] for memory in description["memories"].values()]
        modules = MODULES if tokenizer is None else (*MODULES, TOKENIZER_MODULE)
        copy_modules(modules, selectors, partial)
        shutil.copyfile(args.data / "dict.txt", partial / "dict.txt")
        if tokenizer is not None:
            write_tokenizer(tokenizer, partial, add_bos, description["max_position_embeddings"])
        partial.rename(args.output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    count = sum(tensor.numel() for tensor in tensors.values())
    lacking = "" if tokenizer is not None else ", without a tokenizer"
    return f"{args.output}: {count:,} numbers in {len(files)} file{'s' * (len(files) > 1)}{lacking}"


def read_tokenizer(args: argparse.Namespace, dictionary: Dictionary) -> dict[str, Any] | None:
    """Return the settings of the tokenizer; ``None``: no flag names one.

    Raises:
        UsageError: it cannot be read, or did not split the data.
    """
    if args.sentencepiece:
        what = f"--sentencepiece {args.sentencepiece}"
        settings = read_sentencepiece(args.sentencepiece, dictionary)
    elif args.gpt2_bpe:
        encoder, merges = args.gpt2_bpe
        what = f"--gpt2-bpe {encoder} {merges}"
        settings = read_gpt2_bpe(encoder, merges, dictionary)
    else:
        return None
    check_words(what, settings, args.data, dictionary)
    return settings


def model_options(stored: Any) -> Any:
    """Return a language model's options, with the defaults of missing ones.

    Args:
        stored: the options in a checkpoint.

    Raises:
        UsageError: the model is no Transformer language model.
    """
    name = getattr(stored, "_name", None) or getattr(stored, "arch", None)
    cls = models.ARCH_MODEL_REGISTRY.get(name) or models.MODEL_REGISTRY.get(name)
    if cls is None or not issubclass(cls, TransformerLanguageModel):
        raise UsageError(f"--arch {name}: fairseq-sffn export is for Transformer language models")
    return cls.options(stored) if issubclass(cls, PluginModel) else stored


def exported_tensors(model: Any, stored: dict[str, Tensor], tied: bool) -> dict[str, Tensor]:
    """Return the checkpoint's tensors under the names of the exported model.

    Args:
        model: the model into which fairseq loads the checkpoint.
        stored: the checkpoint's tensors, in the dtypes of the checkpoint.
        tied: whether the embedding is the output projection.

    Raises:
        UsageError: the checkpoint is older than fairseq's names of today.
    """
    wanted = dict(model.state_dict())
    if tied:
        del wanted[TIED]
    for name, tensor in wanted.items():
        if name not in stored:
            raise UsageError(f"the checkpoint has no {name}, which models of today have")
        wanted[name] = stored[name].to(tensor.device)
    if not wanted["decoder.version"].item() > 2:
        raise UsageError("the checkpoint is of fairseq before 0.9, whose models end otherwise")
    return wanted


def dtype_name(tensor: Tensor) -> str:
    """Return the name of a tensor's dtype in transformers' configurations."""
    return str(tensor.dtype).removeprefix("torch.")


def stored_configuration(state: dict[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint needs besides tensors: the configuration, and parameters' names.

    Args:
        state: content of a checkpoint.
    """
    plain: Any = OmegaConf.to_container(state["cfg"], resolve=True, enum_to_str=True)
    kept = {name: plain.get(name) for name in STORED}
    kept["task"]["data"] = None
    if (names := state.get(KEY)) is not None:
        kept[KEY] = {name: list(names[name]) for name in ("parameters", "sharded")}
    return kept


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file for people to read."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
