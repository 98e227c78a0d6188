"""Methods of PEFT that scale or turn what a frozen layer reads or gives: VeRA, (IA)^3, OFT. Their
updates are ones of weights, but no LoRA of a small rank: generators get merged weights.
"""

from typing import Any

from conf.schema import AdapterConfig
from policy.adapters import Fresh, Method
from policy.adapters.guards import put_on
from policy.adapters.targets import (
    adapted_layers,
    adapted_linears,
    check_targets,
    check_whole,
    modules_to_save,
    whole_count,
)
from rlhf.types import UserError

# The layers whose input (IA)^3 scales, not their output: those that end a feed-forward block. PEFT
# has a table of them by family; these are its names.
_ENDS_OF_FEED_FORWARD = (
    "down_proj",
    "fc2",
    "fc_out",
    "dense_4h_to_h",
    "mlp.c_proj",
    "wo",
    "w2",
    "output.dense",
)
_LARGEST_BLOCK = 128  # among the sizes that a message proposes


def check(model: Any, adapter: AdapterConfig, trains_head: bool) -> None:
    """What the three refuse before weights load. Raises UserError."""
    check_targets(model, adapter.targets, trains_head=trains_head)
    check_whole(model, adapter)
    for name, layer in adapted_layers(model, adapter).items():
        if hasattr(layer, "num_embeddings"):
            raise UserError(
                f"adapter.targets={list(adapter.targets)}: {name} is an embedding, which "
                f"adapter.kind={adapter.kind.value} does not adapt. Leave it out."
            )


# ---- VeRA ----


def attach_vera(model: Any, adapter: AdapterConfig, fresh: Fresh) -> Any:
    """dW = diag(b) B diag(d) A with one frozen random pair A, B for all layers, cut to each layer's
    size; the vectors b and d train (Kopiczko et al. 2023, arXiv:2310.11454). b starts at 0.

    A and B are saved beside the vectors.
    """
    from peft import VeraConfig
    from peft.tuners.vera import Linear

    config = VeraConfig(
        task_type=fresh.task,
        r=adapter.rank,
        vera_dropout=adapter.dropout,
        target_modules=list(adapted_layers(model, adapter)),
        projection_prng_key=adapter.vera.seed,
        d_initial=adapter.vera.start,
        save_projection=True,
        modules_to_save=modules_to_save(model, adapter, fresh.task),
    )
    return put_on(model, adapter, config, Linear)


def expected_vera(model: Any, adapter: AdapterConfig) -> int:
    """rank + out for each layer adapted."""
    count = whole_count(model, adapter)
    for _, outputs in adapted_linears(model, adapter).values():
        count += adapter.rank + outputs
    return count


def frozen_vera(model: Any, adapter: AdapterConfig) -> int:
    """rank (in + out): the shared pair, as wide as the widest layers."""
    widths = adapted_linears(model, adapter).values()
    inputs = max(inputs for inputs, _ in widths)
    outputs = max(outputs for _, outputs in widths)
    return adapter.rank * (inputs + outputs)


# ---- (IA)^3 ----


def attach_ia3(model: Any, adapter: AdapterConfig, fresh: Fresh) -> Any:
    """One factor for each output of a layer, for each input where the layer ends a feed-forward
    block; all start at 1 (Liu et al. 2022, arXiv:2205.05638).
    """
    from peft import IA3Config
    from peft.tuners.ia3 import Linear

    names = list(adapted_layers(model, adapter))
    config = IA3Config(
        task_type=fresh.task,
        target_modules=names,
        feedforward_modules=[name for name in names if scales_inputs(name)],
        modules_to_save=modules_to_save(model, adapter, fresh.task),
    )
    return put_on(model, adapter, config, Linear)


def scales_inputs(name: str) -> bool:
    """Whether (IA)^3 scales what the layer of this name reads, not what it gives."""
    return any(name == end or name.endswith(f".{end}") for end in _ENDS_OF_FEED_FORWARD)


def expected_ia3(model: Any, adapter: AdapterConfig) -> int:
    """out for each layer adapted, in for those that end a feed-forward block."""
    count = whole_count(model, adapter)
    for name, (inputs, outputs) in adapted_linears(model, adapter).items():
        width = outputs
        if scales_inputs(name):
            width = inputs
        count += width
    return count


# ---- OFT ----


def check_oft(model: Any, adapter: AdapterConfig, trains_head: bool) -> None:
    """As `check`; and every adapted layer's inputs fall into blocks of the one size: PEFT would
    take another size for a layer where they don't. Raises UserError.
    """
    check(model, adapter, trains_head)
    size = adapter.oft.block_size
    for name, (inputs, _) in adapted_linears(model, adapter).items():
        if inputs % size:
            fitting = [block for block in range(2, _LARGEST_BLOCK + 1) if inputs % block == 0]
            raise UserError(
                f"adapter.oft.block_size={size}: {name} has {inputs} inputs, which don't fall into "
                f"blocks of {size}. Expected one of {', '.join(map(str, fitting))}."
            )


def attach_oft(model: Any, adapter: AdapterConfig, fresh: Fresh) -> Any:
    """W R with an orthogonal R of blocks, which the Cayley transform makes of skew-symmetric
    matrices (Qiu et al. 2023, arXiv:2306.07280): neurons keep their lengths and the angles between
    them. R starts as the identity. By an exact solve: PEFT's own default is a series of five terms.
    """
    from peft import OFTConfig
    from peft.tuners.oft import Linear

    config = OFTConfig(
        task_type=fresh.task,
        oft_block_size=adapter.oft.block_size,
        module_dropout=adapter.dropout,
        target_modules=list(adapted_layers(model, adapter)),
        use_cayley_neumann=False,
        modules_to_save=modules_to_save(model, adapter, fresh.task),
    )
    return put_on(model, adapter, config, Linear)


def expected_oft(model: Any, adapter: AdapterConfig) -> int:
    """in (block - 1) / 2 for each layer adapted: a skew-symmetric matrix a block."""
    count = whole_count(model, adapter)
    for inputs, _ in adapted_linears(model, adapter).values():
        count += inputs * (adapter.oft.block_size - 1) // 2
    return count


VERA = Method(attach=attach_vera, expected=expected_vera, frozen=frozen_vera, check=check)
IA3 = Method(attach=attach_ia3, expected=expected_ia3, check=check)
OFT = Method(attach=attach_oft, expected=expected_oft, check=check_oft)
