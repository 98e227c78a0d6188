"""Virtual tokens against forward passes written out here in float64, and against PEFT's own classes
of prompt tuning, P-tuning and prefix tuning, which are another implementation of the same files.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners import PrefixEncoder, PromptEmbedding, PromptEncoder
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from conf.choices import AdapterKind
from conf.schema import AdapterConfig
from policy import adapters
from policy.adapters import method_of
from policy.adapters.virtual import Encoded
from policy.adapters.virtual_tuner import layer_of
from policy.agreement import can_share_prompts, packs_agree
from policy.forward import Layout
from policy.model import PolicyModule, base_of, take_segments, trainable
from policy.saving import adapter_weights, full_weights, save_adapter
from rlhf.types import UserError

COUNT, VOCABULARY, WIDTH, LAYERS, KEYS = 5, 97, 64, 3, 32
KINDS = [AdapterKind.prompt, AdapterKind.ptuning, AdapterKind.prefix]
THEIRS = {
    "PROMPT_TUNING": (peft.PromptTuningConfig, PromptEmbedding),
    "P_TUNING": (peft.PromptEncoderConfig, PromptEncoder),
    "PREFIX_TUNING": (peft.PrefixTuningConfig, PrefixEncoder),
}
SAMPLE = [[30, 31, 32], [33, 34, 35, 36]]


def config(**changes: Any) -> Any:
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "pad_token_id": 0,
        "max_position_embeddings": 128,
        "num_labels": 1,
    }
    return LlamaConfig(**settings | changes)


def make(kind: Any = LlamaForCausalLM, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(7)
    model = kind(config()).to(dtype).eval()
    for param in model.parameters():
        if param.ndim == 2:
            param.data.mul_(4.0)  # the initial 0.02 would leave every distribution flat
    return model


def settings(kind: AdapterKind, **changes: Any) -> AdapterConfig:
    adapter = AdapterConfig(kind=kind, **changes)
    adapter.prompt.tokens, adapter.prompt.encoder_size = COUNT, 16
    return adapter


def attach(model: Any, kind: AdapterKind, task: str = "CAUSAL_LM", **given: Any) -> Any:
    return adapters.attach(model, settings(kind), task=task, sample=lambda: SAMPLE, **given).to(
        model.dtype
    )


def moved(model: Any) -> Any:
    """`model` with other virtual tokens than it started from."""
    torch.manual_seed(3)
    layer = layer_of(model)
    for param in layer.parameters():
        param.data.add_(torch.randn_like(param) * 0.3 * param.std())
    return model.eval()


def values_of(model: Any) -> Tensor:
    found: Tensor = layer_of(model).virtual_values["default"]().detach()
    return found


@contextmanager
def peft_alone() -> Iterator[None]:
    """PEFT's own classes, as in any process without this toolkit."""
    ours = [dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_TUNER_MAPPING)]
    for name, (config_class, tuner) in THEIRS.items():
        PEFT_TYPE_TO_CONFIG_MAPPING[name] = config_class
        PEFT_TYPE_TO_TUNER_MAPPING[name] = tuner
    yield
    PEFT_TYPE_TO_CONFIG_MAPPING.update(ours[0])
    PEFT_TYPE_TO_TUNER_MAPPING.update(ours[1])


def tokens(rows: int = 3, columns: int = 11, seed: int = 0) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (rows, columns), generator=made)


@torch.no_grad()
def by_hand(base: Any, values: Tensor, kind: AdapterKind, ids: Tensor) -> Tensor:
    """Logits [B, L, V] of the base model for `ids` [B, L] behind the virtual tokens."""
    rows = len(ids)
    if kind is not AdapterKind.prefix:
        embeds = torch.cat((values.expand(rows, -1, -1), base.get_input_embeddings()(ids)), dim=1)
        return base(inputs_embeds=embeds).logits[:, COUNT:]
    cache = DynamicCache()
    for layer in range(LAYERS):
        for number in range(2):
            start = (2 * layer + number) * KEYS
            part = values[:, start : start + KEYS].view(COUNT, 2, 16).transpose(0, 1)
            if number == 0:
                keys = part.expand(rows, -1, -1, -1)
        cache.update(keys, part.expand(rows, -1, -1, -1), layer)
    seen = torch.ones(rows, COUNT + ids.shape[1], dtype=torch.long)
    return base(input_ids=ids, past_key_values=cache, attention_mask=seen).logits


# ---- the mathematics ----


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value)
def test_the_forward_is_that_of_rows_behind_virtual_tokens(kind: AdapterKind) -> None:
    base, model = make(), moved(attach(make(), kind))
    ids = tokens()
    expected = by_hand(base, values_of(model), kind, ids)
    with torch.no_grad():
        found = model(input_ids=ids).logits
        hidden = base_of(model).model(input_ids=ids, output_hidden_states=True).hidden_states
    assert found.shape == (3, 11, VOCABULARY)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    assert {states.shape[1] for states in hidden} == {11}
    assert (expected - base(input_ids=ids).logits).abs().max() > 0.1
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)


def test_an_encoder_is_pefts() -> None:
    """The same weights make the same virtual tokens as PEFT's encoder."""
    model = moved(attach(make(), AdapterKind.ptuning))
    module = layer_of(model).virtual_values["default"]
    theirs = PromptEncoder(
        peft.PromptEncoderConfig(
            num_virtual_tokens=COUNT,
            token_dim=WIDTH,
            num_transformer_submodules=1,
            encoder_hidden_size=16,
        )
    ).double()
    theirs.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(), theirs(torch.arange(COUNT)), rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value)
def test_it_starts_as_the_first_rows_in_front(kind: AdapterKind) -> None:
    """And as a text, and as tokens drawn from the vocabulary, where there are no rows."""
    ids = tokens()
    first = [token for row in SAMPLE for token in row][:COUNT]
    base = make()
    starts = {
        "rows": ({"sample": lambda: SAMPLE}, first),
        "few rows": ({"sample": lambda: [[8, 9]]}, [8, 9, 8, 9, 8]),
    }
    for given, front in starts.values():
        model = adapters.attach(make(), settings(kind), task="CAUSAL_LM", **given).eval()
        whole = torch.cat((torch.tensor(front).expand(3, -1), ids), dim=1)
        expected = base(input_ids=whole).logits[:, COUNT:]
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-8)
    alike = [adapters.attach(make(), settings(kind), task="CAUSAL_LM") for _ in range(2)]
    assert torch.equal(*(values_of(model) for model in alike))  # `make` sets the seed


def test_it_starts_from_a_text() -> None:
    class Letters:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            assert not add_special_tokens
            return [ord(letter) % VOCABULARY for letter in text]

    adapter = settings(AdapterKind.prompt)
    adapter.prompt.text = "abc"
    base = make()
    model = adapters.attach(make(), adapter, task="CAUSAL_LM", tokenizer=Letters())
    wanted = base.get_input_embeddings().weight[[0, 1, 2, 0, 1]]
    torch.testing.assert_close(values_of(model), wanted.detach(), rtol=0, atol=1e-7)
    with pytest.raises(UserError, match=r"adapter\.prompt\.text='abc'"):
        adapters.attach(make(), adapter, task="CAUSAL_LM")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value)
def test_trained_parameters_are_the_formulas(kind: AdapterKind) -> None:
    model = attach(make(), kind)
    by_formula = {
        AdapterKind.prompt: COUNT * WIDTH,
        AdapterKind.ptuning: COUNT * WIDTH + 65 * 16 + 17 * 16 + 17 * 64,
        AdapterKind.prefix: 2 * COUNT * LAYERS * KEYS,
    }[kind]
    adapter = settings(kind)
    with torch.device("meta"):
        empty = LlamaForCausalLM(config())
    trained = trainable(model)
    assert all("virtual_tokens" in n for n, p in model.named_parameters() if p.requires_grad)
    assert sum(param.numel() for param in trained) == by_formula
    assert method_of(adapter).expected(empty, adapter) == by_formula
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    assert all(param.grad is not None and param.grad.abs().max() > 0 for param in trained)


def test_a_prompt_is_less_than_a_thousandth_of_a_real_model() -> None:
    """20 tokens on the sizes of Llama 3.1 8B, on the meta device."""
    adapter = AdapterConfig(kind=AdapterKind.prompt)
    real = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(real)
    assert method_of(adapter).expected(model, adapter) == 20 * 4096
    assert model.num_parameters() > 1000 * 20 * 4096


# ---- PEFT's own implementation and files ----


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value)
def test_peft_alone_reads_what_is_saved(kind: AdapterKind, tmp_path: Path) -> None:
    """And gives the same logits; ours reads it back to the bit."""
    model = moved(attach(make(), kind))
    ids = tokens()
    expected = model(input_ids=ids).logits
    save_adapter(model, tmp_path / "ours")
    with peft_alone():
        theirs = PeftModel.from_pretrained(make(), str(tmp_path / "ours"))
        assert type(theirs.peft_config["default"]).__module__.startswith("peft.")
        found = theirs(input_ids=ids).logits[:, -11:]
        theirs.save_pretrained(str(tmp_path / "theirs"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    for name in ("ours", "theirs"):
        back = PeftModel.from_pretrained(make(), str(tmp_path / name))
        assert torch.equal(values_of(back), values_of(model)) or name == "theirs"
        torch.testing.assert_close(back(input_ids=ids).logits, expected, rtol=0, atol=1e-6)
        assert not trainable(back)
    assert list(adapter_weights(model).tensors) == ["prompt_embeddings"]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value)
def test_a_classifier_of_ours_is_pefts(kind: AdapterKind, tmp_path: Path) -> None:
    """Its head trains and is saved; padding on either side changes no score."""
    model = attach(make(LlamaForSequenceClassification), kind, task="SEQ_CLS")
    names = {n for n, p in model.named_parameters() if p.requires_grad and "virtual" not in n}
    assert names == {"base_model.model.score.modules_to_save.default.weight"}
    moved(model).base_model.model.score.modules_to_save["default"].weight.data.mul_(2.0)
    ids = tokens()
    alone = model(input_ids=ids).logits
    for left, right in ((0, 4), (4, 0)):
        padded = torch.nn.functional.pad(ids, (left, right))
        seen = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
        places = (seen.cumsum(1) - 1).clamp(min=0)
        found = model(input_ids=padded, attention_mask=seen, position_ids=places).logits
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-10)
    save_adapter(model, tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert saved.keys() == {"prompt_embeddings", "base_model.score.weight"}
    back = PeftModel.from_pretrained(
        make(LlamaForSequenceClassification), str(tmp_path / "adapter")
    )
    torch.testing.assert_close(back(input_ids=ids).logits, alone, rtol=0, atol=1e-6)
    with peft_alone():
        theirs = PeftModel.from_pretrained(
            make(LlamaForSequenceClassification), str(tmp_path / "adapter")
        )
        found = theirs(input_ids=ids).logits  # rows of full length: no padding is pooled
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", THEIRS)
def test_what_peft_alone_trained_is_read(name: str, tmp_path: Path) -> None:
    """A classifier and a language model, with a prefix whose encoder is saved folded."""
    options: dict[str, Any] = {"P_TUNING": {"encoder_hidden_size": 16}}.get(name, {})
    if name == "PREFIX_TUNING":
        options = {"prefix_projection": True, "encoder_hidden_size": 16}
    ids = tokens()
    for task, made in (
        ("CAUSAL_LM", LlamaForCausalLM),
        ("SEQ_CLS", LlamaForSequenceClassification),
    ):
        with peft_alone():
            theirs = peft.get_peft_model(
                make(made), THEIRS[name][0](task_type=task, num_virtual_tokens=4, **options)
            )
            for param in trainable(theirs):
                param.data.mul_(3.0)
            expected = theirs.double().eval()(input_ids=ids).logits
            theirs.save_pretrained(str(tmp_path / task))
        ours = PeftModel.from_pretrained(make(made), str(tmp_path / task))
        found = ours(input_ids=ids).logits
        if task == "CAUSAL_LM":
            expected = expected[:, -11:]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value)
def test_training_goes_on_from_a_checkpoint_to_the_bit(kind: AdapterKind, tmp_path: Path) -> None:
    """A trainer's checkpoint is what PeftModel.save_pretrained writes; an encoder is in it."""
    model = moved(attach(make(), kind))
    model.save_pretrained(str(tmp_path))
    fresh = attach(make(), kind)
    fresh.load_adapter(str(tmp_path), fresh.active_adapter, is_trainable=True)
    for (name, ours), theirs in zip(
        model.named_parameters(), dict(fresh.named_parameters()).values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert len(trainable(fresh)) == len(trainable(model))


def test_an_encoder_is_folded_where_training_is_over(tmp_path: Path) -> None:
    model = moved(attach(make(), AdapterKind.ptuning))
    save_adapter(model, tmp_path)
    back = PeftModel.from_pretrained(make(), str(tmp_path), is_trainable=True)
    assert not isinstance(layer_of(back).virtual_values["default"], Encoded)
    assert torch.equal(values_of(back), values_of(model)) and len(trainable(back)) == 1
    values = values_of(model)
    layer_of(model).fold_encoders()
    assert torch.equal(values_of(model), values)


def test_a_copy_and_a_second_adapter_are_apart() -> None:
    """TRL's DPO takes an adapter "ref" as its reference."""
    model = attach(make(), AdapterKind.prompt)
    ids = tokens()
    before = model(input_ids=ids).logits
    moved(copy.deepcopy(model))
    assert torch.equal(model(input_ids=ids).logits, before)
    model.add_adapter("ref", model.peft_config["default"])
    assert len(trainable(model)) == 1 and torch.equal(model(input_ids=ids).logits, before)
    model.set_adapter("ref")
    assert not torch.equal(model(input_ids=ids).logits, before)
    model.base_model.set_adapter(["default", "ref"])
    with pytest.raises(UserError, match="only one adapter's virtual tokens"):
        model(input_ids=ids)


def test_whole_weights_hold_no_virtual_tokens() -> None:
    model = attach(make(), AdapterKind.prompt)
    with pytest.raises(UserError, match="can't be merged"):
        list(full_weights(model).tensors)
    with pytest.raises(UserError, match="can't be merged"):
        model.merge_and_unload()
    ids = tokens()
    base = model.unload()
    assert torch.equal(base(input_ids=ids).logits, make()(input_ids=ids).logits)
    assert not any("virtual" in name for name, _ in base.named_modules())


# ---- how the stages call a model ----


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value)
def test_generation_behind_padding_is_that_of_the_row_alone(kind: AdapterKind) -> None:
    base, model = make(), moved(attach(make(), kind))
    ids, seen = tokens(), torch.ones(3, 11, dtype=torch.long)
    seen[1, :4] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    written = model.generate(input_ids=ids, attention_mask=seen, **options)
    alone = model.generate(input_ids=ids[1:2, 4:], **options)
    assert torch.equal(written[1, 11:], alone[0, 7:])
    row = written[:1]
    expected = by_hand(base, values_of(model), kind, row).argmax(-1)[0, 10:-1]
    assert torch.equal(row[0, 11:], expected)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value)
def test_the_policy_reads_packs_behind_virtual_tokens(kind: AdapterKind) -> None:
    """Responses that share a prompt, with dense masks and segment by segment; then the logprobs
    are those of the model's own forward.
    """
    model = moved(attach(make(), kind))
    module = PolicyModule(model, chunk=8)
    base = base_of(model)
    assert can_share_prompts(base)
    layout = Layout(budget=512, shared=True, hidden_size=WIDTH)
    assert packs_agree(module, layout)
    assert take_segments(base)
    assert packs_agree(module, Layout(budget=512, shared=True, longest_dense=0))
    ids = tokens(2, 9)
    places = torch.arange(3, 8).expand(2, -1)
    logprobs, _ = module(ids, places, ids[:, 4:], torch.ones(2, 5, dtype=torch.bool))
    expected = model(input_ids=ids).logits[:, 3:8].log_softmax(-1)
    expected = expected.gather(2, ids[:, 4:, None]).squeeze(2)
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value)
def test_half_precision_trains_in_float32(kind: AdapterKind) -> None:
    model = adapters.attach(
        make(dtype=torch.bfloat16), settings(kind), task="CAUSAL_LM", sample=lambda: SAMPLE
    )
    assert {param.dtype for param in trainable(model)} == {torch.float32}
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert model(input_ids=tokens()).logits.dtype is torch.bfloat16


# ---- refusals ----


def test_rows_that_share_a_sequence_are_refused() -> None:
    model = attach(make(), AdapterKind.prompt)
    places = torch.tensor([[0, 1, 2, 0, 1]])
    with pytest.raises(UserError, match=r"stage\.packing=true"):
        model(input_ids=tokens(1, 5), position_ids=places)
    whole = model(input_ids=tokens(1, 5), position_ids=torch.arange(5)[None]).logits
    assert torch.equal(whole, model(input_ids=tokens(1, 5)).logits)


def test_a_prefix_and_gradient_checkpointing_are_refused_by_name() -> None:
    ids = tokens()
    for kind in KINDS:
        model = attach(make(), kind)
        plain = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, trainable(model))
        adapters.enable_checkpointing(model)
        model.train()
        if kind is AdapterKind.prefix:
            with pytest.raises(UserError, match=r"engine\.gradient_checkpointing=true"):
                model(input_ids=ids)
            continue
        again = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, trainable(model))
        for one, other in zip(plain, again, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_families_without_a_place_for_them_are_refused_by_name() -> None:
    cases: list[tuple[Any, dict[str, Any], AdapterKind, str]] = [
        (
            "mamba",
            {"hidden_size": 32, "vocab_size": 60},
            AdapterKind.prefix,
            "mamba has layers of another kind",
        ),
        ("deepseek_v3", {}, AdapterKind.prefix, "deepseek_v3 keeps one latent vector"),
        ("t5", {}, AdapterKind.prompt, "t5 has an encoder of its own"),
        ("llama", {"max_position_embeddings": 5}, AdapterKind.prompt, "llama has 5 positions"),
    ]
    for family, changes, kind, message in cases:

        class Empty:
            config: Any = AutoConfig.for_model(family, **changes)

        adapter = settings(kind)
        with pytest.raises(UserError, match=message):
            method_of(adapter).check(Empty(), adapter, True)
    with torch.device("meta"):
        mamba = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", hidden_size=32))
    adapter = settings(AdapterKind.prompt)
    with pytest.raises(UserError, match=r"mamba writes token by token from a state \(cache_par"):
        method_of(adapter).check(mamba, adapter, True)
    narrow = settings(AdapterKind.ptuning)
    narrow.prompt.encoder_size = 4
    with pytest.raises(UserError, match=r"adapter\.prompt\.encoder_size=4.*at least 5"):
        method_of(narrow).check(make(), narrow, True)


def test_a_family_that_reads_them_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here one that adds something to embeddings that it looked up itself."""
    plain: Callable[..., Any] = type(make().model).forward

    def forward(self: Any, input_ids: Any = None, **options: Any) -> Any:
        if input_ids is not None:
            options["inputs_embeds"] = self.embed_tokens(input_ids) + 0.5
        return plain(self, **options)

    monkeypatch.setattr(type(make().model), "forward", forward)
    with pytest.raises(UserError, match="llama reads virtual tokens otherwise"):
        attach(make(), AdapterKind.prompt)


def test_a_family_that_goes_past_its_backbone_is_refused() -> None:
    """OPT calls the decoder inside of its backbone."""
    torch.manual_seed(1)
    small = AutoConfig.for_model(
        "opt", vocab_size=60, hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(UserError, match="opt calls parts of its backbone past the backbone"):
        attach(AutoModelForCausalLM.from_config(small), AdapterKind.prompt)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value)
def test_a_family_with_learned_positions(kind: AdapterKind) -> None:
    """GPT-2: its positions are a table, and the rows' own ones come behind the virtual ones."""
    torch.manual_seed(1)
    small = GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2, n_positions=40)
    base = AutoModelForCausalLM.from_config(small).eval()
    model = attach(copy.deepcopy(base), kind)
    ids = tokens(2, 6) % 60
    front = torch.tensor([token for row in SAMPLE for token in row][:COUNT])
    expected = base(input_ids=torch.cat((front.expand(2, -1), ids), dim=1)).logits[:, COUNT:]
    torch.testing.assert_close(model.eval()(input_ids=ids).logits, expected, rtol=0, atol=1e-4)
