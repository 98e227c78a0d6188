"""What runs inside the workers of a vLLM server: weights come in, checksums go out.

vLLM imports this module (`--worker-extension-cls rollout.server.extension.Extension`); nothing of
ours does. Its import registers the weight-transfer engine that files and gloo need, under the name
that rollout/server/routes.py gives a server (`engine_name`).

An update runs within vLLM's protocol: start_weight_update, update_weights, finish_weight_update of
its worker and of the engine. Where one of them fails, the worker holds parts of two versions: from
then on it refuses to compute, and vLLM ends the server at the first request.
"""

import functools
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor
from torch.distributed import TCPStore
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from rollout.server.stream import Group, Received, own_address, read_whole
from rollout.server.weight_file import read_tensors
from rollout.vllm_private import (
    Streamed,
    has_head,
    held_checksums,
    multiply_one_adapter_at_once,
    pack_experts,
    rotate_natively,
)
from rollout.weights import Spec, readable_checksums

_QUOTED = 300  # characters of an error in an answer


@dataclass
class InitInfo(WeightTransferInitInfo):
    """What the engine is told of the model, and of the group where there is one."""

    family: str
    copies: list[str]  # second names of tied tensors
    host: str | None = None  # None: weights come by a file
    port: int = 0
    size: int = 0  # ranks of the group, the trainer included
    limit_s: float = 600.0


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Where an update's weights come from."""

    path: str | None = None  # None: the group


class Engine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Takes whole weights from a safetensors file or from a gloo group, by the same rules as
    rollout.vllm.VLLMGenerator.sync.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    # whether the way of the weights broke, rather than vLLM's code for the family
    source_failed = False
    _family = ""
    _unknown: Collection[str] = ()  # names that the model does not have
    _group: Group | None = None
    _passing: Streamed | None = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Join the trainer's group, if there is one. Raises RuntimeError, OSError."""
        self.shutdown()  # of a trainer that has ended
        self._family = init_info.family
        # Gemma 2's embedding is its head, under no other name
        self._unknown = () if has_head(self.model) else frozenset(init_info.copies)
        if init_info.host is None:
            return
        parallel = self.parallel_config
        worker = parallel.data_parallel_index * parallel.world_size + parallel.rank
        store = TCPStore(init_info.host, init_info.port, is_master=False)
        self._group = Group(
            store,
            1 + worker,
            init_info.size,
            address=own_address(init_info.host, init_info.port),
            limit_s=init_info.limit_s,
        )

    def start_weight_update(self) -> None:
        self.source_failed = False
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        if update_info.path is not None:
            self._load(_watched(self, read_tensors(update_info.path)))
            return
        if self._group is None:
            raise RuntimeError("the server has joined no gloo group")
        received = Received(self._group)
        try:
            read_whole(received, self._load)
        finally:
            self.source_failed = received.failed

    def _load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        known = (item for item in tensors if item[0] not in self._unknown)
        self._passing = Streamed(known, self._family)
        self.model.load_weights(iter(self._passing))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if self._passing is not None:
            self._passing.put_sinks(self.model)
        if self.device.type == "cpu":
            pack_experts(self.model)

    def shutdown(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None


def _watched(engine: Engine, tensors: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from tensors
    except Exception:
        engine.source_failed = True
        raise


class Extension:
    """Methods that vLLM's worker class gets; the trainer calls them by /collective_rpc. Each runs
    in every worker of the server.
    """

    rlhf_condemned: str | None = None  # why this worker refuses to compute
    rlhf_specs: dict[str, Spec]

    def rlhf_prepare(self: Any, specs: dict[str, tuple[str, list[int]]]) -> dict[str, Any]:
        """Before the first update. `specs`: dtype and shape of each tensor, by the hub's names.
        Returns whether the model has a head of its own.
        """
        _check_whole(self)
        self.rlhf_specs = {
            name: Spec(tuple(shape), getattr(torch, dtype))
            for name, (dtype, shape) in specs.items()
        }
        model = self.model_runner.get_model()
        if self.device.type == "cpu":
            rotate_natively(model)
        return {"has_head": has_head(model)}

    def rlhf_update(self: Any, info: dict[str, Any]) -> dict[str, str] | None:
        """A whole update. Returns vLLM's reason, as `refused`, where its code for the family does
        not take the weights. Raises what else goes wrong.
        """
        with _whole_or_condemned(self) as outcome:
            self.start_weight_update()
            self.update_weights(info)
            self.finish_weight_update()
        return outcome.answer

    def rlhf_start(self: Any) -> dict[str, str] | None:
        """The first step of an update in several; as `rlhf_update`."""
        with _whole_or_condemned(self) as outcome:
            self.start_weight_update()
        return outcome.answer

    def rlhf_receive(self: Any, info: dict[str, Any]) -> dict[str, str] | None:
        """A further step of such an update."""
        with _whole_or_condemned(self) as outcome:
            self.update_weights(info)
        return outcome.answer

    def rlhf_finish(self: Any) -> dict[str, str] | None:
        """Its last step."""
        with _whole_or_condemned(self) as outcome:
            self.finish_weight_update()
        return outcome.answer

    def rlhf_condemn(self: Any, reason: str) -> None:
        """Refuse to compute from now on."""
        self.rlhf_condemned = reason
        self.model_runner.execute_model = functools.partial(_refuse, reason)

    def rlhf_checksums(
        self: Any, version: int, lora: dict[str, list[int]] | None = None
    ) -> dict[str, str]:
        """Checksums of the weights that can be read: whole tensors, and the columns of packed ones
        that are `version`'s turn. `lora`: shapes of an adapter's tensors, by PEFT's names: those of
        the adapter that was loaded last instead.
        """
        model = self.model_runner.get_model()
        if lora is None:
            return readable_checksums(model, self.rlhf_specs, version)
        shapes = {name: tuple(shape) for name, shape in lora.items()}
        manager = self.model_runner.lora_manager._adapter_manager
        slots = manager.lora_index_to_id  # a number a slot, larger ones later; None: free
        latest = max((number for number in slots if number is not None), default=None)
        if latest is None:
            return {}
        return held_checksums(model, shapes, shapes, slot=slots.index(latest))


@dataclass
class _Outcome:
    answer: dict[str, str] | None = field(default=None)


@contextmanager
def _whole_or_condemned(worker: Any) -> Iterator[_Outcome]:
    """A step of an update. Where it fails the worker refuses to compute; what vLLM's code for the
    family raised becomes an answer, since it would raise it in a new server too.
    """
    _check_whole(worker)
    outcome = _Outcome()
    try:
        yield outcome
    except BaseException as error:
        reason = shorten(f"{type(error).__name__}: {error}", _QUOTED, placeholder=" ...")
        worker.rlhf_condemn(f"an update of its weights failed ({reason})")
        engine = worker.weight_transfer_engine
        if not isinstance(error, Exception) or getattr(engine, "source_failed", True):
            raise
        outcome.answer = {"refused": reason}


def _check_whole(worker: Any) -> None:
    if worker.rlhf_condemned is not None:
        raise RuntimeError(f"this server has to be started anew: {worker.rlhf_condemned}")


def _refuse(reason: str, *args: Any, **kwargs: Any) -> Any:
    raise RuntimeError(f"no batch is computed any more: {reason}")


def _register() -> None:
    WeightTransferEngineFactory.register_engine("rlhf", Engine)
    multiply_one_adapter_at_once(PunicaWrapperCPU)


_register()
