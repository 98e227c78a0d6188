"""What comes from others runs no code: weights, adapters, checkpoints, model repositories, chat
templates (docs/reference/security.md).
"""

import ast
import contextlib
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.schema import ModelConfig
from rlhf.models.loading import load_causal_lm, load_classifier, load_tokenizer
from rlhf.types import UserError

ROOT = Path(__file__).resolve().parents[2]


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.mark), "w"))


@pytest.fixture
def foreign(tmp_path: Path, tiny_model: Callable[..., Path]) -> Path:
    """A copy of a model's directory that a stranger could have made."""
    return Path(shutil.copytree(tiny_model(), tmp_path / "foreign"))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "code_ran"


def pickled(payload: Any, place: Path) -> None:
    place.write_bytes(pickle.dumps(payload))


@pytest.mark.parametrize("load", [load_causal_lm, load_classifier])
def test_pickled_weights_are_refused(foreign: Path, mark: Path, load: Callable[..., Any]) -> None:
    tokenizer = load_tokenizer(ModelConfig(path=str(foreign)))
    (foreign / "model.safetensors").unlink()
    pickled(Payload(mark), foreign / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin.*safetensors"):
        load(ModelConfig(path=str(foreign)), tokenizer)
    assert not mark.exists()


def test_a_pickled_adapter_is_refused(foreign: Path, mark: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(path=str(foreign)))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    content = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(foreign),
        "r": 4,
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(content), encoding="utf-8")
    pickled(Payload(mark), adapter / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model\.bin.*safetensors"):
        load_causal_lm(ModelConfig(path=str(adapter)), tokenizer)
    assert not mark.exists()


def test_a_checkpoint_with_code_in_it_is_refused(mark: Path, tmp_path: Path) -> None:
    from conf.schema import EngineConfig
    from conf.stages import SFTStage
    from policy.engines.base import OptimSettings
    from policy.engines.torch import make_engine

    engine = make_engine(
        torch.nn.Linear(2, 2),
        EngineConfig(),
        OptimSettings.from_stage(SFTStage(), total_steps=2),
        torch.device("cpu"),
        half=False,
    )
    torch.save({"model": Payload(mark)}, tmp_path / "engine.pt")
    with pytest.raises(pickle.UnpicklingError):
        engine.load(tmp_path)
    assert not mark.exists()


def test_random_states_with_code_in_them_are_refused(mark: Path, tmp_path: Path) -> None:
    from rlhf.process import randomness

    torch.save({"python": Payload(mark)}, tmp_path / "random-0.pt")
    with pytest.raises(pickle.UnpicklingError):
        randomness.load(tmp_path, 0)
    assert not mark.exists()


STRANGE = {
    "AutoConfig": "strange.Config",
    "AutoModelForCausalLM": "strange.Model",
    "AutoModelForSequenceClassification": "strange.Model",
}


def read_shape(cfg: ModelConfig, tokenizer: Any) -> Any:
    from rlhf.checks.memory.shapes import read_shape

    return read_shape(cfg)


@pytest.mark.parametrize("load", [load_causal_lm, load_classifier, read_shape])
@pytest.mark.parametrize("adapter", [False, True])
def test_code_of_a_model_repository_does_not_run_unless_it_is_asked_for(
    foreign: Path,
    mark: Path,
    tmp_path: Path,
    load: Callable[[ModelConfig, Any], Any],
    adapter: bool,
) -> None:
    tokenizer = load_tokenizer(ModelConfig(path=str(foreign)))
    config = json.loads((foreign / "config.json").read_text(encoding="utf-8"))
    (foreign / "config.json").write_text(
        json.dumps(config | {"model_type": "strange", "auto_map": STRANGE}), encoding="utf-8"
    )
    # Classes of their own: transformers marks what it loaded so, and saves its source beside the
    # weights from then on.
    code = (
        f"open({str(mark)!r}, 'w')\nfrom transformers import LlamaConfig, "
        "LlamaForCausalLM\nclass Config(LlamaConfig): model_type = 'strange'\n"
    )
    code += "class Model(LlamaForCausalLM): config_class = Config\n"
    (foreign / "strange.py").write_text(code, encoding="utf-8")
    place = foreign
    if adapter:
        place = tmp_path / "adapter"
        place.mkdir()
        content = {
            "peft_type": "LORA",
            "base_model_name_or_path": str(foreign),
            "r": 4,
            "target_modules": ["q_proj"],
            "task_type": "CAUSAL_LM",
        }
        (place / "adapter_config.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="can't be read"):
        load(ModelConfig(path=str(place)), tokenizer)
    assert not mark.exists()
    if not adapter and load is read_shape:  # what was refused would have run
        load(ModelConfig(path=str(place), trust_remote_code=True), tokenizer)
        assert mark.exists()


def test_code_of_a_tokenizers_repository_does_not_run_unless_it_is_asked_for(
    foreign: Path, mark: Path
) -> None:
    place = foreign / "tokenizer_config.json"
    config = json.loads(place.read_text(encoding="utf-8")) | {
        "tokenizer_class": "Strange",
        "auto_map": {"AutoTokenizer": [None, "strange.Strange"]},
    }
    place.write_text(json.dumps(config), encoding="utf-8")
    (foreign / "strange.py").write_text(
        f"open({str(mark)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast\nclass "
        "Strange(PreTrainedTokenizerFast): pass\n",
        encoding="utf-8",
    )
    with contextlib.suppress(UserError):  # transformers may read it by the files that it knows
        load_tokenizer(ModelConfig(path=str(foreign)))
    assert not mark.exists()
    load_tokenizer(ModelConfig(path=str(foreign), trust_remote_code=True))
    assert mark.exists()


def test_a_sheet_that_unpacks_to_gigabytes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from openpyxl import Workbook

    from rlhf.data import files, opening

    book = Workbook()
    for _ in range(3000):
        book.active.append(["a" * 500])
    book.save(tmp_path / "rows.xlsx")
    size = (tmp_path / "rows.xlsx").stat().st_size
    assert len(list(files.scan(tmp_path / "rows.xlsx"))) == 2999, (
        "below a gigabyte any sheet is read"
    )
    monkeypatch.setattr(opening, "_MOST_UNPACKED", 10 * size)
    monkeypatch.setattr(opening, "_MOST_RATIO", 2)
    with pytest.raises(UserError, match=rf"rows.xlsx: {size} bytes unpack to .* GiB"):
        list(files.scan(tmp_path / "rows.xlsx"))


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Every call in the product, with its place."""
    for path in sorted(
        path
        for package in ("rlhf", "reward", "policy", "rollout", "eval")
        for path in (ROOT / package).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node


# Reads only what the same object wrote, into a file without a name that ends with it.
OWN_PICKLES = "rlhf/data/prepare/held.py"
# Its source is executed in the sandbox, for each call anew; here its signatures alone are read.
IN_THE_SANDBOX = "rlhf/environments/functions.py"


def test_nothing_that_is_loaded_may_run_code() -> None:
    """Every torch.load says weights_only=True, trust_remote_code is the configuration's, and no
    other loader of code is called.
    """
    loads = 0
    for place, call in calls():
        name, given = (
            ast.unparse(call.func),
            {word.arg: ast.unparse(word.value) for word in call.keywords},
        )
        if name == "torch.load":
            loads += 1
            assert given.get("weights_only") == "True", place
        trusted = given.get("trust_remote_code", "False")
        assert trusted in ("False", "trust_remote_code") or trusted.endswith(
            ".trust_remote_code"
        ), f"{place}: trust_remote_code={trusted}"
        assert given.get("allow_pickle", "False") == "False", place
        if name == "pickle.loads" and place.startswith(f"{OWN_PICKLES}:"):
            continue
        if name == "eval" and place.startswith(f"{IN_THE_SANDBOX}:"):
            continue
        called_here = name.startswith("functions.") and place.startswith("rlhf/environments/")
        assert not called_here, f"{place}: {name} outside of the sandbox"
        assert name not in (
            "eval",
            "pickle.load",
            "pickle.loads",
            "joblib.load",
            "yaml.load",
            "yaml.unsafe_load",
            "torch.hub.load",
        ), f"{place}: {name}"
    assert loads >= 3


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ],
)
def test_a_chat_template_reaches_no_python(foreign: Path, template: str) -> None:
    from jinja2.exceptions import SecurityError

    (foreign / "chat_template.jinja").write_text(template, encoding="utf-8")
    tokenizer = load_tokenizer(ModelConfig(path=str(foreign)))
    with pytest.raises(SecurityError):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
