"""Loads and builds what stages share: tokenizers, language models, sequence classifiers.

Weights come from safetensors or GGUF only.
"""

import copy
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from conf.choices import Dtype, ModelKind
from conf.schema import ModelConfig, TinyConfig, asked_tokens
from rlhf.models import facts
from rlhf.models.directories import (
    CLASSIFIER,
    Adapter,
    Contents,
    check_model_path,
    check_native_taken,
    contents,
    embedding_rows,
    readable,
)
from rlhf.models.parts import backbone_name, base_model, classifier_class, one_label_config
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

    held = check_model_path(cfg.path)
    extra = {"gguf_file": cfg.gguf_file} if cfg.gguf_file else {}
    with readable(f"model.path={cfg.path}: its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            held.tokenizer_place(), trust_remote_code=cfg.trust_remote_code, **extra
        )
    if not cfg.gguf_file and facts.has_vision(held.weights):
        from rlhf.models.processors import load_processor

        load_processor(held.weights, tokenizer, trust_remote_code=cfg.trust_remote_code)
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
        _attach_files(tokenizer, held)
    facts.add_tokens(tokenizer, cfg)
    return tokenizer


def _attach_files(tokenizer: Any, held: Contents) -> None:
    """Make known to `tokenizer` what the files of its model say of tokens. Raises UserError."""
    config = facts.model_file(held.weights, "config.json")
    facts.attach_ends(tokenizer, config, facts.model_file(held.weights, "generation_config.json"))
    rows = [embedding_rows(adapter) for adapter in held.adapters]
    brought = max((count for count in rows if count is not None), default=0)
    if brought > config.get("vocab_size", 0):
        config |= {"vocab_size": brought}  # `facts.make_room` gives it as many
    facts.attach_rows(tokenizer, config, f"model.path={held.path}")


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
    facts.add_tokens(tokenizer, cfg)
    return tokenizer


def tiny_config(tiny: TinyConfig, tokenizer: Any = None) -> Any:
    """The Llama configuration of ``model=tiny``; without a tokenizer it has all the tokens that one
    may get.
    """
    from transformers import LlamaConfig

    special: dict[str, Any] = {}
    if tokenizer is not None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            special[name] = getattr(tokenizer, name)
    return LlamaConfig(
        vocab_size=tiny.vocab_size if tokenizer is None else len(tokenizer),
        hidden_size=tiny.hidden_size,
        intermediate_size=tiny.intermediate_size,
        num_hidden_layers=tiny.layers,
        num_attention_heads=tiny.heads,
        num_key_value_heads=tiny.heads,
        max_position_embeddings=tiny.max_positions,
        tie_word_embeddings=tiny.tie_embeddings,
        **special,
    )


def _clean(model: Any, tokenizer: Any, place: str | None = None) -> Any:
    """`model`, read from `place`, without leftovers of a GGUF file that save_pretrained or vLLM
    can't handle, with rows for added tokens and the tokenizer's special tokens. The padding token
    stays the model's, since some families (XGLM, RoBERTa) count positions from it; transformers'
    classifiers look for a row's end by it.
    """
    facts.make_rows(model, tokenizer, place)
    has_config = getattr(model.config, "quantization_config", None) is not None
    if has_config and not getattr(model, "is_quantized", False):
        del model.config.quantization_config
    looks_for_padding = type(model).__name__.endswith("ForSequenceClassification")
    if looks_for_padding or getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.bos_token_id = tokenizer.bos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        facts.set_ends(model, tokenizer)
        with readable("the model's generation_config.json"):
            facts.make_savable(model.generation_config)
    return model


def _loading_options(cfg: ModelConfig, held: Contents) -> dict[str, Any]:
    """Arguments of from_pretrained beside path and head."""
    options: dict[str, Any] = {
        "dtype": resolve_dtype(cfg.dtype),
        "trust_remote_code": cfg.trust_remote_code,
    }
    if cfg.gguf_file and held.path == cfg.path:
        from transformers import GgufConfig

        # As plain weights: packed ones can neither be trained nor saved.
        options["gguf_file"] = cfg.gguf_file
        options["quantization_config"] = GgufConfig(dequantize=True)
    else:
        options["use_safetensors"] = True
    if cfg.attn_implementation:
        options["attn_implementation"] = cfg.attn_implementation
    return options


def load_causal_lm(
    cfg: ModelConfig, tokenizer: Any, path: str | None = None, *, native: bool = False
) -> Any:
    """The language model of `path` or ``cfg.path``, or a new ``model=tiny``.

    It is on the CPU, in ``cfg.dtype``, and all of it trains. An adapter is merged into its base
    (`rlhf.models.directories.contents`); one that no weights can hold stays beside it, in PEFT's
    model, where `native` models are taken: nothing of them trains. Raises UserError.
    """
    from transformers import AutoModelForCausalLM

    path = path or cfg.path
    if cfg.kind is ModelKind.tiny and path is None:
        config = tiny_config(cfg.tiny, tokenizer)
        model = AutoModelForCausalLM.from_config(config, dtype=resolve_dtype(cfg.dtype))
        return _clean(model, tokenizer)
    held = check_model_path(path)
    check_native_taken(held, native)
    model = _language_model(cfg, held)
    _clean(base_model(model), tokenizer, path)
    return model


def _language_model(cfg: ModelConfig, held: Contents) -> Any:
    options = _loading_options(cfg, held)
    kind = _language_class(held.weights, cfg.trust_remote_code)
    model = _whole(kind, held.weights, **options)
    for adapter in held.adapters:
        if adapter.task == CLASSIFIER:
            raise UserError(
                f"the adapter {adapter.directory} is a classifier's (task_type {CLASSIFIER}), as "
                "stage=reward trains them: it has no language model. Expected a policy's."
            )
        model = _merged(model, adapter, held)
    return model


def _language_class(path: str, trust_remote_code: bool) -> Any:
    """What loads the language model at `path`. Raises UserError."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if not facts.has_vision(path):
        return AutoModelForCausalLM
    with readable(f"the model {path}: its configuration"):
        return facts.language_class(
            AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        )


def _merged(model: Any, adapter: Adapter, held: Contents) -> Any:
    """`model` with the adapter merged into its weights, all of which train again; in PEFT's model,
    frozen, where weights can't hold it.
    """
    from peft import PeftModel

    name = str(adapter.directory)
    if name != held.path:
        name += f" of {held.path}"
    with readable(f"the adapter {name}"), warnings.catch_warnings():
        # PEFT would fill missing weights with random numbers.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        facts.make_room(model, embedding_rows(adapter))
        adapted = PeftModel.from_pretrained(model, str(adapter.directory))
        if adapter.is_native:
            return adapted
        return adapted.merge_and_unload().requires_grad_(True)


def without_weights(cfg: ModelConfig, *, classifier: bool = False) -> Any | None:
    """The modules of the model in a directory, or of ``model=tiny``, on the meta device; None for a
    GGUF file and a hub's name. Raises UserError.
    """
    from transformers import AutoConfig

    trust_remote_code = cfg.trust_remote_code
    held = None if cfg.path is None else contents(cfg.path)
    if cfg.gguf_file is not None or (held is not None and not held.has_config):
        return None
    with readable(f"the model {cfg.path}: its configuration"), torch.device("meta"):
        if held is None:
            config = tiny_config(cfg.tiny)
        else:
            config = AutoConfig.from_pretrained(held.weights, trust_remote_code=trust_remote_code)
        if classifier:
            config.num_labels = 1
            return classifier_class(config, trust_remote_code)(config)
        kind = facts.language_class(config)
        return kind.from_config(config, trust_remote_code=trust_remote_code)


def starts_whole(cfg: ModelConfig) -> bool:
    """Whether ``cfg.path`` holds whole weights, from which transformers, PEFT and vLLM all start;
    adapters, GGUF files, added tokens and a new ``model=tiny`` have to be written out first
    (`write_whole`).
    """
    if cfg.path is None or cfg.gguf_file is not None or asked_tokens(cfg):
        return False
    return contents(cfg.path).loads_as_it_is


def write_whole(model: Any, tokenizer: Any, directory: str | Path) -> str:
    """Write a model of `load_causal_lm` or `load_classifier` with its tokenizer as whole weights,
    from which vLLM and every other library starts; returns the directory.
    """
    model.save_pretrained(directory)
    facts.save_tokenizer(tokenizer, directory)
    return str(directory)


def _whole(
    auto: Any, path: str, *, head: bool = True, in_memory: bool = False, **options: Any
) -> Any:
    """``auto.from_pretrained`` of a directory that has every weight, or (`in_memory`) of the
    weights in options["state_dict"].

    Raises UserError where weights are missing, which transformers would fill with random numbers.
    head: whether the head must be there too; a classifier made of a language model gets a new head.
    """
    source = None if in_memory else path
    with readable(f"the model {path}"):
        model, info = auto.from_pretrained(source, output_loading_info=True, **options)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(
            f"the model {path} is an adapter on a hub. Expected a directory: download it, and give "
            "its path, so that it is merged into its base."
        )
    prefix = "" if head else f"{backbone_name(model)}."
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


def load_classifier(
    cfg: ModelConfig, tokenizer: Any, path: str | None = None, *, native: bool = False
) -> Any:
    """A sequence classifier of one label on the model of `path` or ``cfg.path``; `native` as in
    `load_causal_lm`.

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
    held = check_model_path(path)
    check_native_taken(held, native)
    model = _classifier(cfg, held)
    _clean(base_model(model), tokenizer, path)
    return model


def _classifier(cfg: ModelConfig, held: Contents) -> Any:
    """A classifier: of the whole weights, or of a language model with its adapters merged in; then
    adapters that were trained on a classifier.
    """
    tasks = [adapter.task for adapter in held.adapters]
    policy = tasks.index(CLASSIFIER) if CLASSIFIER in tasks else len(tasks)
    # the names in a picture model's files are those of its class, which a classifier's is not
    if policy == 0 and not facts.is_picture_policy(held.weights):
        options = _loading_options(cfg, held)
        with readable(f"the model {held.path}"):
            config = one_label_config(held.weights, cfg.trust_remote_code, options.get("gguf_file"))
            kind = classifier_class(config, cfg.trust_remote_code)
        model = _whole(kind, held.weights, head=False, config=config, **options)
    else:
        merged = _language_model(cfg, replace(held, adapters=held.adapters[:policy]))
        model = _with_scalar_head(merged, cfg, held.path)
    for adapter in held.adapters[policy:]:
        model = _merged(model, adapter, held)
    return model


def _with_scalar_head(model: Any, cfg: ModelConfig, path: str) -> Any:
    """A classifier of one label with the weights of a language model, and a new head."""
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    with readable(f"the model {path}"):
        kind = classifier_class(config, cfg.trust_remote_code)
    return _whole(
        kind,
        path,
        head=False,
        in_memory=True,
        config=config,
        state_dict=model.state_dict(),
        dtype=resolve_dtype(cfg.dtype),
    )
