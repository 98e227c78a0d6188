"""A GGUF file (github.com/ggml-org/ggml, docs/gguf.md) from a model of transformers, by the package
gguf; and whether its vocabulary reads back as the tokenizer's.
"""

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conf.stages import GGUFType
from rlhf.export import families, vocabulary
from rlhf.export.families import Family
from rlhf.export.vocabulary import UNREAD, Vocabulary
from rlhf.models.directories import readable
from rlhf.models.turns import plain_ids
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.export")
_LICENSE_KEY = "unknown"  # what a file says where nobody told


def write_file(
    path: Path,
    model: Any,
    family: Family,
    words: Vocabulary,
    kind: GGUFType,
    *,
    title: str,
    license_name: str | None,
) -> None:
    """Write `model` [float32] to `path`, its matrices as `kind`, its vectors as float32; one tensor
    is in memory beside the model at a time. Raises UserError.
    """
    import gguf

    rows = int(model.get_input_embeddings().weight.shape[0])
    writer = gguf.GGUFWriter(path, family.name)
    writer.add_type("model")
    writer.add_name(title)
    writer.add_license(license_name or _LICENSE_KEY)
    writer.add_file_type(int(_file_type(kind)))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    families.header(writer, model.config, rows)
    vocabulary.write(writer, words)
    kinds = {}
    for name, tensor in families.tensors_of(model, family):
        kinds[name] = _tensor_type(tensor, kind)
        _announce(writer, name, tensor, kinds[name])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in families.tensors_of(model, family):
            writer.write_tensor_data(_data(tensor, kinds[name]))
    finally:
        writer.close()
    _tell_kept(kinds, kind)


def _file_type(kind: GGUFType) -> Any:
    """llama.cpp's name of what most tensors are."""
    import gguf

    types = gguf.LlamaFileType
    return {
        GGUFType.f32: types.ALL_F32,
        GGUFType.f16: types.MOSTLY_F16,
        GGUFType.bf16: types.MOSTLY_BF16,
        GGUFType.q8_0: types.MOSTLY_Q8_0,
    }[kind]


def _tensor_type(tensor: Tensor, kind: GGUFType) -> Any:
    """How a tensor is written: vectors in full, and matrices whose rows don't divide into a type's
    blocks as float16.
    """
    import gguf

    types = gguf.GGMLQuantizationType
    if tensor.ndim < 2:
        return types.F32
    wanted = types[kind.name.upper()]
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if tensor.shape[-1] % block == 0 else types.F16


def _announce(writer: Any, name: str, tensor: Tensor, kind: Any) -> None:
    """Give a tensor its place in the file."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[kind]
    total = math.prod(tensor.shape) // block * size
    shape = tuple(tensor.shape)
    writer.add_tensor_info(name, shape, np.dtype(np.float32), total, raw_dtype=kind)


def _data(tensor: Tensor, kind: Any) -> "np.ndarray[Any, Any]":
    import gguf

    if kind is gguf.GGMLQuantizationType.F16:
        _refuse_overflow(tensor)
    numbers: np.ndarray[Any, Any] = gguf.quantize(tensor.float().numpy(), kind)
    return numbers


def _refuse_overflow(tensor: Tensor) -> None:
    largest = float(tensor.abs().max())
    if largest > torch.finfo(torch.float16).max:
        raise UserError(
            f"stage.gguf=[f16]: a weight of {largest:g} is beyond float16. Write bf16 or f32."
        )


def _tell_kept(kinds: dict[str, Any], kind: GGUFType) -> None:
    """Log matrices that are not of the wished type."""
    import gguf

    half = gguf.GGMLQuantizationType.F16
    kept = [name for name, held in kinds.items() if held is half and kind is not GGUFType.f16]
    if kept:
        LOG.warning(
            "%s: %d matrices are float16, since their rows don't divide into blocks (%s).",
            kind.value,
            len(kept),
            ", ".join(kept[:3]),
        )


# ---- read again ----


def read_file(path: Path, config: Any = None) -> Any:
    """The model of a file, in float32. `config`: None: the file's own. Raises UserError."""
    from transformers import AutoModelForCausalLM, GgufConfig

    options: dict[str, Any] = {} if config is None else {"config": config}
    with readable(str(path)):
        model, info = AutoModelForCausalLM.from_pretrained(
            str(path.parent),
            gguf_file=path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            output_loading_info=True,
            **options,
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(f"{path}: read back without {', '.join(missing[:3])}.")
    return model


def round_inputs(model: Any, kind: GGUFType) -> None:
    """Have every matrix of a q8_0 `model` round its inputs, too, as llama.cpp does, which
    multiplies 8-bit numbers by 8-bit numbers. Models of other types stay as they are.
    """
    if kind is not GGUFType.q8_0:
        return

    def before(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (rounded(inputs[0]), *inputs[1:])

    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.in_features % 32 == 0:
            module.register_forward_pre_hook(before)


def rounded(values: Tensor) -> Tensor:
    """Numbers [..., width], a multiple of 32, as q8_0 holds them, in float32."""
    blocks = values.float().reshape(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    whole = torch.where(scale > 0, blocks / scale, 0.0).round()
    return (whole * scale.half().float()).reshape(values.shape)


def check_vocabulary(path: Path, tokenizer: Any, words: Vocabulary, texts: list[str]) -> None:
    """The file's vocabulary is `words`, and a tokenizer that transformers makes of the file gives
    the `texts` the tokens that `tokenizer` gives them. Raises UserError.
    """
    from transformers import AutoTokenizer
    from transformers.integrations.gguf import get_gguf_tokenizer

    _, held, config = get_gguf_tokenizer(str(path))
    same = {
        "tokens": tuple(held["tokens"]) == words.tokens,
        "merges": tuple(held["merges"]) == words.merges,
        "pre": held["pre_tokenizer_type"] == words.rules,
        "chat_template": config.get("chat_template") == words.template,
    }
    wrong = [name for name, holds in same.items() if not holds]
    if wrong:
        raise UserError(f"{path}: {', '.join(wrong)} of its vocabulary read back otherwise.")
    if words.rules in UNREAD:
        LOG.info(
            "%s: transformers does not read the rules %s of its tokenizer, so its tokens of texts "
            "are compared by nobody here.",
            path.name,
            words.rules,
        )
        return
    read = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    for text in texts:
        if plain_ids(read, text) != plain_ids(tokenizer, text):
            raise UserError(
                f"{path}: its tokenizer reads {text!r} as other tokens than the model's."
            )
