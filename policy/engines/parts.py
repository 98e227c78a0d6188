"""Models that are parted over the ranks while they are read (engine=zero3), so that none of them
ever holds a whole one.

transformers' own way to ZeRO-3 reads every file whole on every rank before it parts a tensor
(`PreTrainedModel._load_pretrained_model`). Here its ordinary reader runs, one tensor after the
other, and each is parted as soon as it is in its module. On the way there are two private parts of
transformers 5 (`USED`).
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from conf.schema import EngineConfig
from policy.engines.deepspeed import freeze, parter
from policy.engines.loading import Loader
from policy.model import parted, whole
from rlhf.models.parts import backbone_name, base_model
from rlhf.process import distributed

# Functions of transformers by the modules that call them, and the parameters that we rely on.
USED = {
    "transformers.core_model_loading.set_param_for_module": (
        "model",
        "target_name",
        "param_value",
        "loading_info",
        "hf_quantizer",
    ),
    "transformers.modeling_utils.safe_open": None,
}
# transformers reads ahead in threads otherwise: faster than a slow network parts, all of the model
_ONE_BY_ONE = "HF_DEACTIVATE_ASYNC_LOAD"


class PartsLoader(Loader):
    """Loads models in parts: every method is a collective."""

    parts = True

    def __init__(self, engine: EngineConfig, dtype: torch.dtype) -> None:
        """dtype: of the weights while they train."""
        self.engine, self.dtype = engine, dtype

    def load(self, make: Callable[[], Any]) -> Any:
        """The model that `make` reads with transformers, parted. Weights that its files lack, such
        as a new head's, are whole on every rank.
        """
        part = parter(self.engine, self.dtype)
        shared: list[nn.Parameter] = []
        with _parting(part, shared):
            model = make()
        held = {id(param) for param in model.parameters()}
        part([param for param in shared if id(param) in held])
        # buffers too: DeepSpeed moves none of a model that it finds parted
        return model.to(distributed.device())

    def adapt(self, model: Any, attach: Callable[[Any], Any]) -> Any:
        """`attach(model)`, which may run passes of the model. What it adds gets the dtype of the
        parted weights, to which DeepSpeed turns whole models only.
        """
        with self.passing(model):
            adapted = attach(model)
        for param in adapted.parameters():
            if not parted(param) and param.is_floating_point():
                param.data = param.data.to(self.dtype)
        return adapted

    @contextmanager
    def passing(self, model: Any) -> Iterator[None]:
        """While inside, each module of `model` has its own weights whole for the time of its
        call.
        """
        with ExitStack() as hooks:
            for module in model.modules():
                own = [param for param in module.parameters(recurse=False) if parted(param)]
                if own:
                    _hold_while_called(module, own, hooks)
            yield

    def frozen(self, load: Callable[[], Any], read: Callable[..., Any]) -> Callable[..., Any]:
        """`read` of the model that `load` makes, which then takes its other arguments alone; on
        every rank as often as on the others (`passes`).
        """
        module = _Reading(self.load(load), read)
        half = self.dtype is torch.bfloat16
        engine: Callable[..., Any] = freeze(module, self.engine, distributed.device(), half=half)
        return engine

    def passes(self, own: int) -> int:
        """The most that any rank needs."""
        return int(distributed.all_max([own])[0])


class _Reading(nn.Module):
    """A model and what is read of it, as a module that DeepSpeed can run."""

    def __init__(self, model: Any, read: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.read = model, read

    def forward(self, *args: Tensor) -> Any:
        """`read(model, *args)`, without a gradient."""
        lm = base_model(self.model)
        backbone = {id(param) for param in getattr(lm, backbone_name(lm)).parameters()}
        rest = [param for param in self.model.parameters() if id(param) not in backbone]
        # inference mode would leave tensors in the parameters that no later gradient may touch
        with torch.inference_mode(False), torch.no_grad(), whole(rest):
            return self.read(self.model, *args)


@contextmanager
def _parting(
    part: Callable[[list[nn.Parameter]], None], shared: list[nn.Parameter]
) -> Iterator[None]:
    """While inside, transformers reads one tensor at a time, without mapping its file, and each is
    parted once it is set; those that other modules may share (tied embeddings) go to `shared`,
    since transformers compares them at the end.
    """
    from transformers import core_model_loading, modeling_utils

    set_param, safe_open = core_model_loading.set_param_for_module, modeling_utils.safe_open
    before = os.environ.get(_ONE_BY_ONE)

    def set_and_part(model: Any, name: str, *args: Any) -> None:
        set_param(model, name, *args)
        holder, _, last = name.rpartition(".")
        param = model.get_submodule(holder)._parameters.get(last)
        if param is None or param.is_meta:
            return
        tied = model.all_tied_weights_keys
        if name in tied or name in tied.values():
            shared.append(param)
        else:
            part([param])

    def open_unmapped(path: Any, **options: Any) -> Any:
        return safe_open(path, **(options | {"backend": "pread"}))

    core_model_loading.set_param_for_module = set_and_part
    modeling_utils.safe_open = open_unmapped
    os.environ[_ONE_BY_ONE] = "1"
    try:
        yield
    finally:
        core_model_loading.set_param_for_module = set_param
        modeling_utils.safe_open = safe_open
        if before is None:
            del os.environ[_ONE_BY_ONE]
        else:
            os.environ[_ONE_BY_ONE] = before


def _hold_while_called(module: nn.Module, own: list[nn.Parameter], hooks: ExitStack) -> None:
    calls: list[ExitStack] = []

    def gather(*_: Any) -> None:
        call = ExitStack()
        call.enter_context(whole(own))
        calls.append(call)

    def release(*_: Any) -> None:
        calls.pop().close()

    for handle in (
        module.register_forward_pre_hook(gather),
        module.register_forward_hook(release, always_call=True),
    ):
        hooks.callback(handle.remove)
