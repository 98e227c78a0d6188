"""Low-rank adaptation by PEFT.

LoRA (Hu et al. 2021, arXiv:2106.09685), with rank-stabilised scaling (rsLoRA, Kalajdzievski 2023,
arXiv:2312.03732) or with magnitudes that train apart (DoRA, Liu et al. 2024, arXiv:2402.09353).
"""

from typing import Any

from conf.schema import AdapterConfig
from rlhf.types import UserError


def attach(model: Any, adapter: AdapterConfig, task: str) -> Any:
    """`model` with a fresh adapter; only it trains. Raises UserError where no module has one of the
    names in adapter.targets.
    """
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
        raise UserError(
            f"adapter.targets={list(adapter.targets)}: no such module; the model's linear "
            f"modules are {', '.join(linear_modules(model))}."
        ) from error


def linear_modules(model: Any) -> list[str]:
    """The last parts of the names of the model's linear layers, each once."""
    names = set()
    for name, module in model.named_modules():
        if module.__class__.__name__ == "Linear":
            names.add(name.rsplit(".", 1)[-1])
    return sorted(names)
