"""Pictures in conversations: our tokens are the processor's, and so are the tensors."""

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.schema import ModelConfig
from rlhf.export.families import family_of
from rlhf.models import pictures
from rlhf.models.conversations import encode_conversation
from rlhf.models.encoding import (
    IGNORED,
    encode_answer,
    encode_text,
    prompt_ids,
    response_ids,
    unexpanded_prompt_ids,
)
from rlhf.models.facts import tokenizer_state
from rlhf.models.loading import load_causal_lm, load_tokenizer, without_weights, write_whole
from rlhf.models.templates import rendered_short
from rlhf.models.turns import plain_ids
from rlhf.types import PICTURE_MARK, Message, Picture, RowError, UserError
from tests import vision
from tests.vision import asked, made, said

__all__ = ["made"]  # a fixture

_FAST = ("idefics3", "qwen2_vl", "llava")
FAMILIES = [
    name if name in _FAST else pytest.param(name, marks=pytest.mark.full)
    for name in vision.FAMILIES
]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> list[Picture]:
    """Four pictures of different sizes."""
    sizes = [(64, 48), (40, 72), (96, 32), (32, 32)]
    return vision.pictures(tmp_path_factory.mktemp("shown"), sizes)


def chats(shown: list[Picture]) -> list[list[Message]]:
    """Conversations with no picture, one, two in a turn, and several in several turns."""
    one, two, three, four = shown
    return [
        [asked("how many?"), said("two")],
        [asked("MARKwhat is it?", one), said("a square")],
        [asked("is MARK like MARK?", two, three), said("no")],
        [
            {"role": "system", "content": "be brief"},
            asked("MARK\nwhat colour?", one),
            said("red"),
            asked("and now? MARK and MARK", four, two),
            said("blue\n\nbrown"),
            asked("sure?"),
            said("yes"),
        ],
    ]


def reference(tokenizer: Any, messages: list[Message], *, generation_prompt: bool) -> list[int]:
    """Token ids of transformers' processor, called with the rendered text and the pictures."""
    processor = pictures.processor_of(tokenizer)
    assert processor is not None
    text = rendered_short(tokenizer, messages, generation_prompt=generation_prompt)
    images = [pictures.opened(picture) for picture in pictures.pictures_of(messages)]
    given = processor.inner(text=[text], images=images or None, add_special_tokens=False)
    ids: list[int] = given["input_ids"][0]
    return ids


@pytest.mark.parametrize("family", FAMILIES)
def test_our_tokens_are_the_processors(
    made: Callable[[str], Path], shown: list[Picture], family: str
) -> None:
    tokenizer = load_tokenizer(ModelConfig(path=str(made(family))))
    place = pictures.processor_of(tokenizer).feature_ids[0]  # type: ignore[union-attr]
    for chat in chats(shown):
        held = pictures.pictures_of(chat)
        ids = prompt_ids(tokenizer, chat[:-1])
        assert ids == reference(tokenizer, chat[:-1], generation_prompt=True)
        assert (place in ids) == bool(held)
        whole = reference(tokenizer, chat, generation_prompt=False)
        encoded, labels = encode_conversation(tokenizer, chat, completion_only=True)
        assert encoded == whole[: len(encoded)]
        assert encode_answer(tokenizer, chat[:-1], chat[-1:]) == encoded
        trained = [ids for ids, label in zip(encoded, labels, strict=True) if label != IGNORED]
        answers = [one["content"] for one in chat if one["role"] == "assistant"]
        assert tokenizer.decode(trained) == "".join(f"{answer}<|end|>" for answer in answers)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_with_one_token_for_each_picture(
    made: Callable[[str], Path], shown: list[Picture], family: str
) -> None:
    tokenizer = load_tokenizer(ModelConfig(path=str(made(family))))
    processor = pictures.processor_of(tokenizer)
    assert processor is not None
    for chat in chats(shown):
        held = pictures.pictures_of(chat)
        short = unexpanded_prompt_ids(tokenizer, chat[:-1])
        place = tokenizer.convert_tokens_to_ids(processor.image_token)
        assert short.count(place) == len(held)
        assert pictures.collapsed(processor, prompt_ids(tokenizer, chat[:-1]), held) == short
    wrong = prompt_ids(tokenizer, chats(shown)[1][:-1])
    with pytest.raises(ValueError, match=r"2\.png"):
        pictures.collapsed(processor, wrong, [shown[0], shown[2]])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_gives_what_its_rows_give(
    made: Callable[[str], Path], shown: list[Picture], family: str
) -> None:
    """Rows with two pictures, none and one, beside each other and right-padded."""
    cfg = ModelConfig(path=str(made(family)))
    tokenizer = load_tokenizer(cfg)
    processor = pictures.processor_of(tokenizer)
    assert processor is not None
    model = load_causal_lm(cfg, tokenizer).eval()
    rows = [chats(shown)[number] for number in (2, 0, 1)]
    held = [pictures.pictures_of(row) for row in rows]
    ids = [encode_conversation(tokenizer, row, completion_only=True)[0] for row in rows]
    longest = max(map(len, ids))
    padded = torch.full((3, longest), tokenizer.pad_token_id)
    mask = torch.zeros((3, longest), dtype=torch.long)
    for number, row in enumerate(ids):
        padded[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    extra = pictures.picture_inputs(processor, held, padded)
    with torch.no_grad():
        together = model(input_ids=padded, attention_mask=mask, **extra).logits
        for number, row in enumerate(ids):
            text = rendered_short(tokenizer, rows[number], generation_prompt=False)
            images = [pictures.opened(picture) for picture in held[number]]
            given = processor.inner(
                text=[text],
                images=images or None,
                add_special_tokens=False,
                return_tensors="pt",
            )
            alone = model(**given).logits[0, : len(row)]
            torch.testing.assert_close(together[number, : len(row)], alone, atol=1e-5, rtol=1e-4)
    # the pictures are looked at
    other = pictures.picture_inputs(processor, [[shown[2], shown[1]], [], held[2]], padded)
    same_shapes = all(other[key].shape == value.shape for key, value in extra.items())
    if same_shapes:
        with torch.no_grad():
            changed = model(input_ids=padded, attention_mask=mask, **other).logits
        assert not torch.equal(changed[0], together[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_loads_again(
    made: Callable[[str], Path], shown: list[Picture], family: str, tmp_path: Path
) -> None:
    cfg = ModelConfig(path=str(made(family)))
    tokenizer = load_tokenizer(cfg)
    write_whole(load_causal_lm(cfg, tokenizer), tokenizer, tmp_path / "saved")
    again_cfg = ModelConfig(path=str(tmp_path / "saved"))
    again = load_tokenizer(again_cfg)
    assert type(load_causal_lm(again_cfg, again)) is type(load_causal_lm(cfg, tokenizer))
    meta = without_weights(again_cfg)
    assert meta is not None
    assert type(meta).__name__.endswith("ForConditionalGeneration")
    assert tokenizer_state(again) == tokenizer_state(tokenizer)
    for chat in chats(shown):
        assert prompt_ids(again, chat[:-1]) == prompt_ids(tokenizer, chat[:-1])
    first, second = pictures.processor_of(tokenizer), pictures.processor_of(again)
    assert first is not None
    assert second is not None
    assert second.videos == first.videos


def test_transformers_reads_the_saved_processor(
    made: Callable[[str], Path], shown: list[Picture], tmp_path: Path
) -> None:
    from transformers import AutoProcessor

    cfg = ModelConfig(path=str(made("idefics3")))
    tokenizer = load_tokenizer(cfg)
    write_whole(load_causal_lm(cfg, tokenizer), tokenizer, tmp_path)
    theirs = AutoProcessor.from_pretrained(tmp_path)
    assert theirs.chat_template == tokenizer.chat_template
    chat = chats(shown)[2][:-1]
    text = rendered_short(tokenizer, chat, generation_prompt=True)
    images = [pictures.opened(picture) for picture in pictures.pictures_of(chat)]
    given = theirs(text=[text], images=images, add_special_tokens=False)
    assert given["input_ids"][0] == prompt_ids(tokenizer, chat)


def test_a_template_of_parts_alone_gets_texts_as_parts(
    made: Callable[[str], Path], shown: list[Picture]
) -> None:
    tokenizer = load_tokenizer(ModelConfig(path=str(made("idefics3"))))
    tokenizer.chat_template = vision.PARTS_ALONE.replace("IMAGE", "<image>")
    chat = chats(shown)[1]
    text = rendered_short(tokenizer, chat, generation_prompt=False)
    assert "what is it?" in text
    assert "a square" in text
    assert prompt_ids(tokenizer, chat[:-1]) == reference(
        tokenizer, chat[:-1], generation_prompt=True
    )


def test_what_does_not_fit_is_refused(
    made: Callable[[str], Path], shown: list[Picture], tiny_model: Callable[..., Path]
) -> None:
    tokenizer = load_tokenizer(ModelConfig(path=str(made("qwen2_vl"))))
    two_places = asked("MARK and MARK", shown[0])
    with pytest.raises(RowError, match=r"message 1: .* 2 places .* 1$"):
        prompt_ids(tokenizer, [asked("hi"), two_places])
    for spelled in ("see <|image_pad|>", "see <|video_pad|>"):
        with pytest.raises(RowError, match=r"image_pad|video_pad"):
            prompt_ids(tokenizer, [asked(spelled)])
        with pytest.raises(RowError, match="pad"):
            response_ids(tokenizer, spelled)
        with pytest.raises(RowError, match="pad"):
            encode_text(tokenizer, spelled)
        with pytest.raises(RowError, match="pad"):
            prompt_ids(tokenizer, spelled)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    with pytest.raises(RowError, match="0 image tokens"):
        prompt_ids(tokenizer, [asked("MARK", shown[0])])
    thin: Picture = {**shown[0], "width": 1, "height": 4000}
    tokenizer.chat_template = vision.CHAT.replace("IMAGE", "<|image_pad|>")
    with pytest.raises(RowError, match=r"0\.png .*1 x 4000"):
        prompt_ids(tokenizer, [asked("MARK", thin)])
    text_model = load_tokenizer(ModelConfig(path=str(tiny_model())), "chatml")
    with pytest.raises(RowError, match="reads text alone"):
        prompt_ids(text_model, [asked("MARK", shown[0])])


def test_a_picture_that_changed_is_refused(tmp_path: Path) -> None:
    first, second, third = vision.pictures(tmp_path, [(16, 16), (8, 8), (4, 4)])
    assert pictures.opened(first).size == (16, 16)
    vision.drawn(Path(second["path"]), 8, 8, (0, 0, 0))
    with pytest.raises(UserError, match=r"1\.png has changed"):
        pictures.opened(second)
    with pytest.raises(UserError, match=r"2\.png is 4 x 4 pixels, but its row says 5 x 4"):
        pictures.opened({**third, "width": 5})
    Path(third["path"]).unlink()
    with pytest.raises(UserError, match=r"2\.png can't be read"):
        pictures.opened(third)


def test_pictures_are_opened_upright_on_white(tmp_path: Path) -> None:
    from PIL import Image

    file = tmp_path / "clear.png"
    Image.new("RGBA", (6, 4), (10, 20, 30, 0)).save(file)

    def picture(file: Path, size: tuple[int, int]) -> Picture:
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        return {"path": str(file), "sha256": sha256, "width": size[0], "height": size[1]}

    assert pictures.opened(picture(file, (6, 4))).getpixel((0, 0)) == (255, 255, 255)
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (6, 4), "red").save(turned, exif=exif)
    assert pictures.opened(picture(turned, (4, 6))).size == (4, 6)


def test_a_text_may_hold_the_mark_without_pictures(made: Callable[[str], Path]) -> None:
    tokenizer = load_tokenizer(ModelConfig(path=str(made("idefics3"))))
    ids = prompt_ids(tokenizer, [asked(f"a {PICTURE_MARK} b")])
    assert PICTURE_MARK in tokenizer.decode(ids)
    text = f"<|turn|>user\na {PICTURE_MARK} b<|end|>\n<|turn|>assistant\n"
    assert ids == plain_ids(tokenizer, text)


@pytest.mark.full
def test_text_models_load_nothing_of_pictures(tiny_model: Callable[..., Path]) -> None:
    code = (
        "import sys\n"
        "from conf.schema import ModelConfig\n"
        "from rlhf.models.encoding import prompt_ids\n"
        "from rlhf.models.loading import load_causal_lm, load_tokenizer\n"
        f"cfg = ModelConfig(path={str(tiny_model())!r})\n"
        "tokenizer = load_tokenizer(cfg, 'chatml')\n"
        "prompt_ids(tokenizer, [{'role': 'user', 'content': 'hi'}])\n"
        "load_causal_lm(cfg, tokenizer)\n"
        "names = ('rlhf.models.pictures', 'rlhf.models.processors')\n"
        "print([name for name in names if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_processor_that_writes_more_is_refused(tmp_path: Path) -> None:
    vision.paligemma(tmp_path)
    with pytest.raises(UserError, match="PaliGemmaProcessor writes more into a text"):
        load_tokenizer(ModelConfig(path=str(tmp_path)))


def test_a_gguf_file_of_a_picture_model_is_refused(made: Callable[[str], Path]) -> None:
    model = without_weights(ModelConfig(path=str(made("qwen2_vl"))))
    assert model is not None
    with pytest.raises(UserError, match="Qwen2VLForConditionalGeneration"):
        family_of(model.config, type(model).__name__)
