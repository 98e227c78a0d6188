"""Rollouts by vLLM, its engine in this process."""

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from textwrap import shorten
from typing import Any

import torch

from conf.schema import RolloutConfig
from rlhf.models.encoding import is_chat
from rlhf.models.templates import processor_of
from rlhf.models.turns import end_ids, response_text
from rlhf.process.libraries import first_line
from rlhf.types import AdapterWeights, FullWeights, Prompt, Rollout, SyncError, UserError
from rollout.sampling import (
    Sampling,
    check_prompts,
    check_read,
    check_shown,
    device_options,
    fresh_seed,
    picture_request,
    reading_options,
    response_seeds,
)
from rollout.vllm_private import (
    QUIET,
    Streamed,
    engine_environment,
    errors_only,
    has_head,
    held_checksums,
    kept_apart,
    lora_options,
    multiply_one_adapter_at_once,
    pack_experts,
    rotate_natively,
    sent_checksums,
    stop_engine_only,
)
from rollout.weights import AdapterFiles, HubNames, Incoming, Spec, readable_checksums

Rows = Sequence[Sequence[int]]  # of token ids


def takes_loras(architecture: str) -> bool:
    """Whether vLLM's own code for a class of transformers applies LoRA adapters."""
    with engine_environment():
        from vllm import ModelRegistry
        from vllm.model_executor.models.interfaces import supports_lora

        model = ModelRegistry.models.get(architecture)
        return model is not None and supports_lora(model.load_model_cls())


class VLLMGenerator:
    """One vLLM engine per rank. After a sync of an adapter the engine applies it; otherwise it
    holds the policy's whole weights.
    """

    _sleeps = False  # rollout.sleep
    _stays = False  # awake for now
    _asleep: tuple[str, ...] = ()  # parts of the engine, in the order in which they wake

    def __init__(
        self,
        model_path: str,
        tokenizer: Any,
        cfg: RolloutConfig,
        *,
        max_tokens: int,
        names: HubNames,
        dtype: torch.dtype,
        adapter_rank: int | None = None,
        ahead: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        """`max_tokens`: prompt and response together. `names`: of the model's tensors.
        `adapter_rank` None: whole weights only. `ahead`: virtual tokens (rollout/embeds.py).
        """
        self.version = 0
        self.sent: dict[str, str] = {}
        # names of checksums that the engine gives; known after the first look
        self._readable: frozenset[str] | None = None
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        self.sampling = Sampling.from_config(cfg)
        self._dtype = dtype
        self._reads_pictures = processor_of(tokenizer) is not None
        self._names = names
        self._specs = {name: Spec(spec.shape, dtype) for name, spec in names.specs.items()}
        self._adapter: AdapterFiles | None = None
        self._loras: dict[str, Any] = {}  # vLLM's requests for adapters, by name
        self._lora: Any = None  # the one that writes
        self._sleeps = cfg.sleep
        self._made_group = not torch.distributed.is_initialized()  # of one, by starting the engine
        with engine_environment():
            from vllm import LLM
            from vllm.model_executor.models.transformers import base as transformers_backend

            for name in QUIET:  # a filter: levels are reset when the engine configures its loggers
                logging.getLogger(name).addFilter(errors_only)
            options = device_options(cfg, dtype, max_tokens + ahead)
            options |= reading_options(pictures=self._reads_pictures)
            options["enable_prompt_embeds"] = ahead > 0
            if adapter_rank is not None:
                options |= self._prepare_adapter(adapter_rank, cfg.max_lora_rank)
            with kept_apart(transformers_backend) as classes, self._told(names.family):
                self._llm = LLM(
                    model_path,
                    trust_remote_code=trust_remote_code,
                    dtype=str(dtype).removeprefix("torch."),
                    max_model_len=max_tokens + ahead,
                    max_num_seqs=cfg.max_num_seqs,
                    logprobs_mode="processed_logprobs",  # of the distribution that is sampled from
                    seed=0,
                    enable_sleep_mode=cfg.sleep,
                    **options,
                )
                self._write_once(max_tokens)
            self._llm.apply_model(classes.claim)
            if not torch.cuda.is_available():
                self._llm.apply_model(rotate_natively)
        self.rest()

    def _prepare_adapter(self, rank: int, wished: int | None) -> dict[str, Any]:
        """Make room for the adapter's files; returns the engine's options for it."""
        from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

        if not torch.cuda.is_available():
            multiply_one_adapter_at_once(PunicaWrapperCPU)
        self._adapter = AdapterFiles()
        return lora_options(rank, wished)

    def _write_once(self, max_tokens: int) -> None:
        """Up to two tokens: some layers find only now that they have no code for their sizes."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0, max_tokens=min(2, max_tokens - 1), ignore_eos=True, detokenize=False
        )
        self._llm.generate([{"prompt_token_ids": [0]}], params, use_tqdm=False)

    @contextmanager
    def _told(self, family: str) -> Iterator[None]:
        """What keeps vLLM from starting this family here, as a UserError: a layer, a size or a
        device that it has no code for.
        """
        try:
            yield
        except Exception as error:
            if self._made_group:
                from vllm.distributed import cleanup_dist_env_and_memory

                cleanup_dist_env_and_memory()
            raise UserError(
                f"rollout=vllm: vLLM does not start {family} here ({type(error).__name__}: "
                f"{first_line(error)}). Set rollout=hf, or remove the cause."
            ) from error

    @property
    def llm(self) -> Any:
        return self._llm

    def rest(self) -> None:
        """With rollout.sleep, leave the device to the trainer until the next call: vLLM's level 1,
        weights to the host and no cache. Not run on a GPU: written after vLLM 0.32's source.
        """
        if self._sleeps and not self._asleep and not self._stays:
            self._llm.sleep(level=1)  # level 2 would forget a LoRA's base, which no sync brings
            self._asleep = ("weights", "kv_cache")

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Between calls the engine does not sleep; it does at the end."""
        self._stays = True
        try:
            yield
        finally:
            self._stays = False
            self.rest()

    def _wake(self, last: str = "kv_cache") -> None:
        """Take the device again, up to `last` of the parts that sleep."""
        while last in self._asleep:
            self._llm.wake_up(tags=[self._asleep[0]])
            self._asleep = self._asleep[1:]

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        seed: int | None = None,
        greedy: bool = False,
    ) -> list[Rollout]:
        """`n` responses per prompt, side by side. `greedy`: the most likely token each time, with
        its logprob at temperature 1. With rollout.sleep the engine sleeps afterwards.
        """
        self._wake()
        check_prompts(prompts, self.sampling, max_tokens=self._max_tokens)
        check_shown(prompts, self._tokenizer)
        seed = fresh_seed() if seed is None else seed
        owners = [prompt for prompt in prompts for _ in range(n)]
        requests = [self._asked(prompt) for prompt in owners]
        seeds = response_seeds(seed, prompts, n)
        params = [self._params(*drawn, greedy) for drawn in zip(seeds, owners, strict=True)]
        outputs = self._llm.generate(requests, params, use_tqdm=False, lora_request=self._lora)
        for prompt, output in zip(owners, outputs, strict=True):
            if prompt.images:
                check_read(prompt, output.prompt_token_ids, self._names.family)
        written = [output.outputs[0] for output in outputs]
        self.rest()
        return [self._rollout(prompt, w) for prompt, w in zip(owners, written, strict=True)]

    def _asked(self, prompt: Prompt) -> dict[str, Any]:
        if prompt.images:
            return picture_request(self._tokenizer, prompt)
        return self._request(prompt.token_ids)

    def _request(self, token_ids: Sequence[int]) -> dict[str, Any]:
        return {"prompt_token_ids": list(token_ids)}

    def _params(self, seed: int, prompt: Prompt, greedy: bool) -> Any:
        from vllm import SamplingParams

        fields = self.sampling.for_vllm(seed, end_ids(self._tokenizer), prompt, greedy=greedy)
        return SamplingParams(skip_clone=True, **fields)

    def _rollout(self, prompt: Prompt, written: Any) -> Rollout:
        if written.finish_reason not in ("stop", "length"):
            raise RuntimeError(
                f"vLLM ended the response to prompt {prompt.id} with "
                f"finish_reason={written.finish_reason!r}"
            )
        token_ids = list(written.token_ids)
        text = response_text(self._tokenizer, token_ids, chat=is_chat(prompt.source))
        logprobs = [
            position[token].logprob
            for position, token in zip(written.logprobs, token_ids, strict=True)
        ]
        return Rollout(prompt, text, token_ids, logprobs, written.finish_reason, self.version)

    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """log p(token_ids[i] | token_ids[:i]) in nats for i >= 1, at temperature 1: length
        len(token_ids) - 1.
        """
        return self.logprobs_behind([token_ids[:-1]], [token_ids[-1:]])[0]

    def logprobs_behind(
        self, contexts: Rows, lasts: Rows, *, whole: bool = True
    ) -> list[list[float]]:
        """For each context the logprobs of its tokens from the second on, then of each of `lasts`
        (up to 128) as the next one. Without `whole` of `lasts` alone: contexts share prefixes then.
        """
        from vllm import SamplingParams

        self._wake()
        common: dict[str, Any] = {"temperature": 0.0, "max_tokens": 1, "detokenize": False}
        common["prompt_logprobs"] = 0 if whole else None
        # By name at the first position generated, so that a sequence of max_tokens fits as well.
        params = [
            SamplingParams(logprobs=len(asked), logprob_token_ids=list(asked), **common)
            for asked in lasts
        ]
        requests = [self._request(context) for context in contexts]
        outputs = self._llm.generate(requests, params, use_tqdm=False, lora_request=self._lora)
        out = []
        for output, context, asked in zip(outputs, contexts, lasts, strict=True):
            known = output.prompt_logprobs[-len(context) :] if whole else []  # behind virtual ones
            pairs = [*zip(known[1:], context[1:], strict=False)]
            pairs += [(output.outputs[0].logprobs[0], token) for token in asked]
            out.append([position[token].logprob for position, token in pairs])
        return out

    def sync(self, weights: FullWeights | AdapterWeights, version: int) -> None:
        """Take over the trainer's weights and forget every prefix computed with the old ones.

        Raises SyncError naming every parameter that is missing, unknown or of another shape;
        `version` stays as it was then. An engine that slept gets its cache back when the weights
        are there, so that the device need not hold it beside what gathers them.
        """
        self._wake("weights")
        if isinstance(weights, AdapterWeights):
            self._sync_adapter(weights, version)
        elif self._adapter is not None:
            raise SyncError(
                f"weight sync {version}: the trainer sent whole weights to an engine that was "
                "started for a LoRA adapter."
            )
        else:
            tensors = self._names(weights.tensors)
            left = self._names.of(weights.kept)
            specs = {name: spec for name, spec in self._specs.items() if name not in left}
            incoming = Incoming(tensors, specs, self._readable, version)
            # Gemma 2's embedding is its head, and vLLM knows no other name of it.
            unknown = set() if any(self._llm.apply_model(has_head)) else self._names.copies
            known = (item for item in incoming if item[0] not in unknown)
            passing = Streamed(known, self._names.family)
            self._reload(passing, incoming, version)
            self._llm.apply_model(passing.put_sinks)
            if not torch.cuda.is_available():
                self._llm.apply_model(pack_experts)
            incoming.finish(version)
            self.sent = incoming.checksums
        self._wake()
        if self._reads_pictures:  # what the old weights made of them
            self._llm.llm_engine.reset_encoder_cache()
        if not self._llm.reset_prefix_cache():
            raise SyncError(
                f"weight sync {version}: vLLM did not drop the prefixes that it computed with "
                "the old weights."
            )
        self.version = version

    def _reload(self, passing: Streamed, incoming: Incoming, version: int) -> None:
        """Have the engine read `passing`. Raises SyncError where its code for the family can't."""
        try:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(passing)})
        # whatever vLLM's code for a family raises
        except Exception as error:
            if incoming.failed:
                raise
            for _ in incoming:  # other ranks wait for this one to take every tensor
                pass
            reason = shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")
            raise SyncError(
                f"weight sync {version}: vLLM does not take the weights of {self._names.family} "
                f"({reason}). Set rollout=hf, or remove the cause."
            ) from error

    def _sync_adapter(self, weights: AdapterWeights, version: int) -> None:
        """Have the engine load the adapter now, in place of the one of that name. It writes from
        now on.
        """
        from vllm.lora.request import LoRARequest

        if self._adapter is None:
            raise SyncError(
                f"weight sync {version}: the trainer sent an adapter to an engine that was "
                "started for whole weights."
            )
        tensors = self._adapter.write(weights, version)
        self.sent = sent_checksums(tensors, weights.config, self._dtype)
        name, folder = weights.name, str(self._adapter.folder(weights.name))
        number = 1 + list({**self._loras, name: None}).index(name)
        self._llm.llm_engine.add_lora(LoRARequest(name, number, folder, load_inplace=True))
        # Requests name the adapter only: with load_inplace each step would read its file again.
        self._loras[name] = LoRARequest(name, number, folder)
        self._lora = self._loras[name]

    def choose(self, name: str) -> None:
        """Write with the adapter synced under this name; its files are read again where needed."""
        self._lora = self._loras[name]

    def checksums(self) -> dict[str, str]:
        """Checksums of the weights that the engine holds as plain tensors, and of some columns of
        those that it has packed, as on a CPU those of linear layers. With an adapter, of its
        tensors.
        """
        checksums: dict[str, str]
        self._wake("weights")
        if self._adapter is not None:
            shapes = {name: spec.shape for name, spec in self._adapter.specs.items()}
            (checksums,) = self._llm.apply_model(
                lambda model: held_checksums(model, list(self.sent), shapes)
            )
            return checksums
        (checksums,) = self._llm.apply_model(  # one worker
            lambda model: readable_checksums(model, self._specs, self.version)
        )
        self._readable = frozenset(checksums)
        return checksums

    def close(self) -> None:
        """Stop the engine, free its memory and delete the adapter's files. Close several engines of
        one process last started first.
        """
        client = self._llm.llm_engine.engine_core
        if self._made_group:
            client.shutdown()
        else:
            stop_engine_only(client)
        del client, self._llm
        gc.unfreeze()  # the engine froze what lived when it started
        gc.collect()
        if self._adapter is not None:
            self._adapter.close()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
