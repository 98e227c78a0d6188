"""Loading and building what stages share: tokenizers, language models, sequence classifiers.
Weights only from safetensors or GGUF.
"""

import contextlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from conf.choices import Dtype, ModelKind
from conf.schema import ModelConfig, TinyConfig
from rlhf.models.templates import template_text
from rlhf.types import UserError

BOS, EOS, PAD, UNK = "<|bos|>", "<|eos|>", "<|pad|>", "<|unk|>"


def resolve_dtype(dtype: Dtype) -> torch.dtype:
    """``auto`` is float32 on CPU and bfloat16 on CUDA."""
    if dtype is Dtype.auto:
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {
        Dtype.float32: torch.float32,
        Dtype.bfloat16: torch.bfloat16,
        Dtype.float16: torch.float16,
    }[dtype]


def check_model_path(path: str | None, key: str = "model.path") -> None:
    """A path-like name must be a directory with a config; anything else may be a hub name. Raises
    UserError.
    """
    if path is None:
        raise UserError(f"{key} is not set: give the directory of a model (or model=tiny).")
    looks_local = (
        os.path.isabs(path)
        or path.startswith((".", "~"))
        or path.count("/") > 1
        or Path(path).exists()
    )
    if not looks_local and path.count("/") <= 1 and not path.startswith("runs/"):
        return  # owner/name or name: the hub's business
    place = Path(path).expanduser()
    if not place.is_dir():
        near = (
            [p.name for p in place.parent.iterdir() if p.is_dir()] if place.parent.is_dir() else []
        )
        hint = f" Directories in {place.parent}: {', '.join(sorted(near)[:8])}." if near else ""
        raise UserError(f"{key}={path}: no such directory.{hint}")
    if not any((place / n).exists() for n in ("config.json", "adapter_config.json")) and not list(
        place.glob("*.gguf")
    ):
        raise UserError(
            f"{key}={path}: holds no config.json, adapter_config.json or *.gguf, so it is not a "
            "model directory."
        )
    pickles = sorted(
        p.name
        for suffix in ("*.bin", "*.pt", "*.pth")
        for p in place.glob(suffix)
        if p.name != "training_args.bin"
    )
    if pickles and not any(any(place.glob(suffix)) for suffix in ("*.safetensors", "*.gguf")):
        raise UserError(
            f"{key}={path}: its weights are {', '.join(pickles[:3])}, pickles, which can run "
            "code when they are loaded. Expected *.safetensors: "
            "have whoever made them save them so (save_pretrained does)."
        )


def is_adapter(path: str | Path) -> bool:
    """Whether a directory holds an adapter alone, without a model of its own."""
    directory = Path(path).expanduser()
    has_config = (directory / "config.json").is_file()
    return (directory / "adapter_config.json").is_file() and not has_config


def base_directory(path: str | Path) -> Path | None:
    """The directory of the weights that `path` stands for: itself, or of an adapter the base that
    it names; None for an adapter whose configuration can't be read.
    """
    directory = Path(path).expanduser()
    if not is_adapter(directory):
        return directory
    text = (directory / "adapter_config.json").read_text(encoding="utf-8")
    try:
        return Path(str(json.loads(text)["base_model_name_or_path"])).expanduser()
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def loads_as_it_is(path: str | Path) -> bool:
    """Whether transformers and vLLM both start from `path`: a whole model's directory, or a hub's
    name; an adapter, or a GGUF file alone, has to be written out first.
    """
    directory = Path(path).expanduser()
    if not directory.is_dir():
        return True
    if (directory / "adapter_config.json").exists():
        return False
    return (directory / "config.json").exists()


@contextlib.contextmanager
def readable(what: str) -> Iterator[None]:
    """Around a library that reads files of others: whatever it makes of damaged ones becomes a
    UserError that begins with `what`.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    # of damaged files come errors of JSON, safetensors, tokenizers' Rust, torch, and of code that
    # trusts a number
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{what} can't be read ({type(error).__name__}: {first}). Restore its files, or give "
            "another directory."
        ) from error


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> Any:
    """A byte-level BPE tokenizer with four special tokens, trained on `texts`; any string
    round-trips.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token=None))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD, UNK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(cfg: ModelConfig, chat_template: str | None = None) -> Any:
    """The tokenizer of ``cfg.path`` (GGUF included); a pad token is set where there is none.
    `chat_template`: a name or a file.
    """
    from transformers import AutoTokenizer

    check_model_path(cfg.path)
    extra = {"gguf_file": cfg.gguf_file} if cfg.gguf_file else {}
    with readable(f"model.path={cfg.path}: its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            cfg.path, trust_remote_code=cfg.trust_remote_code, **extra
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.path={cfg.path}: its tokenizer has no end-of-sequence token, so no response "
            "could end."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template is not None:
        tokenizer.chat_template = template_text(chat_template)
    return tokenizer


def tiny_config(tiny: TinyConfig, tokenizer: Any) -> Any:
    """The Llama configuration of ``model=tiny``."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=tiny.hidden_size,
        intermediate_size=tiny.intermediate_size,
        num_hidden_layers=tiny.layers,
        num_attention_heads=tiny.heads,
        num_key_value_heads=tiny.heads,
        max_position_embeddings=tiny.max_positions,
        tie_word_embeddings=tiny.tie_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _clean(model: Any, tokenizer: Any) -> Any:
    """What a GGUF file or a foreign checkpoint leaves behind and save_pretrained or vLLM would trip
    over.
    """
    if getattr(model.config, "quantization_config", None) is not None and not getattr(
        model, "is_quantized", False
    ):
        del model.config.quantization_config
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.bos_token_id = tokenizer.bos_token_id
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def _gguf(name: str) -> dict[str, Any]:
    """Arguments that load a GGUF file as plain weights: packed ones can neither be trained nor
    saved.
    """
    from transformers import GgufConfig

    return {"gguf_file": name, "quantization_config": GgufConfig(dequantize=True)}


def load_causal_lm(cfg: ModelConfig, tokenizer: Any, path: str | None = None) -> Any:
    """The language model of ``path`` or ``cfg.path``, or a fresh ``model=tiny``; on the CPU, in
    ``cfg.dtype``.

    A directory that holds only a PEFT adapter loads its base model and merges the adapter in.
    """
    from transformers import AutoModelForCausalLM

    dtype = resolve_dtype(cfg.dtype)
    path = path or cfg.path
    if cfg.kind is ModelKind.tiny and path is None:
        return _clean(
            AutoModelForCausalLM.from_config(tiny_config(cfg.tiny, tokenizer), dtype=dtype),
            tokenizer,
        )
    check_model_path(path)
    assert path is not None
    extra: dict[str, Any] = (
        _gguf(cfg.gguf_file) if cfg.gguf_file and path == cfg.path else {"use_safetensors": True}
    )
    if cfg.attn_implementation:
        extra["attn_implementation"] = cfg.attn_implementation
    if is_adapter(path):
        from peft import AutoPeftModelForCausalLM

        with readable(f"the adapter {path}"), warnings.catch_warnings():
            # PEFT would fill them with random numbers
            warnings.filterwarnings("error", message="Found missing adapter keys")
            model = AutoPeftModelForCausalLM.from_pretrained(
                path, dtype=dtype, trust_remote_code=cfg.trust_remote_code
            ).merge_and_unload()
    else:
        model = _whole(
            AutoModelForCausalLM,
            path,
            dtype=dtype,
            trust_remote_code=cfg.trust_remote_code,
            **extra,
        )
    return _clean(model, tokenizer)


def _whole(auto: Any, path: str, *, head: bool = True, **options: Any) -> Any:
    """``from_pretrained`` that raises UserError for a directory that lacks weights, which
    transformers would fill with random numbers.

    head: whether the head has to be there, too; a classifier made of a language model gets a fresh
    one.
    """
    with readable(f"the model {path}"):
        model, info = auto.from_pretrained(path, output_loading_info=True, **options)
    prefix = "" if head else f"{model.base_model_prefix}."
    missing = sorted(name for name in info["missing_keys"] if name.startswith(prefix))
    if missing:
        shown = ", ".join(missing[:3]) + (
            f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        )
        raise UserError(
            f"the model {path}: its weights lack {shown}, so it is not whole. Restore its files, "
            "or give another directory."
        )
    return model


def load_classifier(cfg: ModelConfig, tokenizer: Any, path: str | None = None) -> Any:
    """The same backbone with a fresh (or saved) scalar head: AutoModelForSequenceClassification,
    one label.
    """
    from transformers import AutoModelForSequenceClassification

    dtype = resolve_dtype(cfg.dtype)
    path = path or cfg.path
    if cfg.kind is ModelKind.tiny and path is None:
        config = tiny_config(cfg.tiny, tokenizer)
        config.num_labels = 1
        return _clean(
            AutoModelForSequenceClassification.from_config(config, dtype=dtype), tokenizer
        )
    check_model_path(path)
    assert path is not None
    extra: dict[str, Any] = (
        _gguf(cfg.gguf_file) if cfg.gguf_file and path == cfg.path else {"use_safetensors": True}
    )
    if cfg.attn_implementation:
        extra["attn_implementation"] = cfg.attn_implementation
    options = {"num_labels": 1, "dtype": dtype, "trust_remote_code": cfg.trust_remote_code, **extra}
    model = _whole(AutoModelForSequenceClassification, path, head=False, **options)
    return _clean(model, tokenizer)
