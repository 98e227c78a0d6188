"""Tiny random models of families that read pictures, with tokenizer, chat template and processor;
and small pictures. Nothing here needs torchvision.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
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
            if not param.any():  # Gemma 3's projector begins at zero: it would see nothing
                torch.nn.init.normal_(param, std=0.1)
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


def _llama(tokenizer: Any) -> dict[str, Any]:
    return {"model_type": "llama", **TEXT, **_ids(tokenizer)}


def _one_token(template: str, **extra: str) -> Any:
    """A tokenizer of families whose pictures are copies of one token."""
    tokens = {"image_token": "<image>", **extra}
    return tokenizer_of(tokens, template.replace("IMAGE", "<image>"))


_CLIP = {"model_type": "clip_vision_model", **_VISION, "projection_dim": 32}
_SIGLIP = {"model_type": "siglip_vision_model", **_VISION}
_SQUARE = {"height": 32, "width": 32}
_TILES = [[32, 64], [64, 32], [64, 64]]  # sizes that LLaVA-NeXT's pictures are parted from


def _llava(folder: Path) -> Path:
    from transformers import CLIPImageProcessorPil, LlavaConfig

    tokenizer = _one_token(PARTS_ALONE)
    config = LlavaConfig(
        vision_config=_CLIP,
        text_config=_llama(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=_SQUARE)
    return _written(folder, config, tokenizer, images, "LlavaProcessor", **_OF_CLIP)


_OF_CLIP: dict[str, Any] = {
    "patch_size": 8,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}


def _llava_next(folder: Path) -> Path:
    from transformers import LlavaNextConfig, LlavaNextImageProcessorPil

    tokenizer = _one_token(PARTS_ALONE)
    config = LlavaNextConfig(
        vision_config=_CLIP,
        text_config=_llama(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=_TILES,
    )
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 32}, crop_size=_SQUARE, image_grid_pinpoints=_TILES
    )
    return _written(folder, config, tokenizer, images, "LlavaNextProcessor", **_OF_CLIP)


def _llava_onevision(folder: Path) -> Path:
    from transformers import LlavaOnevisionConfig, LlavaOnevisionImageProcessorPil

    tokenizer = _one_token(PARTS_ALONE, video_token="<video>")
    config = LlavaOnevisionConfig(
        vision_config={**_SIGLIP, "vision_use_head": False},
        text_config={"model_type": "qwen2", **TEXT, **_ids(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=_TILES,
        vision_aspect_ratio="anyres_max_4",
    )
    images = LlavaOnevisionImageProcessorPil(size=_SQUARE, image_grid_pinpoints=_TILES)
    options = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
    return _written(
        folder,
        config,
        tokenizer,
        images,
        "LlavaOnevisionProcessor",
        vision_aspect_ratio="anyres_max_4",
        **options,
    )


_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
_PLACE = "<|vision_start|><|image_pad|><|vision_end|>"


def _qwen_later(folder: Path, kind: Any, processor: str, **vision: Any) -> Path:
    """Qwen2.5-VL and Qwen3-VL."""
    from transformers import Qwen2VLImageProcessorPil

    tokenizer = tokenizer_of(_QWEN, CHAT.replace("IMAGE", _PLACE))
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(one) for name, one in _QWEN.items()}
    common = {
        "depth": 2,
        "hidden_size": 64,
        "out_hidden_size": 64,
        "num_heads": 2,
        "intermediate_size": 96,
        "patch_size": 8,
    }
    config = kind(
        text_config={**TEXT, **_ids(tokenizer), "head_dim": 32, "rope_parameters": _ROPE},
        vision_config={**common, **vision},
        **ids,
    )
    images = Qwen2VLImageProcessorPil(patch_size=8, min_pixels=16 * 16, max_pixels=64 * 64)
    return _written(folder, config, tokenizer, images, processor)


def _qwen2_5_vl(folder: Path) -> Path:
    from transformers import Qwen2_5_VLConfig

    windows = {"window_size": 32, "fullatt_block_indexes": [1]}
    return _qwen_later(folder, Qwen2_5_VLConfig, "Qwen2_5_VLProcessor", **windows)


def _qwen3_vl(folder: Path) -> Path:
    from transformers import Qwen3VLConfig

    stacked = {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    return _qwen_later(folder, Qwen3VLConfig, "Qwen3VLProcessor", **stacked)


def _internvl(folder: Path) -> Path:
    from transformers import GotOcr2ImageProcessorPil, InternVLConfig

    extra = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = tokenizer_of(extra, CHAT.replace("IMAGE", "<IMG_CONTEXT>\n"))
    config = InternVLConfig(
        text_config={"model_type": "qwen2", **TEXT, **_ids(tokenizer)},
        vision_config={**_VISION, "image_size": [32, 32], "patch_size": [8, 8]},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        downsample_ratio=0.5,
        image_seq_length=4,
    )
    images = GotOcr2ImageProcessorPil(
        size=_SQUARE, crop_to_patches=True, min_patches=1, max_patches=2
    )
    return _written(folder, config, tokenizer, images, "InternVLProcessor", image_seq_length=4)


def _gemma3(folder: Path) -> Path:
    from transformers import Gemma3Config, Gemma3ImageProcessorPil

    extra = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    tokenizer = tokenizer_of(extra, CHAT.replace("IMAGE", "<start_of_image>"))
    config = Gemma3Config(
        text_config={**TEXT, **_ids(tokenizer), "head_dim": 32, "sliding_window": 64},
        vision_config=_SIGLIP,
        mm_tokens_per_image=4,
        image_token_id=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_id=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_id=tokenizer.convert_tokens_to_ids("<end_of_image>"),
    )
    images = Gemma3ImageProcessorPil(size=_SQUARE)
    return _written(folder, config, tokenizer, images, "Gemma3Processor", image_seq_length=4)


def _aya_vision(folder: Path) -> Path:
    from transformers import AyaVisionConfig, GotOcr2ImageProcessorPil

    extra = {
        "start": "<|START_OF_IMG|>",
        "end": "<|END_OF_IMG|>",
        "patch": "<|IMG_PATCH|>",
        "line": "<|IMG_LINE_BREAK|>",
    }
    tokenizer = _one_token(CHAT, **extra)
    config = AyaVisionConfig(
        text_config={"model_type": "cohere2", **TEXT, **_ids(tokenizer), "sliding_window": 64},
        vision_config=_SIGLIP,
        image_token_id=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
        downsample_factor=2,
    )
    images = GotOcr2ImageProcessorPil(
        size=_SQUARE, crop_to_patches=True, min_patches=1, max_patches=2
    )
    options = {"patch_size": 8, "img_size": 32, "downsample_factor": 2}
    return _written(folder, config, tokenizer, images, "AyaVisionProcessor", **options)


def paligemma(folder: Path) -> Path:
    """Of a family whose processor writes more than pictures' tokens."""
    from transformers import PaliGemmaConfig, SiglipImageProcessorPil

    tokenizer = _one_token(CHAT)
    config = PaliGemmaConfig(
        text_config={"model_type": "gemma", **TEXT, **_ids(tokenizer), "head_dim": 32},
        vision_config={**_SIGLIP, "projection_dim": 64, "num_image_tokens": 16},
        projection_dim=64,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    images = SiglipImageProcessorPil(size=_SQUARE)
    images.image_seq_length = 16
    return _written(folder, config, tokenizer, images, "PaliGemmaProcessor")


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "idefics3": _idefics3,
    "qwen2_vl": _qwen2_vl,
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
    "gemma3": _gemma3,
    "aya_vision": _aya_vision,
}


def tiny_vision(family: str, folder: Path) -> Path:
    """A directory with a float32 model of a family that reads pictures, all that belongs to it."""
    return FAMILIES[family](folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """made(family) -> its directory; made once."""
    found: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in found:
            found[family] = tiny_vision(family, tmp_path_factory.mktemp(family))
        return found[family]

    return make


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
