"""Rows that show pictures and the models that read them, or don't."""

from pathlib import Path

import pytest

from conf.labelling import LabelStage
from conf.online import OnlineStage
from conf.schema import DataConfig, ModelConfig
from conf.stages import SFTStage
from rlhf.data import reading
from rlhf.data.formats import Use
from rlhf.data.loading import DataRequest
from rlhf.data.report.making import make
from rlhf.models.loading import load_tokenizer, train_tokenizer
from rlhf.models.turns import ids_of, processor_of
from rlhf.rows import sft
from rlhf.types import Prompt, UserError
from tests.data.drawn import draw, encoded, write
from tests.data.test_prepare_pictures import shown
from tests.vision import tiny_vision


@pytest.fixture(scope="module")
def idefics3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vision("idefics3", tmp_path_factory.mktemp("model"))


def request_of(folder: Path, stage: object, **options: object) -> DataRequest:
    draw(folder)
    rows = [
        {"prompt": f"<image>What is {number}?", "completion": "A", "images": [f"pics/{number}.png"]}
        for number in range(4)
    ]
    path = write(folder / "rows.jsonl", *rows)
    data = DataConfig(path=str(path), **options)  # type: ignore[arg-type]
    return DataRequest(data, stage, 0, folder / "runs/run")


def test_a_model_of_texts_refuses_rows_with_pictures_by_name(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["What is it? A"], 300, 512)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    request = request_of(tmp_path, SFTStage())
    message = r"messages show pictures \(4 rows, the first .*, row \d\), but the model"
    with pytest.raises(UserError, match=message):
        sft.read(request, tokenizer)
    with pytest.raises(UserError, match=r"show pictures .*, but the model of model.path"):
        reading.prompts(request_of(tmp_path, OnlineStage()), tokenizer)


def test_labels_refuse_them_since_people_would_not_see_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"show pictures .*, but stage=label shows people texts"):
        reading.distinct_prompts(request_of(tmp_path, LabelStage()), None)


def prompts(folder: Path, model: Path, **options: object) -> list[Prompt]:
    tokenizer = load_tokenizer(ModelConfig(path=str(model)))
    return list(reading.prompts(request_of(folder, OnlineStage(), **options), tokenizer))


def test_a_prompt_carries_its_pictures_and_is_named_by_their_bytes(
    tmp_path: Path, idefics3: Path
) -> None:
    first = prompts(tmp_path / "a", idefics3)
    assert len(first) == 3 and all(len(prompt.images) == 1 for prompt in first)
    for prompt in first:
        number = prompt.images[0]["width"] - 8
        assert prompt.source[0]["content"].endswith(f"What is {number}?")
        assert Path(prompt.images[0]["path"]).read_bytes() == encoded(number)
    # the same pictures elsewhere are the same prompts, others are others
    again = prompts(tmp_path / "b", idefics3)
    assert [prompt.id for prompt in again] == [prompt.id for prompt in first]
    assert again[0].images != first[0].images
    ids = {prompt.id for prompt in first}
    one = write(
        tmp_path / "a/one.jsonl",
        {"prompt": "<image>What is 1?", "images": ["pics/2.png"]},
        {"prompt": "<image>What is 2?", "images": ["pics/2.png"]},
    )
    tokenizer = load_tokenizer(ModelConfig(path=str(idefics3)))
    data = DataConfig(path=str(one), eval_path=str(tmp_path / "a/rows.jsonl"))
    request = DataRequest(data, OnlineStage(), 0, None)
    assert {prompt.id for prompt in reading.prompts(request, tokenizer)} - ids


def test_a_prompt_with_pictures_is_never_cut(tmp_path: Path, idefics3: Path) -> None:
    with pytest.raises(UserError, match=r"prompts with pictures are longer .* can't be cut"):
        prompts(tmp_path, idefics3, truncate_prompts=True, max_prompt_length=8)


def test_the_report_counts_the_tokens_of_pictures(tmp_path: Path, idefics3: Path) -> None:
    draw(tmp_path)
    tokenizer = load_tokenizer(ModelConfig(path=str(idefics3)))
    train = [shown(tmp_path, f"pics/{number}.png", number, "train") for number in range(1, 4)]
    report = make(train, [], Use.sft, None, tokenizer=tokenizer)
    figures = next(one.figures for one in report.sections if one.name == "pictures")
    processor = processor_of(tokenizer)
    picture = train[0].columns["prompt"][0]["images"][0]
    expected = len(ids_of(tokenizer, [processor.text_of(picture)])[0])
    assert figures["tokens"] == {
        "least": expected,
        "median": expected,
        "most": expected,
        "pictures": 3,
    }
