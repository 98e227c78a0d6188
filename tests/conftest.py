"""What all tests share: no network, few threads, and tiny models with their tokenizer in a
directory.
"""

import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf.process.libraries import hide_bitsandbytes
from tests import drawing

for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}.items():
    os.environ.setdefault(_name, _value)
if "PYTEST_XDIST_WORKER" in os.environ:
    # A worker of several (`make test`) computes on one thread: two that share the cores would wait
    # for each other's threads, at up to six times the CPU time. Set, not defaulted: workers inherit
    # the variable from the process that starts them.
    os.environ["OMP_NUM_THREADS"] = "1"
else:
    os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["COLUMNS"] = "160"  # tables are as wide wherever the tests run
hide_bitsandbytes()


# Files that take longest come first, roughly by their CPU seconds (docs/testing.md), so that at the
# end of a shared run no process waits long for the other. Those that start two ranks are parted.
_LONG = (
    "test_zero_online",
    "test_rollout",
    "test_zero_trl",
    "test_reward_stage",
    "test_algorithms",
    "test_engine",
    "test_resume",
    "test_sft_stage",
    "test_round_trips",
    "test_preference_stage",
    "test_config",
    "test_serve_reward",
    "test_row_weights",
    "test_recipes",
    "test_label_import",
    "test_data_stage",
    "test_gym",
    "test_watching_stage",
    "test_online",
)
# Files of one group run in one process, one after the other: importing vLLM takes longer than
# starting an engine for a tiny model, and tests/composing.py keeps what it composed.
_GROUPS = {
    "test_rollout": "vllm",
    "test_swapped": "vllm",
    "test_embeds": "vllm",
    "test_modules": "vllm",
    "test_modules_of_families": "vllm",
    "test_vllm_private": "vllm",
    "test_sync": "vllm",
    "test_eval": "vllm",
    "test_swapping": "vllm",
    "test_config": "composed",
    "test_reference": "composed",
}


def pytest_configure(config: pytest.Config) -> None:
    drawing.off()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the harnesses' tests, and begin with the files that take long."""
    for item in items:
        if "benchmarks" in item.path.relative_to(item.config.rootpath).parts:
            item.add_marker("benchmarks")
    place = {name: number for number, name in enumerate(_LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(_LONG)))


def pytest_collection_finish() -> None:
    """Adapters are known, as in every run. What importing and collecting left stays for good: the
    garbage collector need not look at it again for each of thousands of tests.
    """
    if {
        "policy.adapters",
        "rlhf.checks.memory.shapes",
    } & sys.modules.keys():  # else no test here makes one
        from rlhf.stages import methods

        methods.register()
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist there is no such hook
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests of a file stay in one process, and so do files of one group."""
    from xdist.scheduler import LoadScopeScheduling

    class Grouped(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.split("::", 1)[0]
            return _GROUPS.get(Path(path).stem, path)

    return Grouped(config, log)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny_model(tied=True) -> directory of a two-layer float32 Llama (vocabulary 300, head size
    32) and its tokenizer; made once.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from conf.schema import TinyConfig
    from rlhf.models.loading import tiny_config, train_tokenizer

    made: dict[bool, Path] = {}

    def make(*, tied: bool = True) -> Path:
        if tied not in made:
            tiny = TinyConfig(
                vocab_size=300,
                hidden_size=64,
                intermediate_size=96,
                layers=2,
                heads=2,
                max_positions=64,
                tie_embeddings=tied,
            )
            tokenizer = train_tokenizer(
                ["the quick brown fox jumps over the lazy dog"] * 8,
                tiny.vocab_size,
                tiny.max_positions,
            )
            torch.manual_seed(7)
            model = AutoModelForCausalLM.from_config(
                tiny_config(tiny, tokenizer), dtype=torch.float32
            )
            for param in model.parameters():
                if param.ndim == 2:
                    param.data.mul_(4.0)  # the initial 0.02 would leave every distribution flat
            place = tmp_path_factory.mktemp("tied" if tied else "untied")
            model.save_pretrained(place)
            tokenizer.save_pretrained(place)
            made[tied] = place
        return made[tied]

    return make


@pytest.fixture(autouse=True)
def no_handlers_left() -> Iterator[None]:
    """A command line that ran in this process leaves no handler behind: it would write to a stream
    that pytest has closed by then. Nor does it leave its level.
    """
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    root.setLevel(level)
    for handler in list(root.handlers):
        if handler not in before and type(handler) in (logging.StreamHandler, logging.FileHandler):
            root.removeHandler(handler)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch computes on one thread: with models as small as these more of them only wait for each
    other.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
