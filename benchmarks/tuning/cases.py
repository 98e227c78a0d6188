"""The ways to fine-tune that are compared, and the learning rates that each is tried with."""

from dataclasses import dataclass

Rates = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Case:
    """A way to fine-tune."""

    overrides: tuple[str, ...]  # of stage=sft
    rates: Rates
    family: str  # its colour in the picture
    one_start: bool = False  # the model or the data give it whatever the seed, and it takes long


_FULL: Rates = (2e-5, 1e-4, 3e-4)
_LOW: Rates = (3e-4, 1e-3, 4e-3)
_HIGH: Rates = (3e-3, 1e-2, 4e-2)
_PROMPT: Rates = (3e-3, 3e-2, 2e-1)
_R8 = "adapter.rank=8"
_ROWS = "adapter.sample_rows=64"  # the covariance of every layer's inputs takes a pass for each


def _weights(rates: Rates, *overrides: str) -> Case:
    return Case(overrides, rates, "weights")


def _low_rank(preset: str, rates: Rates = _LOW, *more: str) -> Case:
    return Case((f"adapter={preset}", "adapter.dropout=0", *more), rates, "low rank")


def _one_start(preset: str, *more: str) -> Case:
    overrides = (f"adapter={preset}", "adapter.dropout=0", _R8, *more)
    return Case(overrides, _LOW, "low rank", one_start=True)


def _modules(preset: str, rates: Rates = _LOW) -> Case:
    return Case((f"adapter={preset}", "adapter.dropout=0"), rates, "modules")


def _prompt(preset: str) -> Case:
    return Case((f"adapter={preset}",), _PROMPT, "prompt")


CASES: dict[str, Case] = {
    "full": _weights(_FULL),
    "top 4 layers": _weights(_FULL, "stage.train.layers=4"),
    "layer by layer": _weights(_FULL, "stage.unfreeze.every=1"),
    "lora": _low_rank("lora", _LOW, _R8),
    "rslora": _low_rank("rslora", _LOW, _R8),
    "dora": _low_rank("dora", _LOW, _R8),
    "pissa": _one_start("pissa"),
    "olora": _one_start("olora"),
    "eva": _one_start("eva", _ROWS),
    "corda": _one_start("corda", _ROWS),
    "loftq": _one_start("loftq"),
    "lora_plus": _low_rank("lora_plus", _LOW, _R8),
    "lora_fa": _low_rank("lora_fa", _LOW, _R8),
    "qlora": _low_rank("qlora", _LOW, _R8),
    "adalora": _low_rank("adalora", (1e-3, 3e-3, 1e-2)),
    "gelora": _low_rank("gelora"),
    "rasa": _low_rank("rasa"),
    "lora_mini": _low_rank("lora_mini", _HIGH),
    "vera": _low_rank("vera", _HIGH),
    "ia3": Case(("adapter=ia3",), _HIGH, "low rank"),
    "oft": _low_rank("oft"),
    "molora": _modules("molora"),
    "houlsby": _modules("houlsby"),
    "pfeiffer": _modules("pfeiffer"),
    "parallel": _modules("parallel"),
    "prompt": _prompt("prompt"),
    "ptuning": _prompt("ptuning"),
    "prefix": _prompt("prefix"),
}
