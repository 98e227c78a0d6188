"""Adapters: which weights a stage trains. A method is a file here and a line in `METHODS`.

A method that is no plain LoRA also needs a way to the generator (conf/schema.py `merges_lora`,
rollout/), a memory plan (rlhf/checks/memory/), a published rate (conf/published.py) and weights
that are saved whole (policy/model.py, policy/saving.py): there "an adapter" still means LoRA.
"""

from collections.abc import Callable
from typing import Any

from conf.choices import AdapterKind
from conf.schema import AdapterConfig
from policy.adapters import lora

# From a model, adapter.*, and PEFT's task type to the model with a fresh adapter.
METHODS: dict[AdapterKind, Callable[[Any, AdapterConfig, str], Any]] = {
    AdapterKind.lora: lora.attach,
}


def attach(model: Any, adapter: AdapterConfig, *, task: str) -> Any:
    """`model` with a fresh adapter of the method adapter.kind (only it trains), or `model` itself
    with every weight trainable.

    `task` is PEFT's task type: ``CAUSAL_LM`` or ``SEQ_CLS`` (whose scalar head trains in full
    beside the adapter). Raises UserError where adapter.targets names no module of the model.
    """
    if adapter.kind is AdapterKind.none:
        return model
    return METHODS[adapter.kind](model, adapter, task)


def enable_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass (Chen et al. 2016, arXiv:1604.06174); also under a
    frozen embedding (LoRA).
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.enable_input_require_grads()
