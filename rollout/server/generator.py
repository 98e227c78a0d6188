"""Rollouts by vLLM servers: one or more, started by this run or running already."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from conf.model import Transfer
from conf.schema import RolloutConfig
from rlhf.models.encoding import is_chat
from rlhf.models.turns import end_ids, response_text
from rlhf.process import distributed
from rlhf.process.http import bearer_token
from rlhf.types import AdapterWeights, FullWeights, Prompt, Rollout, SyncError, UserError
from rollout.sampling import Sampling, check_prompts, fresh_seed, ignore, response_seeds
from rollout.server.adapters import unload
from rollout.server.client import Request, Server, ServerFault, Written
from rollout.server.fleet import PROBE_S, Connection
from rollout.server.launch import recipe_of
from rollout.server.process import new_token
from rollout.server.routes import Model, resolve_transfer
from rollout.server.service import Service, Setup, own_service, running_service
from rollout.weights import HubNames, Incoming

FOLDER = "servers"  # of logs and descriptions, in the run's folder
_UNFIT = "unfit"  # a label of weights that must not write


class ServerGenerator:
    """Every rank asks the servers by itself. Rank 0 starts them, sends the weights, and brings
    back those that fail. `generate` may run in a thread of its own; with rollout.in_flight a sync
    may come meanwhile, and without it waits.
    """

    def __init__(
        self,
        model_path: str,
        tokenizer: Any,
        cfg: RolloutConfig,
        *,
        max_tokens: int,
        names: HubNames,
        dtype: torch.dtype,
        folder: Path,
        adapter_rank: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """`max_tokens`: prompt and response together. `names`: of the model's tensors. `folder`: of
        the run. `adapter_rank` None: whole weights only. A collective. Raises UserError where a
        server can't be used.
        """
        self.version = 0
        self.arrived: Callable[[Rollout], None] = ignore
        self.sent: dict[str, str] = {}
        self._held: dict[str, str] = {}  # checksums that a server was seen to hold
        self._readable: frozenset[str] | None = None  # names of these, once they are known
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        self.sampling = Sampling.from_config(cfg)
        self._cfg, self._names, self._model = cfg, names, Model(names, dtype)
        self._takes_adapter = adapter_rank is not None
        # held while something is written and while weights change, without rollout.in_flight
        self._turn = threading.Lock()
        options: dict[str, Any] = {
            "dtype": dtype,
            "max_tokens": max_tokens,
            "adapter_rank": adapter_rank,
            "trust_remote_code": trust_remote_code,
        }
        self._service = self._make_service(model_path, folder / FOLDER, options)
        self._pool, self._current = self._service.pool, self._service.current

    # ---- writing ----

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        seed: int | None = None,
        greedy: bool = False,
    ) -> list[Rollout]:
        """`n` responses per prompt, side by side. `greedy`: the most likely token each time, with
        its logprob at temperature 1. Raises UserError where no server is left.
        """
        with self.session() as write:
            return write(prompts, n=n, seed=seed, greedy=greedy)

    @contextlib.contextmanager
    def session(self) -> Iterator[Callable[..., list[Rollout]]]:
        """What writes as `generate`, from any thread, until the session ends. Weights change
        meanwhile with rollout.in_flight alone.
        """
        with self._in_turn():
            self._pool.places.clear()
            yield self._write

    def _write(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        seed: int | None = None,
        greedy: bool = False,
    ) -> list[Rollout]:
        check_prompts(prompts, self.sampling, max_tokens=self._max_tokens)
        seed = fresh_seed() if seed is None else seed
        owners = [prompt for prompt in prompts for _ in range(n)]
        ends = end_ids(self._tokenizer)
        seeds = response_seeds(seed, prompts, n)
        version, model = self.version, self._current.chosen
        requests = []
        for prompt, drawn in zip(owners, seeds, strict=True):
            fields = self.sampling.for_vllm(drawn, ends, prompt, greedy=greedy)
            requests.append(Request(prompt.token_ids, fields, prompt.id, model))
        rollouts: dict[int, Rollout] = {}

        def arrived(index: int, written: Written) -> None:
            rollouts[index] = self._rollout(owners[index], written, version)
            self.arrived(rollouts[index])

        self._pool.write(requests, arrived)
        return [rollouts[index] for index in range(len(owners))]

    def _rollout(self, prompt: Prompt, written: Written, version: int) -> Rollout:
        """`version`: of what wrote where the server's labels do not say it."""
        text = response_text(self._tokenizer, written.token_ids, chat=is_chat(prompt.source))
        versions = [self._current.labels.get(label, version) for label in written.versions]
        rollout = Rollout(
            prompt,
            text,
            written.token_ids,
            written.logprobs,
            written.finish_reason,
            min(versions),
        )
        if len(set(versions)) > 1:
            rollout.versions = versions
        return rollout

    @contextlib.contextmanager
    def _in_turn(self) -> Iterator[None]:
        if self._cfg.in_flight:
            yield
            return
        with self._turn:
            yield

    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """log p(token_ids[i] | token_ids[:i]) in nats for i >= 1, at temperature 1, by one of the
        servers.
        """
        return self.logprobs_of_each(token_ids)[0]

    def logprobs_of_each(self, token_ids: Sequence[int]) -> list[list[float]]:
        """`logprobs` by each server that serves."""
        model = self._current.chosen
        return list(self._pool.each(lambda s: s.logprobs(token_ids, model=model)).values())

    # ---- weights ----

    def sync(self, weights: FullWeights | AdapterWeights, version: int) -> None:
        """Take over the trainer's weights, at every server that serves. A collective.

        Raises SyncError naming every parameter that is missing, unknown or of another shape;
        `version` stays as it was then. A server that fails is brought back; UserError where none
        is left.
        """
        if isinstance(weights, AdapterWeights) is not self._takes_adapter:
            sent = "an adapter" if isinstance(weights, AdapterWeights) else "whole weights"
            raise SyncError(
                f"weight sync {version}: the trainer sent {sent}, for which the servers were not "
                "started."
            )
        with self._in_turn(), _agreed():
            if isinstance(weights, AdapterWeights):
                self._sync_adapter(weights, version)
            else:
                self._sync_whole(weights, version)
        for url in distributed.broadcast(self._pool.failed()):
            fault = ServerFault(url, "rank 0 brings it back")
            self._pool.drop(self._pool.server(url), fault)

    def _sync_whole(self, weights: FullWeights, version: int) -> None:
        tensors = self._names(weights.tensors)
        incoming = Incoming(tensors, self._model.specs, self._readable, version)
        faults = self._service.route.send(incoming, version)
        # in flight, responses are of versions before as well
        before = self._current.labels if self._cfg.in_flight else {}
        self._current.labels = before | {str(version): version}
        self._current.version = self.version = version
        for fault in faults:
            self._pool.drop(self._pool.server(fault.url), fault, tainted=True)
        if distributed.is_main():
            self.sent = incoming.checksums
            self._compare(version, None)
            self._readable = frozenset(self._held)

    def _sync_adapter(self, weights: AdapterWeights, version: int) -> None:
        """Each version under a name of its own: what is being written keeps its adapter."""
        adapters = self._service.adapters
        served = adapters.served_name(weights.name, version)
        if distributed.is_main():
            served, self.sent = adapters.write(weights, version, self._model.dtype)
            limit_s = self._cfg.sync_limit_s
            self._pool.each(lambda server: adapters.load(server, served, limit_s))
        # another dictionary, since threads read this one
        self._current.adapters = {**self._current.adapters, weights.name: served}
        self._current.chosen = served
        self._current.version = self.version = version
        if distributed.is_main():
            shapes = {name: list(shape) for name, shape in adapters.shapes.items()}
            self._compare(version, shapes)
            for name in adapters.outdated():
                self._pool.each(functools.partial(unload, served=name, limit_s=PROBE_S))

    def choose(self, name: str) -> None:
        """Write with the adapter that was synced under this name."""
        self._current.chosen = self._current.adapters[name]

    def _compare(self, version: int, lora: dict[str, list[int]] | None) -> None:
        """Drop servers that hold other weights than were sent, unless all of them do: then the
        proof of the sync says what differs. `lora`: shapes of the adapter's tensors.
        """
        held = self._pool.each(lambda server: self._checksums(server, version, lora))
        different = {url: self._different(sums) for url, sums in held.items()}
        self._held = next(iter(held.values()))
        if all(different.values()):
            return
        for url, names in different.items():
            if names:
                server = self._pool.server(url)
                _mark_unfit(server)
                cause = f"weight sync {version}: it does not hold what was sent for {names}"
                self._pool.drop(server, ServerFault(url, cause), tainted=True)

    def _different(self, held: dict[str, str]) -> str:
        names = [name for name, value in held.items() if self.sent.get(name, value) != value]
        return ", ".join(names[:5])

    def _checksums(
        self, server: Server, version: int, lora: dict[str, list[int]] | None
    ) -> dict[str, str]:
        """Checksums of what a server holds; empty where its workers share the tensors."""
        limit_s = self._cfg.sync_limit_s
        answers = server.call("rlhf_checksums", version=version, lora=lora, limit_s=limit_s)
        if len(answers) != 1 or not isinstance(answers[0], dict):
            return {}
        return {str(name): str(value) for name, value in answers[0].items()}

    def checksums(self) -> dict[str, str]:
        """Checksums of the weights that a server was seen to hold after the latest sync; empty on
        ranks that do not send. With an adapter, of its tensors.
        """
        return self._held

    # ---- the servers ----

    def _make_service(self, model_path: str, folder: Path, options: dict[str, Any]) -> Service:
        """Start the servers or find those that run already: rank 0, and then the others."""
        made: Service | None = None
        shared: tuple[list[str], str | None, str] | None = None
        with _agreed():
            if distributed.is_main():
                made, token = self._lead(model_path, folder, options)
                shared = (made.fleet.urls, token, made.run)
        shared = distributed.broadcast(shared)
        assert shared is not None
        if made is None:
            urls, token, run = shared
            made = running_service(self._setup(folder, token), urls, run)
            made.follow()
        return made

    def _lead(
        self, model_path: str, folder: Path, options: dict[str, Any]
    ) -> tuple[Service, str | None]:
        """The service of rank 0, and the servers' token. Raises UserError."""
        cfg = self._cfg
        token: str | None = None
        if cfg.server.token_env is not None:
            token = bearer_token(cfg.server.token_env, "rollout.server.token_env")
        transfer = Transfer.file  # adapters go by files
        if not self._takes_adapter:
            cuda = torch.cuda.is_available()
            transfer = resolve_transfer(
                cfg.server.transfer,
                cfg.servers,
                cuda=cuda,
                shared_device=not cfg.servers and cfg.server.devices is None,
            )
        if cfg.servers:
            service = running_service(self._setup(folder, token), cfg.servers)
        else:
            token = token or new_token()
            recipe = recipe_of(cfg, model_path, token=token, transfer=transfer, **options)
            service = own_service(self._setup(folder, token), recipe)
        try:
            service.lead(transfer)
        except BaseException as error:
            service.fleet.close()
            if isinstance(error, ServerFault):
                raise UserError(f"rollout=server: {error}.") from error
            raise
        return service, token

    def _setup(self, folder: Path, token: str | None) -> Setup:
        # all ranks together fill a server
        at_once = max(1, self._cfg.max_num_seqs // distributed.world_size())
        connection = Connection(token, self._cfg.server.request_limit_s, at_once)
        return Setup(self._cfg, self._model, self._max_tokens, folder, connection)

    def close(self) -> None:
        """End the servers that this run started, and delete the files for weights."""
        self._service.close()


@contextlib.contextmanager
def _agreed() -> Iterator[None]:
    """What fails on rank 0 fails on every rank. A collective."""
    try:
        yield
    except UserError as error:
        distributed.broadcast(str(error))
        raise
    problem = distributed.broadcast(None)
    if problem is not None and not distributed.is_main():
        raise SyncError(problem)


def _mark_unfit(server: Server) -> None:
    """Ranks that still ask the server refuse its responses from now on."""
    with contextlib.suppress(ServerFault):
        server.post("/update_weight_version", {"new_version": _UNFIT}, limit_s=PROBE_S)
