"""Adapters by PEFT: which weights a stage trains."""

from typing import Any

from conf.choices import AdapterKind
from conf.schema import AdapterConfig
from rlhf.types import UserError


def attach(model: Any, adapter: AdapterConfig, *, task: str) -> Any:
    """`model` with a fresh LoRA adapter (only it trains), or `model` itself with every weight
    trainable.

    `task` is PEFT's task type: ``CAUSAL_LM`` or ``SEQ_CLS`` (whose scalar head trains in full
    beside the adapter).
    """
    if adapter.kind is AdapterKind.none:
        return model
    from peft import LoraConfig, get_peft_model

    targets: Any = list(adapter.targets)
    if targets == ["all-linear"]:
        targets = "all-linear"
    config = LoraConfig(
        task_type=task,
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=targets,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        if "not found in the base model" not in str(error):
            raise
        linear = sorted(
            {
                name.rsplit(".", 1)[-1]
                for name, module in model.named_modules()
                if module.__class__.__name__ == "Linear"
            }
        )
        raise UserError(
            f"adapter.targets={list(adapter.targets)}: no such module; the model's linear "
            f"modules are {', '.join(linear)}."
        ) from error


def enable_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass (Chen et al. 2016, arXiv:1604.06174); also under a
    frozen embedding (LoRA).
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.enable_input_require_grads()
