"""Both rollout backends against a forward pass that this file does itself, and against each
other.
"""

import contextlib
import dataclasses
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    Emu3TextConfig,
)

import rollout
from conf.choices import AdapterKind, Carrier, LoraSync, RolloutBackend
from conf.schema import AdapterConfig, Config, DataConfig, RolloutConfig
from conf.stages import OnlineStage
from rlhf.models.turns import LISTED_ENDS, response_text
from rlhf.types import FullWeights, Generator, Prompt, Rollout, SyncError, UserError
from rollout.sampling import Sampling, draw, response_seeds, sampling_logprobs
from rollout.weights import HubNames
from tests.stages.test_reproducible import VLLM, same_runs
from tests.stages.test_resume import options, run, write_data

BACKENDS = ["hf", pytest.param("vllm", marks=pytest.mark.vllm)]
SAMPLINGS = [
    Sampling(10),
    Sampling(10, temperature=0.6),
    Sampling(10, temperature=1.3, top_k=20),
    Sampling(10, temperature=0.9, top_p=0.7),
    Sampling(10, temperature=1.1, top_p=0.8, top_k=30),
]
PROMPTS = [Prompt(id=str(i), text="", token_ids=tuple(range(10 + i, 13 + 3 * i))) for i in range(5)]


def config(backend: str, **changes: Any) -> Config:
    settings = RolloutConfig(
        backend=RolloutBackend(backend), max_response_length=10, kv_cache_gib=0.05, max_num_seqs=64
    )
    return Config(
        stage=OnlineStage(),
        rollout=dataclasses.replace(settings, **changes),
        data=DataConfig(max_prompt_length=30),
    )


def make(cfg: Config, directory: Path, **changes: Any) -> Generator:
    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    settings = {
        "model_path": str(directory),
        "tokenizer": AutoTokenizer.from_pretrained(directory),
        "model_factory": load,
        "adapter_rank": None,
    }
    return rollout.make_generator(cfg, **{**settings, **changes})


@pytest.fixture(scope="module")
def generators(tiny_model: Callable[..., Path]) -> Iterator[Callable[[str], Any]]:
    started: dict[str, Any] = {}

    def get(backend: str) -> Any:
        if backend not in started:
            started[backend] = make(config(backend), tiny_model())
        started[backend].sampling = SAMPLINGS[0]
        return started[backend]

    yield get
    for generator in started.values():
        generator.close()


@pytest.fixture(scope="module")
def reference(tiny_model: Callable[..., Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32).double()


@torch.no_grad()
def forward_logprobs(model: Any, written: Rollout, sampling: Sampling) -> list[float]:
    """log of the sampling distribution at each response token, token by token and in plain Python
    where it filters.
    """
    ids = [*written.prompt.token_ids, *written.token_ids]
    logits = model(torch.tensor([ids])).logits[0] / sampling.temperature
    out = []
    for place in range(len(written.prompt.token_ids), len(ids)):
        ranked = sorted(logits[place - 1].softmax(-1).tolist(), reverse=True)
        if sampling.top_k:
            ranked = ranked[: sampling.top_k]
        total, kept = math.fsum(ranked), 0.0
        for count, value in enumerate(ranked, start=1):
            kept += value
            if kept / total >= sampling.top_p:
                ranked = ranked[:count]
                break
        out.append(math.log(float(logits[place - 1].softmax(-1)[ids[place]]) / math.fsum(ranked)))
    return out


def worst(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_rollout_logprobs_are_those_of_the_sampling_distribution(
    backend: str, sampling: Sampling, generators: Callable[[str], Any], reference: Any
) -> None:
    generator = generators(backend)
    generator.sampling = sampling
    for written in generator.generate(PROMPTS, n=4, seed=3):
        assert (
            worst(written.rollout_logprobs, forward_logprobs(reference, written, sampling)) < 1e-5
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_logprobs_are_those_of_a_forward_pass_at_temperature_1(
    backend: str, generators: Callable[[str], Any], reference: Any
) -> None:
    generator = generators(backend)
    generator.sampling = Sampling(10, temperature=0.5, top_k=3)
    for length in (2, 9, 40):  # 40: a longest prompt and a longest response
        ids = torch.arange(20, 20 + length) * 7 % 250
        with torch.no_grad():
            expected = (
                reference(ids[None])
                .logits[0, :-1]
                .log_softmax(-1)
                .gather(1, ids[1:, None])
                .squeeze(1)
            )
        ours = generator.logprobs(ids.tolist())
        assert len(ours) == length - 1
        assert worst(ours, expected.tolist()) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_takes_the_most_likely_token_at_temperature_1(
    backend: str, generators: Callable[[str], Any], reference: Any
) -> None:
    generator = generators(backend)
    generator.sampling = Sampling(10, temperature=0.5, top_k=3)
    for written in generator.generate(PROMPTS, greedy=True):
        ids = [*written.prompt.token_ids]
        for token, logprob in zip(written.token_ids, written.rollout_logprobs, strict=True):
            with torch.no_grad():
                expected = reference(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            assert token == int(expected.argmax())
            assert logprob == pytest.approx(float(expected.max()), abs=1e-5)
            ids.append(token)


@pytest.mark.vllm
def test_backends_agree(generators: Callable[[str], Any]) -> None:
    """Greedy responses are equal, and what one sampled has the other's logprobs to 1e-5 nats."""
    hf, vllm = generators("hf"), generators("vllm")
    ours, theirs = (g.generate(PROMPTS, greedy=True) for g in (hf, vllm))
    assert [r.token_ids for r in ours] == [r.token_ids for r in theirs]
    for written in vllm.generate(PROMPTS, n=3, seed=5):
        ids = [*written.prompt.token_ids, *written.token_ids]
        assert (
            worst(written.rollout_logprobs, hf.logprobs(ids)[len(written.prompt.token_ids) - 1 :])
            < 1e-5
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_seed_fixes_the_tokens(backend: str, generators: Callable[[str], Any]) -> None:
    generator = generators(backend)
    first, again, other = (generator.generate(PROMPTS, n=3, seed=seed) for seed in (1, 1, 2))
    assert [r.token_ids for r in first] == [r.token_ids for r in again]
    assert [r.token_ids for r in first] != [r.token_ids for r in other]
    assert [r.prompt.id for r in first] == [p.id for p in PROMPTS for _ in range(3)]
    assert len({tuple(r.token_ids) for r in first[:3]}) == 3, (
        "samples of one prompt have seeds of their own"
    )
    fewer = generator.generate(PROMPTS[:2], n=1, seed=1)
    assert [r.token_ids for r in fewer] == [first[0].token_ids, first[3].token_ids], (
        "a response depends on its own seed alone"
    )
    unseeded = [generator.generate(PROMPTS[:1], n=1)[0].token_ids for _ in range(2)]
    assert unseeded[0] != unseeded[1]


@pytest.mark.vllm
def test_more_prompts_than_a_pass_takes(tiny_model: Callable[..., Path]) -> None:
    """4,640 tokens of prompts, 4,096 a pass: none is read in parts, where a seed would stop it."""
    generator = make(config("vllm", max_num_seqs=160), tiny_model())
    many = [
        Prompt(str(i), "", tuple((3 + 7 * i + j) % 200 + 5 for j in range(29))) for i in range(160)
    ]
    with contextlib.closing(generator):
        written = generator.generate(many, seed=1)
        (alone,) = generator.generate(many[150:151], seed=1)
    assert written[150].token_ids == alone.token_ids


@pytest.mark.full  # three runs; tests/stages/test_reproducible.py has those of rollout=hf
@pytest.mark.vllm
def test_whole_runs_on_vllm_with_one_seed_are_the_same(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Each with an engine of its own. In processes of their own:
    tests/stages/test_reproducible.py.
    """
    write_data(tmp_path)
    runs = []
    for name, seed in (("one", 0), ("other", 0), ("seed", 1)):
        given = [
            *options("ppo", tmp_path, tiny_model(), name),
            *VLLM,
            f"run.seed={seed}",
            "stage.watch.judge_function=null",
        ]
        runs.append(run("ppo", given))
    assert same_runs(runs[0], runs[1]) and not same_runs(runs[0], runs[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_end_of_sequence_is_kept_and_named(
    backend: str, generators: Callable[[str], Any], tiny_model: Callable[..., Path]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    end = tokenizer.eos_token_id
    written = generators(backend).generate(PROMPTS, n=60, seed=0)
    stopped = [r for r in written if r.finish_reason == "stop"]
    cut = [r for r in written if r.finish_reason == "length"]
    assert len(stopped) >= 3 and len(cut) >= 3 and len(stopped) + len(cut) == 300
    for r in stopped:
        assert r.token_ids.index(end) == len(r.token_ids) - 1 <= 9
    for r in cut:
        assert end not in r.token_ids and len(r.token_ids) == 10
    for r in written:
        assert len(r.rollout_logprobs) == len(r.token_ids)
        assert r.text == tokenizer.decode(
            [t for t in r.token_ids if t != end], skip_special_tokens=True
        )
        assert r.version == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_response_ends_at_any_end_token(
    backend: str, generators: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = generators(backend)
    tokenizer = generator._tokenizer
    before = generator.generate(PROMPTS, n=20, seed=5)
    ends = {tokenizer.eos_token_id, *range(100, 120)}
    monkeypatch.setitem(vars(tokenizer), LISTED_ENDS, tuple(range(100, 120)))
    after = generator.generate(PROMPTS, n=20, seed=5)
    assert len({r.token_ids[-1] for r in after if r.finish_reason == "stop"}) > 3
    for old, new in zip(before, after, strict=True):
        places = [i for i, token in enumerate(old.token_ids) if token in ends]
        stop = places[0] + 1 if places else len(old.token_ids)
        assert new.token_ids == old.token_ids[:stop] and len(new.rollout_logprobs) == stop
        assert new.finish_reason == ("stop" if places else "length")
        assert new.text == response_text(tokenizer, new.token_ids, chat=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_follow_the_distribution(
    backend: str, generators: Callable[[str], Any], reference: Any
) -> None:
    """2,000 first tokens: Pearson's statistic of the ten likeliest against all others, 10 degrees
    of freedom, at the 0.1 % level.
    """
    generator = generators(backend)
    generator.sampling = Sampling(1, temperature=0.7)
    with torch.no_grad():
        expected = (reference(torch.tensor([PROMPTS[0].token_ids])).logits[0, -1] / 0.7).softmax(-1)
    top = expected.topk(10)
    tokens = torch.tensor(
        [r.token_ids[0] for r in generator.generate(PROMPTS[:1], n=2000, seed=11)]
    )
    counts = torch.stack(
        [(tokens == t).sum() for t in top.indices] + [(~torch.isin(tokens, top.indices)).sum()]
    ).double()
    wished = torch.cat([top.values, 1.0 - top.values.sum()[None]]) * len(tokens)
    assert float(((counts - wished).square() / wished).sum()) < 29.6


@pytest.mark.parametrize("backend", BACKENDS)
def test_prompts_that_do_not_fit_are_named(backend: str, generators: Callable[[str], Any]) -> None:
    for token_ids in ((), tuple(range(31))):
        with pytest.raises(
            UserError,
            match=rf"prompt odd: it has {len(token_ids)} tokens.*between 1 and "
            r"30.*data.truncate_prompts",
        ):
            generators(backend).generate(
                [PROMPTS[0], Prompt(id="odd", text="", token_ids=token_ids)]
            )


def test_batches_of_the_plain_backend_change_nothing(
    generators: Callable[[str], Any], tiny_model: Callable[..., Path]
) -> None:
    small = make(config("hf", max_num_seqs=4), tiny_model())
    ours, theirs = (g.generate(PROMPTS, n=2, seed=9) for g in (small, generators("hf")))
    assert [r.token_ids for r in ours] == [r.token_ids for r in theirs]


@pytest.mark.parametrize("backend", BACKENDS)
def test_settings_of_the_model_do_not_reach_the_samples(
    backend: str, tiny_model: Callable[..., Path], tmp_path: Path, generators: Callable[[str], Any]
) -> None:
    """What generation_config.json holds would make the sampled distribution another one than the
    trainer's. The end tokens that it lists come with the tokenizer, and with no other.
    """
    expected = generators(backend).generate(PROMPTS, n=2, seed=9)
    model = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    model.generation_config.update(
        repetition_penalty=5.0, do_sample=True, top_k=2, eos_token_id=list(range(100, 200))
    )
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model()).save_pretrained(tmp_path)
    generator: Any = make(config(backend), tmp_path)
    found = generator.generate(PROMPTS, n=2, seed=9)
    generator.close()
    assert [(r.token_ids, r.finish_reason) for r in found] == [
        (r.token_ids, r.finish_reason) for r in expected
    ]


def test_sampling_logprobs_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    kept = sampling_logprobs(logits, Sampling(1, top_k=2)).exp()
    torch.testing.assert_close(kept, torch.tensor([[2 / 3, 1 / 3, 0.0, 0.0]]))
    # 0.5 is too little, 0.75 is enough
    kept = sampling_logprobs(logits, Sampling(1, top_p=0.7)).exp()
    torch.testing.assert_close(kept, torch.tensor([[2 / 3, 1 / 3, 0.0, 0.0]]))
    # of 0.9: 0.556, then 0.833
    kept = sampling_logprobs(logits, Sampling(1, top_k=3, top_p=0.6)).exp()
    torch.testing.assert_close(kept, torch.tensor([[2 / 3, 1 / 3, 0.0, 0.0]]))
    kept = sampling_logprobs(logits, Sampling(1, top_p=1e-6)).exp()
    torch.testing.assert_close(kept, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    kept = sampling_logprobs(logits, Sampling(1, temperature=0.5)).exp()  # squares, over 0.345
    torch.testing.assert_close(kept, torch.tensor([[0.25, 0.0625, 0.0225, 0.01]]) / 0.345)


def test_draw_inverts_the_distribution_function() -> None:
    logprobs = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0]).log().expand(6, -1)
    uniform = torch.tensor([0.0, 0.24, 0.25, 0.74, 0.76, 1.0 - 2**-53], dtype=torch.float64)
    assert draw(logprobs, uniform).tolist() == [1, 1, 3, 3, 4, 4], (
        "a token of probability 0 is never drawn"
    )


def test_response_seeds_differ_and_follow_the_prompt() -> None:
    prompts = [Prompt(id=str(i), text="", token_ids=(1,)) for i in range(50)]
    seeds = [seed for call in range(20) for seed in response_seeds(call, prompts, 8)]
    assert len(set(seeds)) == len(seeds) == 8000 and all(0 <= seed < 2**62 for seed in seeds)
    assert response_seeds(3, prompts[10:12], 2) == response_seeds(3, prompts, 2)[20:24]
    twice = response_seeds(3, [prompts[0], prompts[1], prompts[0]], 1)
    assert twice[0] != twice[2] and twice[::2] == response_seeds(3, prompts[:1], 2)


def without_vllm(name: str, package: str | None = None) -> Any:
    return None if name == "vllm" else FIND_SPEC(name, package)


FIND_SPEC = importlib.util.find_spec


def test_vllm_not_installed(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Path]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", without_vllm)
    with pytest.raises(
        UserError,
        match=r"rollout=vllm.*not installed.*rlhf-toolkit\[cpu\].*rlhf-toolkit\[cuda\].*rollout=hf",
    ):
        make(config("vllm"), tiny_model())
    assert rollout.resolve_backend(RolloutBackend.auto) is RolloutBackend.hf


def test_auto_takes_vllm_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: object())
    assert rollout.resolve_backend(RolloutBackend.auto) is RolloutBackend.vllm
    assert rollout.resolve_backend(RolloutBackend.hf) is RolloutBackend.hf


def never() -> Any:
    raise AssertionError("weights were loaded before the check")


@pytest.mark.parametrize("backend", ["hf", "vllm"])
def test_lengths_beyond_the_positions(
    backend: str, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: object())
    with pytest.raises(
        UserError,
        match=r"max_prompt_length=30 \+ rollout.max_response_length=35 = 65 tokens.*64 "
        r"positions.*at most 64",
    ):
        make(config(backend, max_response_length=35), tiny_model(), model_factory=never)


def test_dora_is_not_for_vllm(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: object())
    cfg = config("vllm", lora_sync=LoraSync.adapter)
    cfg.adapter = AdapterConfig(kind=AdapterKind.lora, dora=True)
    with pytest.raises(
        UserError, match=r"rollout.lora_sync=adapter: vLLM does not apply DoRA.*merged"
    ):
        make(cfg, tiny_model(), model_factory=never, carrier=Carrier.lora, adapter_rank=16)


def test_weights_that_vllm_does_not_take_are_told_with_the_family() -> None:
    """Its code for a family raises in the middle; the rest is taken, as other ranks wait for it."""
    from rollout.vllm import VLLMGenerator

    class Engine:
        def collective_rpc(self, name: str, kwargs: dict[str, Any]) -> None:
            assert name == "reload_weights"
            next(kwargs["weights_iterator"])
            raise ValueError("There is no module or parameter named 'lm_head'")

        def apply_model(self, function: Any) -> list[bool]:
            return [True]

    taken = []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in held.items():
            taken.append(name)
            yield name, tensor

    config = BloomConfig(vocab_size=20, hidden_size=8, n_layer=1, n_head=2)
    model = BloomForCausalLM(config)
    held = model.state_dict()
    generator = VLLMGenerator.__new__(VLLMGenerator)
    generator._names = HubNames(model)
    generator._specs = generator._names.specs
    generator._readable = generator._adapter = None
    generator._llm = Engine()
    with pytest.raises(SyncError, match=r"weight sync 1: .*bloom .*lm_head.*rollout=hf"):
        generator.sync(FullWeights(tensors()), 1)
    assert taken == list(held)

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        raise OSError("the gathering failed")
        yield

    with pytest.raises(OSError, match="the gathering failed"):
        generator.sync(FullWeights(broken()), 1)


def test_a_configuration_that_is_no_causal_models_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"rollout=vllm.*emu3_text_model.*rollout=hf"):
        rollout._hub_names(Emu3TextConfig(), trust_remote_code=False)
