"""transformers' processors of picture models: loaded with our tokenizer in them, tried on two
pictures, and saved.

A processor writes each picture's tokens in place of one image token of the text, and makes the
tensors that the model's forward takes beside the token ids. Processors of families that read videos
too want a video processor, which transformers has with torchvision alone. Videos are refused here,
so such a processor goes without; what the files say of videos is kept and saved again.
"""

import json
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.models.directories import readable
from rlhf.models.facts import model_file
from rlhf.models.turns import PROCESSOR, ids_of
from rlhf.types import UserError

_VIDEO = "video_processor"
_NEEDED = {"image_processor", "tokenizer", _VIDEO}
# of what a processor gives, these are made from the text
TEXT_KEYS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
_TYPES = ("mm_token_type_ids", "token_type_ids")
_TRIED = ((64, 48), (40, 72))  # width and height of the pictures that a processor is tried on


@dataclass(slots=True)
class Processor:
    """A picture model's processor, and what was found by trying it."""

    inner: Any  # transformers'
    name: str  # of the model, for messages
    image_token: str  # in a text, where a picture stands
    reserved: tuple[str, ...]  # tokens that no text may hold of itself
    feature_ids: tuple[int, ...]  # the token whose embedding a picture's features replace
    types_key: str | None  # of the model's argument that tells picture tokens from text
    videos: dict[str, Any] | None  # what the files say of videos
    # by width and height: what stands for a picture in the text
    texts: dict[tuple[int, int], str] = field(default_factory=dict)
    # whether a chat template writes contents that are texts, by template
    writes_texts: dict[str, bool] = field(default_factory=dict)
    # the processor's own tokenizer is the one that carries this, so it is held loosely there
    owner: "weakref.ref[Any] | None" = None

    def called(self, text: str, images: Sequence[Any], **options: Any) -> Any:
        """What the processor gives for one text with these pictures."""
        return self.inner(text=[text], images=list(images), add_special_tokens=False, **options)

    def state(self) -> dict[str, Any]:
        """What tokens of pictures depend on."""
        written = json.loads(self.inner.to_json_string())
        return {"class": type(self.inner).__qualname__, "content": written}


def is_picture_model(config: Any) -> bool:
    """Whether transformers loads the configuration as a model that reads text and pictures."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    has_vision = getattr(config, "vision_config", None) is not None
    return has_vision and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def processor_of(tokenizer: Any) -> Processor | None:
    """The processor that `load_processor` put beside `tokenizer`; None for text models."""
    found: Processor | None = vars(tokenizer).get(PROCESSOR)
    return found


def load_processor(
    path: str, tokenizer: Any, *, trust_remote_code: bool = False
) -> Processor | None:
    """The processor of the model at `path` with `tokenizer` in it, where that is a picture model;
    `processor_of` gives it from now on. The processor's chat template, if it has one, becomes the
    tokenizer's. Raises UserError.
    """
    from transformers import AutoConfig

    what = f"model.path={path}: its processor"
    with readable(what):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        if not is_picture_model(config):
            return None
        inner = _transformers_processor(path, config, tokenizer, trust_remote_code)
    template = getattr(inner, "chat_template", None)
    if template is not None:
        tokenizer.chat_template = template
    found = _tried(inner, config, tokenizer, path)
    vars(tokenizer)[PROCESSOR] = found
    return found


def _transformers_processor(path: str, config: Any, tokenizer: Any, trust: bool) -> Any:
    from transformers import AutoImageProcessor, AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    if type(config) not in PROCESSOR_MAPPING:
        inner = AutoProcessor.from_pretrained(path, trust_remote_code=trust)
        inner.tokenizer = tokenizer
        return inner
    kind = PROCESSOR_MAPPING[type(config)]
    parts = kind.get_attributes()
    further = sorted(set(parts) - _NEEDED)
    if further:
        raise UserError(
            f"model.path={path}: {kind.__name__} needs {', '.join(further)} too, and only text and "
            "pictures are read here. Expected a model of these alone."
        )
    images = AutoImageProcessor.from_pretrained(path, trust_remote_code=trust)
    written, _ = kind.get_processor_dict(path)
    if _VIDEO in parts:
        kind = _without_videos(kind)
    given = {"image_processor": images, "tokenizer": tokenizer}
    return kind.from_args_and_dict([given[name] for name in kind.get_attributes()], written)


def _without_videos(kind: Any) -> Any:
    """The same class of processors without the part that reads videos."""
    parts = [name for name in kind.get_attributes() if name != _VIDEO]

    def get_attributes(cls: Any) -> list[str]:
        return list(parts)

    body = {"get_attributes": classmethod(get_attributes), "__module__": kind.__module__}
    return type(kind.__name__, (kind,), body)


def _videos(path: str) -> dict[str, Any] | None:
    """What a model's files say of videos, in the order in which transformers looks for it."""
    nested = model_file(path, "processor_config.json").get(_VIDEO)
    if isinstance(nested, dict):
        return nested
    return (
        model_file(path, "video_preprocessor_config.json")
        or model_file(path, "preprocessor_config.json")
        or None
    )


# ---- trying ----


def _tried(inner: Any, config: Any, tokenizer: Any, path: str) -> Processor:
    """The processor with what two blank pictures show of it: a text's tokens are those of the text
    with each image token replaced, and nothing else. Raises UserError.
    """
    what = f"model.path={path}: its processor {type(inner).__name__}"
    token = getattr(inner, "image_token", None)
    if not isinstance(token, str):
        raise UserError(
            f"{what} names no image token, so pictures have no place in a text. Expected a model "
            "whose chat template writes one for each picture."
        )
    text = f"See {token} and {token}, well."
    found = Processor(inner, path, token, (), (), None, None)
    with readable(what):
        given = found.called(text, [blank(size) for size in _TRIED], return_tensors="pt")
        ids = given["input_ids"][0].tolist()
        first, second = (replacement(found, size) for size in _TRIED)
    ours = ids_of(tokenizer, [f"See {first} and {second}, well."])[0]
    if ids != ours:
        raise UserError(
            f"{what} writes more into a text than its pictures' tokens, so prompts can't be told "
            "apart from answers. Expected a family whose processor only replaces image tokens."
        )
    feature = _feature_ids(inner, config)
    found.feature_ids = feature
    held = [token, getattr(inner, "video_token", None), *tokenizer.convert_ids_to_tokens(feature)]
    found.reserved = tuple(dict.fromkeys(one for one in held if isinstance(one, str)))
    found.types_key = _types_key(inner, given)
    if _VIDEO in type(inner).__mro__[1].__init__.__code__.co_varnames:
        found.videos = _videos(path)
    return found


def _feature_ids(inner: Any, config: Any) -> tuple[int, ...]:
    """The token ids that the model gives a picture's features."""
    for holder in (config, inner):
        for name in ("image_token_id", "image_token_index"):
            found = getattr(holder, name, None)
            if isinstance(found, int):
                return (found,)
    return ()


def _types_key(inner: Any, given: Any) -> str | None:
    """The key under which the processor marks the tokens of pictures, where it does."""
    import torch

    marked = torch.isin(given["input_ids"], _marked_ids(inner))
    for key in _TYPES:
        if key in given and torch.equal(given[key].bool(), marked):
            return key
    return None


def _marked_ids(inner: Any) -> Any:
    import torch

    ids = [i for i in getattr(inner, "image_token_ids", ()) if isinstance(i, int)]
    return torch.tensor(ids, dtype=torch.long)


def token_types(processor: Processor, input_ids: Any) -> dict[str, Any]:
    """`input_ids` [B, L] -> 1 at the tokens of pictures and 0 elsewhere, by the name of the model's
    argument; nothing where the model takes none.
    """
    import torch

    if processor.types_key is None:
        return {}
    marked = torch.isin(input_ids, _marked_ids(processor.inner).to(input_ids.device))
    return {processor.types_key: marked.long()}


# ---- the tokens of a picture ----


def blank(size: tuple[int, int]) -> Any:
    """A white picture of a width and height."""
    from PIL import Image

    return Image.new("RGB", size, "white")


def replacement(processor: Processor, size: tuple[int, int]) -> str:
    """What stands in a text for a picture of this width and height. Its size alone decides that, so
    the processor is asked with a blank one, once for each size. Raises ValueError.
    """
    if size not in processor.texts:
        given = processor.called(
            processor.image_token, [blank(size)], return_text_replacement_offsets=True
        )
        processor.texts[size] = str(given["text_replacement_offsets"][0][0]["replacement"])
    return processor.texts[size]


# ---- saving ----


def save_processor(tokenizer: Any, directory: str | Path) -> None:
    """Write the processor of a picture model's tokenizer, and the tokenizer itself."""
    processor = processor_of(tokenizer)
    assert processor is not None, "only a picture model has a processor"
    inner = processor.inner
    inner.chat_template = tokenizer.chat_template
    inner.save_pretrained(directory)
    if processor.videos is not None:
        file = Path(directory) / "processor_config.json"
        written = json.loads(file.read_text(encoding="utf-8"))
        written[_VIDEO] = processor.videos
        file.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
