"""Tiny random models of families that read pictures, with tokenizer, chat template and processor;
and small pictures. Nothing here needs torchvision.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf.types import PICTURE_MARK, Message, Picture

_TEXTS = [
    "what colour is the circle in the picture? it is red.",
    "user assistant system how many squares are there? two blue ones",
] * 4
_SPECIALS = ("<|bos|>", "<|end|>", "<|pad|>", "<|unk|>", "<|turn|>")
# A turn's parts in turn; a content that is a text is written as it is.
CHAT = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n{% if m['content'] is string %}"
    "{{ m['content'] }}{% else %}{% for part in m['content'] %}{% if part['type'] == 'image' %}"
    "IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
# One that knows parts alone, as LLaVA's: of a text it would write letters that have no type.
PARTS_ALONE = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n"
    "{% for part in m['content'] | selectattr('type', 'equalto', 'image') %}IMAGE\n{% endfor %}"
    "{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}"
    "{% endfor %}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def tokenizer_of(extra: dict[str, str], template: str) -> Any:
    """A byte-level tokenizer whose special tokens hold `extra`, by the names that processors look
    for.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[*_SPECIALS, *extra.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        extra_special_tokens=extra,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


def _ids(tokenizer: Any) -> dict[str, Any]:
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "vocab_size": len(tokenizer),
    }


def _written(
    folder: Path,
    config: Any,
    tokenizer: Any,
    images: Any,
    processor: str,
    **options: Any,
) -> Path:
    """A model's directory in the layout that the hub's have: the image processor's file, and that
    of the processor with its own `options`.
    """
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(7)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    for name, param in model.named_parameters():
        if param.ndim == 2 and "position" not in name:
            param.data.mul_(3.0)  # the initial 0.02 would leave every distribution flat
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    images.save_pretrained(folder)
    file = folder / "processor_config.json"
    file.write_text(json.dumps({"processor_class": processor, **options}), encoding="utf-8")
    return folder


def _idefics3(folder: Path) -> Path:
    from transformers import Idefics3Config, Idefics3ImageProcessorPil

    places = [f"<row_{row}_col_{col}>" for row in (1, 2) for col in (1, 2)]
    extra = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
        **{f"place_{number}": place for number, place in enumerate(places)},
    }
    tokenizer = tokenizer_of(extra, CHAT.replace("IMAGE", "<image>"))
    config = Idefics3Config(
        vision_config=_VISION,
        text_config={"model_type": "llama", **TEXT, **_ids(tokenizer)},
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
    )
    return _written(folder, config, tokenizer, images, "Idefics3Processor", image_seq_len=4)


_QWEN = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}


def _qwen2_vl(folder: Path) -> Path:
    from transformers import Qwen2VLConfig, Qwen2VLImageProcessorPil

    place = "<|vision_start|><|image_pad|><|vision_end|>"
    tokenizer = tokenizer_of(_QWEN, CHAT.replace("IMAGE", place))
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(one) for name, one in _QWEN.items()}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    config = Qwen2VLConfig(
        text_config={**TEXT, **_ids(tokenizer), "rope_parameters": rope},
        vision_config={
            "depth": 2,
            "embed_dim": 64,
            "hidden_size": 64,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 8,
        },
        **ids,
    )
    images = Qwen2VLImageProcessorPil(patch_size=8, min_pixels=16 * 16, max_pixels=64 * 64)
    return _written(folder, config, tokenizer, images, "Qwen2VLProcessor")


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "idefics3": _idefics3,
    "qwen2_vl": _qwen2_vl,
}


def tiny_vision(family: str, folder: Path) -> Path:
    """A directory with a float32 model of a family that reads pictures, all that belongs to it."""
    return FAMILIES[family](folder)


# ---- pictures ----


def drawn(file: Path, width: int, height: int, colour: tuple[int, int, int]) -> Picture:
    """A picture with a square of one colour, written to `file`."""
    from PIL import Image

    image = Image.new("RGB", (width, height), (240, 240, 240))
    image.paste(colour, (width // 4, height // 4, width // 2, height // 2))
    image.save(file)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    return {"path": str(file.absolute()), "sha256": sha256, "width": width, "height": height}


def pictures(folder: Path, sizes: Sequence[tuple[int, int]]) -> list[Picture]:
    """A picture of each size, each of another colour."""
    colours = ((220, 30, 30), (30, 30, 220), (30, 160, 30), (120, 60, 10))
    out = []
    for number, (width, height) in enumerate(sizes):
        colour = colours[number % len(colours)]
        out.append(drawn(folder / f"{number}.png", width, height, colour))
    return out


def asked(text: str, *images: Picture) -> Message:
    """A user's turn; MARK in `text` stands for a picture."""
    message: Message = {"role": "user", "content": text.replace("MARK", PICTURE_MARK)}
    if images:
        message["images"] = list(images)
    return message


def said(text: str) -> Message:
    return {"role": "assistant", "content": text}
