"""Rollouts by vLLM, in this process; the only file that imports it."""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import save_file

from conf.schema import RolloutConfig
from rlhf.types import AdapterWeights, FullWeights, Prompt, Rollout, SyncError, UserError
from rollout.sampling import Recorder, check_lengths, checksum, compare, requests

_ADAPTER_NAME = "policy"
# What vLLM fuses into one tensor, in the order of its rows.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def lora_rank(rank: int, wanted: int | None) -> int:
    """The smallest adapter rank that vLLM allocates for `rank`, or the `wanted` one. Raises UserError."""
    from vllm.config.lora import MaxLoRARanks

    allowed = [int(r) for r in get_args(MaxLoRARanks)]
    limit = wanted if wanted is not None else next((r for r in allowed if r >= rank), None)
    if limit is None or limit not in allowed or limit < rank:
        raise UserError(
            f"adapter.rank={rank} with rollout.max_lora_rank={wanted}: vLLM takes adapters of ranks up to {', '.join(map(str, allowed))}. "
            "Choose one of them, or rollout.lora_sync=merged, which takes any."
        )
    return limit


def _environment(cfg: RolloutConfig) -> None:
    """Settings that vLLM reads when it is imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the worker lives here, so weights pass by reference
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not torch.cuda.is_available():
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(cfg.kv_cache_gib)))  # whole GiB; unset, it takes a share of all memory


class VLLMGenerator:
    """An engine of this process. `adapter_rank` is the LoRA adapter's rank where the trainer sends adapters, None where it sends whole weights."""

    def __init__(self, model_path: str, tokenizer: Any, cfg: RolloutConfig, *, dtype: torch.dtype, seed: int, limit: int, adapter_rank: int | None) -> None:
        _environment(cfg)
        # A launcher's variables would make the engine believe that it is one of several workers of the trainer's group.
        from vllm import LLM

        self.tokenizer, self.cfg, self.dtype, self.limit = tokenizer, cfg, dtype, limit
        self.version = -1  # as loaded: no weights of the trainer yet
        self._adapter_dir: Path | None = None
        self._fresh = False
        options: dict[str, Any] = {}
        if adapter_rank is not None:
            options |= {"enable_lora": True, "max_lora_rank": lora_rank(adapter_rank, cfg.max_lora_rank), "max_loras": 1}
            self._adapter_dir = Path(tempfile.mkdtemp(prefix="rlhf-adapter-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
        if torch.cuda.is_available():
            options |= {"gpu_memory_utilization": cfg.gpu_memory_utilization, "enforce_eager": cfg.enforce_eager}
        self.llm = LLM(
            model=model_path,
            skip_tokenizer_init=True,  # token ids in, token ids out
            dtype=str(dtype).removeprefix("torch."),
            seed=seed,
            max_model_len=limit,
            max_num_seqs=cfg.max_num_seqs,
            logprobs_mode="processed_logprobs",  # of the distribution that was sampled
            disable_log_stats=True,
            **options,
        )

    def generate(self, prompts: Sequence[Prompt], *, n: int = 1, seed: int | None = None, greedy: bool = False) -> list[Rollout]:
        """`n` responses per prompt, side by side. `seed` None draws one from torch's global generator."""
        from vllm import SamplingParams

        cfg = self.cfg
        check_lengths(prompts, cfg.max_response_length, self.limit, "the policy")
        if seed is None:
            seed = int(torch.randint(2**31, (1,)))
        wanted = requests(prompts, n, seed)
        parameters = [
            SamplingParams(
                temperature=0.0 if greedy else cfg.temperature,
                top_p=1.0 if greedy else cfg.top_p,
                top_k=0 if greedy else cfg.top_k,
                max_tokens=cfg.max_response_length,
                seed=request.seed,
                logprobs=0,
                stop_token_ids=[self.tokenizer.eos_token_id],
                detokenize=False,
            )
            for request in wanted
        ]
        outputs = self._run([r.prompt.token_ids for r in wanted], parameters)
        rollouts = []
        for request, output in zip(wanted, outputs, strict=True):
            done = output.outputs[0]
            ids = list(done.token_ids)
            logprobs = [step[token].logprob for token, step in zip(ids, done.logprobs, strict=True)]
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            if done.finish_reason not in ("stop", "length"):
                raise RuntimeError(f"vLLM ended a response with finish_reason {done.finish_reason!r}; expected stop or length.")
            rollouts.append(Rollout(request.prompt, text, ids, logprobs, done.finish_reason, self.version))
        return rollouts

    def _run(self, token_ids: Sequence[Sequence[int]], parameters: Any) -> list[Any]:
        from vllm import TokensPrompt
        from vllm.lora.request import LoRARequest

        lora = None
        if self._adapter_dir is not None and self.version >= 0:
            lora = [LoRARequest(_ADAPTER_NAME, 1, str(self._adapter_dir), load_inplace=self._fresh and i == 0) for i in range(len(token_ids))]
            self._fresh = False
        return self.llm.generate([TokensPrompt(prompt_token_ids=list(ids)) for ids in token_ids], parameters, use_tqdm=False, lora_request=lora)

    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Logprob of each token after the first, in nats, at temperature 1 (vLLM applies no sampling settings to prompt tokens)."""
        from vllm import SamplingParams

        ids = list(token_ids)
        asked = ids[: self.limit - 1]  # one position is needed for the token that vLLM insists on writing
        (output,) = self._run([asked], SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False))
        return [float(step[token].logprob) for token, step in zip(asked[1:], output.prompt_logprobs[1:], strict=True)]

    def sync(self, weights: FullWeights | AdapterWeights, version: int) -> None:
        """Load the weights in place and drop cached prefixes; whole weights are then compared by checksum wherever vLLM keeps them readable."""
        if isinstance(weights, AdapterWeights):
            self._write_adapter(weights)
            self._fresh = True
        else:
            recorder = Recorder(iter(weights.tensors), self.dtype)
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(recorder)})
            left = next(iter(recorder.tensors), None)
            if left is not None:
                raise SyncError(f"weight sync {version} to vllm: the engine stopped reading before {left[0]}.")
            sent = recorder.sent
            compare(sent, self.held(sent), "vllm", version)
        if not self.llm.reset_prefix_cache():
            raise SyncError(f"weight sync {version} to vllm: cached prefixes of the old weights could not be dropped.")
        self.version = version

    def held(self, sent: dict[str, tuple[int, float, float]]) -> dict[str, tuple[int, float, float]]:
        """Checksums of the parameters that are readable in the engine, by transformers' names.

        On the CPU, linear layers may be packed for the kernel (and their plain weight dropped); those are proved by the logprob probe alone.
        """

        def read(model: torch.nn.Module) -> dict[str, tuple[int, float, float]]:
            out: dict[str, tuple[int, float, float]] = {}
            for name, param in model.named_parameters():
                name = name.replace(".base_layer.", ".")
                owner, _, leaf = name.rpartition(".")
                parent, _, kind = owner.rpartition(".")
                parts = [f"{parent}.{part}.{leaf}" for part in _FUSED.get(kind, ())]
                if name in sent and param.dim() and param.numel() >= sent[name][0]:
                    # embeddings are padded with rows that no token has
                    rows = sent[name][0] * param.shape[0] // param.numel()
                    out[name] = checksum(param.data[:rows])
                elif parts and all(p in sent for p in parts) and param.dim() == 2 and param.numel() == sum(sent[p][0] for p in parts):
                    start = 0
                    for part in parts:
                        rows = sent[part][0] // param.shape[1]
                        out[part] = checksum(param.data[start : start + rows])
                        start += rows
            return out

        merged: dict[str, tuple[int, float, float]] = {}
        for worker in self.llm.apply_model(read):
            merged |= worker
        return merged

    def _write_adapter(self, weights: AdapterWeights) -> None:
        assert self._adapter_dir is not None, "the engine was started for whole weights"
        save_file({n: t.detach().cpu().contiguous() for n, t in weights.tensors.items()}, str(self._adapter_dir / "adapter_model.safetensors"))
        (self._adapter_dir / "adapter_config.json").write_text(json.dumps(weights.config, default=str), encoding="utf-8")

    def close(self) -> None:
        """Stop the engine and remove the adapter's files."""
        if self._adapter_dir is not None:
            shutil.rmtree(self._adapter_dir, ignore_errors=True)
        self.llm.llm_engine.engine_core.shutdown()
