"""Adapters: which weights a stage trains. A method is a file here and a line in `METHODS`.

A method that is no plain LoRA also needs a way to the generator (conf/schema.py `merges_lora`,
rollout/), a memory plan (rlhf/checks/memory/), a published rate (conf/published.py) and weights
that are saved whole (policy/model.py, policy/saving.py): there "an adapter" still means LoRA.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from conf.choices import AdapterKind
from conf.schema import AdapterConfig, ModelConfig
from policy.adapters import lora
from rlhf.models.directories import CLASSIFIER
from rlhf.models.loading import without_weights

# From a model, adapter.*, and PEFT's task type to the model with a fresh adapter.
METHODS: dict[AdapterKind, Callable[[Any, AdapterConfig, str], Any]] = {
    AdapterKind.lora: lora.attach,
}


def attach(
    model: Any,
    adapter: AdapterConfig,
    *,
    task: str,
    base: str | None = None,
    trains_head: bool = True,
) -> Any:
    """`model` with a fresh adapter of the method adapter.kind (only it trains), or `model` itself
    with every weight trainable.

    `task` is PEFT's task type: ``CAUSAL_LM`` or ``SEQ_CLS`` (whose scalar head trains in full
    beside the adapter). base: what the saved adapter names as its base, a directory or hub's name
    of the whole weights in `model`; a directory is named absolutely, so that the adapter finds it
    from anywhere. trains_head: as in `lora.check_targets`, which raises UserError for
    adapter.targets that the model can't have.
    """
    if adapter.kind is AdapterKind.none:
        return model
    lora.check_targets(model, adapter.targets, trains_head=trains_head)
    adapted = METHODS[adapter.kind](model, adapter, task)
    if base is not None:
        directory = Path(base).expanduser()
        name = str(directory.resolve()) if directory.is_dir() else base
        adapted.peft_config["default"].base_model_name_or_path = name
    return adapted


def check(
    model: ModelConfig, adapter: AdapterConfig, *, task: str, trains_head: bool = True
) -> None:
    """What `attach` would refuse, told by the model's configuration before any weight loads; of a
    hub's model, a GGUF file and a new ``model=tiny`` `attach` itself tells it. Raises UserError.
    """
    if adapter.kind is AdapterKind.none or list(adapter.targets) == lora.ALL_LINEAR:
        return
    empty = without_weights(model, classifier=task == CLASSIFIER)
    if empty is not None:
        lora.check_targets(empty, adapter.targets, trains_head=trains_head)


def enable_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass (Chen et al. 2016, arXiv:1604.06174); also under a
    frozen embedding (LoRA).
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.enable_input_require_grads()
