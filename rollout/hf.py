"""The plain twin of the vLLM generator: transformers' own generate, on a module of its own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from conf.schema import RolloutConfig
from rlhf.types import AdapterWeights, FullWeights, Prompt, Rollout, SyncError
from rollout.sampling import Recorder, check_lengths, checksum, compare, requests, sampling_logprobs


class _SeededSampler(LogitsProcessor):
    """Draws from the sampling distribution with one random stream per row, and keeps the distributions.

    Greedy decoding of logprobs + Gumbel noise is a draw from the distribution (the Gumbel-max trick), so that a row's tokens
    depend on its own seed alone, not on the rows beside it.
    """

    def __init__(self, cfg: RolloutConfig, seeds: Sequence[int], greedy: bool) -> None:
        self.cfg, self.greedy = cfg, greedy
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.steps: list[Tensor] = []  # [B, V] each

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cfg = self.cfg
        logprobs = sampling_logprobs(scores, temperature=cfg.temperature, top_p=cfg.top_p, top_k=cfg.top_k)
        self.steps.append(logprobs)
        if self.greedy:
            return logprobs
        exponential = torch.stack([torch.empty(logprobs.shape[1]).exponential_(generator=g) for g in self.generators])
        return logprobs - exponential.to(logprobs.device).log()


class HFGenerator:
    """Generates with transformers, in batches of ``rollout.max_num_seqs``; `module` is this generator's own copy of the policy."""

    def __init__(self, module: Any, tokenizer: Any, cfg: RolloutConfig, device: torch.device) -> None:
        self.module = module.to(device).eval()
        self.tokenizer, self.cfg, self.device = tokenizer, cfg, device
        self.version = -1  # as loaded: no weights of the trainer yet
        self.limit = int(getattr(module.config.get_text_config(), "max_position_embeddings", 2**31))

    def generate(self, prompts: Sequence[Prompt], *, n: int = 1, seed: int | None = None, greedy: bool = False) -> list[Rollout]:
        """`n` responses per prompt, side by side. `seed` None draws one from torch's global generator."""
        check_lengths(prompts, self.cfg.max_response_length, self.limit, "the policy")
        if seed is None:
            seed = int(torch.randint(2**31, (1,)))
        wanted = requests(prompts, n, seed)
        out: list[Rollout] = []
        for start in range(0, len(wanted), self.cfg.max_num_seqs):
            batch = wanted[start : start + self.cfg.max_num_seqs]
            out.extend(self._batch([r.prompt for r in batch], [r.seed for r in batch], greedy))
        return out

    @torch.no_grad()
    def _batch(self, prompts: Sequence[Prompt], seeds: Sequence[int], greedy: bool) -> list[Rollout]:
        width = max(len(p.token_ids) for p in prompts)
        input_ids = torch.full((len(prompts), width), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):  # on the left, so that every row's next token comes at the same place
            input_ids[row, width - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
            mask[row, width - len(prompt.token_ids) :] = 1
        sampler = _SeededSampler(self.cfg, seeds, greedy)
        written = self.module.generate(
            input_ids=input_ids.to(self.device),
            attention_mask=mask.to(self.device),
            max_new_tokens=self.cfg.max_response_length,
            do_sample=False,
            logits_processor=LogitsProcessorList([sampler]),
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )[:, width:]
        logprobs = torch.stack(sampler.steps, dim=1).gather(2, written[:, : len(sampler.steps), None]).squeeze(2)
        out = []
        for prompt, row, row_logprobs in zip(prompts, written.tolist(), logprobs.tolist(), strict=True):
            finished = self.tokenizer.eos_token_id in row
            length = row.index(self.tokenizer.eos_token_id) + 1 if finished else len(row)
            ids = row[:length]
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            out.append(Rollout(prompt, text, ids, row_logprobs[:length], "stop" if finished else "length", self.version))
        return out

    @torch.no_grad()
    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Logprob of each token after the first, in nats, at temperature 1."""
        ids = torch.tensor([list(token_ids)], device=self.device)
        scores = self.module(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        return [float(x) for x in scores.gather(1, ids[0, 1:, None]).squeeze(1)]

    @torch.no_grad()
    def sync(self, weights: FullWeights | AdapterWeights, version: int) -> None:
        """Copy the weights in place, then compare each one's checksum. Raises SyncError naming a parameter that is missing, unknown or changed."""
        if isinstance(weights, AdapterWeights):
            from peft import set_peft_model_state_dict

            outcome = set_peft_model_state_dict(self.module, weights.tensors)
            unknown = list(getattr(outcome, "unexpected_keys", []))
            if unknown:
                raise SyncError(f"weight sync {version} to hf: the generator has no parameter {unknown[0]} ({len(unknown)} unknown in all).")
            from peft import get_peft_model_state_dict

            held = {name: checksum(t) for name, t in get_peft_model_state_dict(self.module).items()}
            self._complete({name: checksum(t.to(self.module.dtype)) for name, t in weights.tensors.items()}, held, version)
        else:
            # Tied tensors appear under each of their names, in the sender as here.
            own = dict(self.module.state_dict(keep_vars=True))
            recorder = Recorder(iter(weights.tensors), self.module.dtype)
            for name, tensor in recorder:
                if name not in own:
                    raise SyncError(f"weight sync {version} to hf: the generator has no parameter {name}.")
                if own[name].shape != tensor.shape:
                    raise SyncError(f"weight sync {version} to hf: {name} has shape {tuple(tensor.shape)}, expected {tuple(own[name].shape)}.")
                own[name].data.copy_(tensor)
            self._complete(recorder.sent, {name: checksum(t) for name, t in own.items()}, version)
        self.version = version

    @staticmethod
    def _complete(sent: dict[str, Any], held: dict[str, Any], version: int) -> None:
        missing = sorted(held.keys() - sent.keys())
        if missing:
            raise SyncError(f"weight sync {version} to hf: {missing[0]} was not sent ({len(missing)} missing in all).")
        compare(sent, held, "hf", version)

    def close(self) -> None:
        """Nothing outlives the object."""
