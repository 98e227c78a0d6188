"""Writing a trained policy so that the next stage loads it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from policy.model import Gather, adapter_weights, base_of, is_peft, iterate_weights, no_gather
from rlhf.models.facts import set_ends
from rlhf.process import distributed


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """A folder beside `directory` to write into. It replaces `directory` as a whole at the end, so
    that a reader never sees half of it; after an error nothing is left of it.
    """
    side = directory.with_name(directory.name + ".part")
    shutil.rmtree(side, ignore_errors=True)
    side.mkdir(parents=True)
    try:
        yield side
        if directory.exists():
            shutil.rmtree(directory)
        side.rename(directory)
    except BaseException:
        shutil.rmtree(side, ignore_errors=True)
        raise


@contextmanager
def rescuing(model: Any, directory: Path, gather: Gather = no_gather) -> Iterator[None]:
    """Around saving: after any error the tensors that trained are in rescued.safetensors of
    `directory` under torch's names, and the error says so. Not under ZeRO-3, where one rank's error
    would leave the others waiting.
    """
    from safetensors.torch import save_file

    try:
        yield
    except Exception as error:
        if gather is not no_gather or not distributed.is_main():
            raise
        file = directory / "rescued.safetensors"
        kept = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if _trains(p)}
        directory.mkdir(parents=True, exist_ok=True)
        save_file(kept, str(file))
        error.add_note(f"The {len(kept)} tensors that trained are in {file}, by torch's names.")
        raise


def _trains(param: torch.nn.Parameter) -> bool:
    return param.requires_grad


def save_model(
    model: Any,
    tokenizer: Any,
    directory: Path,
    gather: Gather = no_gather,
    dtype: torch.dtype | None = None,
) -> None:
    """Whole weights (an adapter merged in; in `dtype` where given), configuration, tokenizer and
    chat template.

    Collective under ZeRO-3; rank 0 writes, to the side: `directory` is replaced as a whole.
    """
    state: dict[str, torch.Tensor] = {}
    base = base_of(model)
    tied = _tied_names(base)
    for name, tensor in iterate_weights(model, gather):
        # A head that trains in full beside an adapter is there twice: as it was, and as it is.
        if ".original_module." in name or name in tied or not distributed.is_main():
            continue
        value = tensor.detach().cpu()
        if dtype is not None and value.is_floating_point():
            value = value.to(dtype)
        state[name.replace(".modules_to_save.default.", ".")] = value.clone().contiguous()
    if distributed.is_main():
        set_ends(base, tokenizer)  # trainers put the tokenizer's alone in their place
        with replacing(directory) as side:
            base.save_pretrained(side, state_dict=state)
            tokenizer.save_pretrained(side)
    distributed.barrier()


def save_adapter(model: Any, directory: Path, gather: Gather = no_gather) -> None:
    """The LoRA adapter alone, in PEFT's format. Collective under ZeRO-3; rank 0 writes, to the
    side: `directory` is replaced as a whole.
    """
    import json

    from safetensors.torch import save_file

    assert is_peft(model), "only an adapter model has an adapter to save"
    weights = adapter_weights(model, gather)
    if distributed.is_main():
        tensors = {n: t.cpu().contiguous() for n, t in weights.tensors.items()}
        with replacing(directory) as side:
            save_file(tensors, str(side / "adapter_model.safetensors"), metadata={"format": "pt"})
            (side / "adapter_config.json").write_text(
                json.dumps(weights.config, indent=2, default=str), encoding="utf-8"
            )
    distributed.barrier()


def _tied_names(base: Any) -> set[str]:
    """State-dict names that only alias another tensor and are left out of a checkpoint."""
    if not getattr(base.config, "tie_word_embeddings", False):
        return set()
    keys = getattr(base, "_tied_weights_keys", None) or {}
    return set(keys)
