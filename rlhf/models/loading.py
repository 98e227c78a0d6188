"""Loads and builds what stages share: tokenizers, language models, sequence classifiers.

Weights come from safetensors or GGUF only.
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
from rlhf.models import facts
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


def _may_be_hub_name(path: str) -> bool:
    """Whether `path` looks like ``owner/name`` or ``name`` of a model hub."""
    looks_local = os.path.isabs(path) or path.startswith((".", "~", "runs/"))
    return not looks_local and path.count("/") <= 1 and not Path(path).exists()


def check_model_path(path: str | None, key: str = "model.path") -> None:
    """A path that looks local must be a model's directory; other names are left to the hub.

    Raises UserError.
    """
    if path is None:
        raise UserError(f"{key} is not set: give the directory of a model (or model=tiny).")
    if _may_be_hub_name(path):
        return
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise UserError(f"{key}={path}: no such directory.{_directories_beside(directory)}")
    configs = ("config.json", "adapter_config.json")
    has_config = any((directory / name).exists() for name in configs)
    if not has_config and not any(directory.glob("*.gguf")):
        raise UserError(
            f"{key}={path}: holds no config.json, adapter_config.json or *.gguf, so it is not a "
            "model directory."
        )
    _refuse_pickles(directory, f"{key}={path}")


def _directories_beside(missing: Path) -> str:
    """A hint for a message: the directories beside the one that is missing."""
    if not missing.parent.is_dir():
        return ""
    names = sorted(path.name for path in missing.parent.iterdir() if path.is_dir())
    return f" Directories in {missing.parent}: {', '.join(names[:8])}." if names else ""


def _refuse_pickles(directory: Path, what: str) -> None:
    """Weights that exist only as pickles are refused: loading a pickle can run code."""
    if any(directory.glob("*.safetensors")) or any(directory.glob("*.gguf")):
        return
    pickles = []
    for suffix in ("*.bin", "*.pt", "*.pth"):
        pickles += [path.name for path in directory.glob(suffix)]
    pickles = sorted(name for name in pickles if name != "training_args.bin")
    if pickles:
        raise UserError(
            f"{what}: its weights are {', '.join(pickles[:3])}, pickles, which can run "
            "code when they are loaded. Expected *.safetensors: "
            "have whoever made them save them so (save_pretrained does)."
        )


def is_adapter(path: str | Path) -> bool:
    """Whether a directory holds an adapter alone, without a model of its own."""
    directory = Path(path).expanduser()
    has_config = (directory / "config.json").is_file()
    return (directory / "adapter_config.json").is_file() and not has_config


def base_directory(path: str | Path) -> Path | None:
    """The directory of the weights that `path` stands for.

    That is `path` itself, and for an adapter the base model that it names; None where the
    adapter's configuration can't be read.
    """
    directory = Path(path).expanduser()
    if not is_adapter(directory):
        return directory
    try:
        text = (directory / "adapter_config.json").read_text(encoding="utf-8")
        return Path(str(json.loads(text)["base_model_name_or_path"])).expanduser()
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def loads_as_it_is(path: str | Path) -> bool:
    """Whether transformers and vLLM can both start from `path`.

    They can from a whole model's directory and from a hub's name. An adapter or a GGUF file alone
    has to be written out first.
    """
    directory = Path(path).expanduser()
    if not directory.is_dir():
        return True
    if (directory / "adapter_config.json").exists():
        return False
    return (directory / "config.json").exists()


@contextlib.contextmanager
def readable(what: str) -> Iterator[None]:
    """Around a library that reads model files: any error becomes a UserError about `what`."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    # Damaged files raise errors of JSON, safetensors, tokenizers (Rust) and torch, and of code that
    # relies on a number.
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{what} can't be read ({type(error).__name__}: {first}). Restore its files, or give "
            "another directory."
        ) from error


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> Any:
    """A byte-level BPE tokenizer with four special tokens, trained on `texts`.

    Any string survives encoding and decoding. vocab_size: entries, special tokens included;
    max_length: tokens.
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
    """The tokenizer of ``cfg.path``, a directory, a hub's name or a GGUF file.

    Padding becomes the end-of-sequence token where the tokenizer has no padding token.
    chat_template: a template's name or a file, in place of the tokenizer's own. Raises UserError.
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
    if not cfg.gguf_file:
        _attach_files(tokenizer, str(cfg.path))
    return tokenizer


def _attach_files(tokenizer: Any, path: str) -> None:
    """Make known to `tokenizer` what the files of its model say of tokens. Raises UserError."""
    base = base_directory(path)
    where = path if base is None else str(base)
    config = _model_file(where, "config.json")
    facts.attach_ends(tokenizer, config, _model_file(where, "generation_config.json"))
    if not is_adapter(path):  # its base's embedding is resized when it is loaded
        facts.attach_rows(tokenizer, config, f"model.path={path}")


def _model_file(path: str, name: str) -> dict[str, Any]:
    """A JSON file of a model's directory or of a hub's model; {} where there is none."""
    from transformers.utils import cached_file

    with readable(f"model.path={path}: its {name}"):
        found = cached_file(
            path,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if found is None:
            return {}
        content = json.loads(Path(found).read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def load_or_train_tokenizer(
    cfg: ModelConfig, chat_template: str | None, texts: Iterable[str]
) -> Any:
    """A stage's tokenizer: the model's; for ``model=tiny`` without a path a tokenizer trained on
    the stage's own `texts`, which are read in no other case. `chat_template` replaces its template.
    """
    if cfg.kind is not ModelKind.tiny or cfg.path is not None:
        return load_tokenizer(cfg, chat_template)
    tokenizer = train_tokenizer(texts, cfg.tiny.vocab_size, cfg.tiny.max_positions)
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
    """`model` without leftovers of a GGUF file that save_pretrained or vLLM can't handle.

    The model's special tokens become those of the tokenizer.
    """
    has_config = getattr(model.config, "quantization_config", None) is not None
    if has_config and not getattr(model, "is_quantized", False):
        del model.config.quantization_config
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.bos_token_id = tokenizer.bos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        facts.set_ends(model, tokenizer)
        with readable("the model's generation_config.json"):
            facts.make_savable(model.generation_config)
    return model


def _loading_options(cfg: ModelConfig, path: str) -> dict[str, Any]:
    """Arguments of from_pretrained beside path and head."""
    options: dict[str, Any] = {
        "dtype": resolve_dtype(cfg.dtype),
        "trust_remote_code": cfg.trust_remote_code,
    }
    if cfg.gguf_file and path == cfg.path:
        from transformers import GgufConfig

        # As plain weights: packed ones can neither be trained nor saved.
        options["gguf_file"] = cfg.gguf_file
        options["quantization_config"] = GgufConfig(dequantize=True)
    else:
        options["use_safetensors"] = True
    if cfg.attn_implementation:
        options["attn_implementation"] = cfg.attn_implementation
    return options


def load_causal_lm(cfg: ModelConfig, tokenizer: Any, path: str | None = None) -> Any:
    """The language model of `path` or ``cfg.path``, or a new ``model=tiny``.

    It is on the CPU, in ``cfg.dtype``. A directory that holds only a PEFT adapter loads the base
    model and merges the adapter into it. Raises UserError.
    """
    from transformers import AutoModelForCausalLM

    path = path or cfg.path
    if cfg.kind is ModelKind.tiny and path is None:
        config = tiny_config(cfg.tiny, tokenizer)
        model = AutoModelForCausalLM.from_config(config, dtype=resolve_dtype(cfg.dtype))
        return _clean(model, tokenizer)
    check_model_path(path)
    assert path is not None
    if is_adapter(path):
        model = _merged_adapter(cfg, path)
    else:
        model = _whole(AutoModelForCausalLM, path, **_loading_options(cfg, path))
    return _clean(model, tokenizer)


def _merged_adapter(cfg: ModelConfig, path: str) -> Any:
    """The base model of an adapter with the adapter merged in."""
    from peft import AutoPeftModelForCausalLM

    with readable(f"the adapter {path}"), warnings.catch_warnings():
        # PEFT would fill missing weights with random numbers.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        model = AutoPeftModelForCausalLM.from_pretrained(
            path, dtype=resolve_dtype(cfg.dtype), trust_remote_code=cfg.trust_remote_code
        )
        return model.merge_and_unload()


def _whole(auto: Any, path: str, *, head: bool = True, **options: Any) -> Any:
    """``auto.from_pretrained`` of a directory that has every weight.

    Raises UserError where weights are missing, which transformers would fill with random numbers.
    head: whether the head must be there too; a classifier made of a language model gets a new head.
    """
    with readable(f"the model {path}"):
        model, info = auto.from_pretrained(path, output_loading_info=True, **options)
    prefix = "" if head else f"{model.base_model_prefix}."
    missing = sorted(name for name in info["missing_keys"] if name.startswith(prefix))
    if missing:
        shown = ", ".join(missing[:3])
        if len(missing) > 3:
            shown += f" and {len(missing) - 3} more"
        raise UserError(
            f"the model {path}: its weights lack {shown}, so it is not whole. Restore its files, "
            "or give another directory."
        )
    return model


def load_classifier(cfg: ModelConfig, tokenizer: Any, path: str | None = None) -> Any:
    """A sequence classifier of one label on the model of `path` or ``cfg.path``.

    The scalar head is new where the directory has none. Raises UserError.
    """
    from transformers import AutoModelForSequenceClassification

    path = path or cfg.path
    if cfg.kind is ModelKind.tiny and path is None:
        config = tiny_config(cfg.tiny, tokenizer)
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(
            config, dtype=resolve_dtype(cfg.dtype)
        )
        return _clean(model, tokenizer)
    check_model_path(path)
    assert path is not None
    options = _loading_options(cfg, path)
    model = _whole(AutoModelForSequenceClassification, path, head=False, num_labels=1, **options)
    return _clean(model, tokenizer)
