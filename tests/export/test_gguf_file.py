"""GGUF files read back as the model that they were written from; what has no place in one is
refused by name.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from conf.stages import GGUFType
from rlhf.export import families, gguf_file, vocabulary
from rlhf.models.loading import BOS, EOS, PAD, UNK
from rlhf.types import UserError
from tests.export.made import CHATML, LLAMA3_ROPE, language_model
from tests.models import families as tokenizers

FAMILIES = {
    "tied": ("llama", {"tie_word_embeddings": True}),
    "untied": ("llama", {"tie_word_embeddings": False}),
    "wide heads": ("llama", {"head_dim": 24}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {"use_sliding_window": False, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"use_sliding_window": False, "head_dim": 32}),
}
# what transformers does not read of such a file
UNREAD = {"llama3 rope": ["rope_type"], "qwen3": ["head_dim"]}


def written(path: Path, model: Any, tokenizer: Any, kind: GGUFType) -> Path:
    family = families.family_of(model.config, type(model).__name__)
    words = vocabulary.vocabulary_of(tokenizer, model.get_input_embeddings().weight.shape[0])
    gguf_file.write_file(path, model, family, words, kind, title="toy", license_name="mit")
    gguf_file.check_vocabulary(path, tokenizer, words, ["Hello, 2 dogs!\n", "<|user|>\nwhy"])
    return path


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    model.eval()
    out: torch.Tensor = model(input_ids=torch.arange(5, 105)[None]).logits
    return out


@pytest.mark.parametrize("name", FAMILIES)
def test_f32_reads_back_as_the_model(name: str, tmp_path: Path) -> None:
    kind, config = FAMILIES[name]
    tokenizer = tokenizers.made(template=CHATML)
    model = language_model(kind, tokenizer, **config)
    path = written(tmp_path / "x.gguf", model, tokenizer, GGUFType.f32)
    unread = families.unread(model.config, families.family_of(model.config, type(model).__name__))
    assert unread == UNREAD.get(name, [])
    known = model.config if unread else None
    assert torch.equal(logits(gguf_file.read_file(path, known)), logits(model))


def test_types_round_as_the_package_does(tmp_path: Path) -> None:
    """Weights of a matrix and of a vector, in each type."""
    tokenizer = tokenizers.made(template=CHATML)
    model = language_model("llama", tokenizer, tie_word_embeddings=False)
    matrix, vector = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scale = own[matrix].reshape(-1, 32).abs().amax(1, keepdim=True) / 127
    rounded = (own[matrix].reshape(-1, 32) / scale).round() * scale.half().float()
    expected = {
        GGUFType.f16: own[matrix].half().float(),
        GGUFType.bf16: own[matrix].bfloat16().float(),
        GGUFType.q8_0: rounded.reshape(own[matrix].shape),
    }
    for kind, numbers in expected.items():
        path = written(tmp_path / f"{kind.value}.gguf", model, tokenizer, kind)
        read = gguf_file.read_file(path).state_dict()
        assert torch.equal(read[vector], own[vector])
        assert torch.allclose(read[matrix], numbers, atol=1e-6, rtol=0)


def test_inputs_are_rounded_as_llama_cpp_does() -> None:
    """The largest number of a block of 32 is 127 steps; a step is a float16."""
    values = torch.zeros(2, 32)
    values[0, :4] = torch.tensor([12.7, 0.26, -0.04, 0.05001])
    values[1, 0] = 1.0
    step = float(torch.tensor(0.1).half())
    expected = torch.zeros(2, 32)
    expected[0, :4] = torch.tensor([127.0, 3.0, 0.0, 1.0]) * step
    expected[1, 0] = 127 * float(torch.tensor(1 / 127).half())
    assert torch.allclose(gguf_file.rounded(values), expected, atol=1e-6, rtol=0)


def test_rounded_inputs_change_the_answer_of_a_model() -> None:
    tokenizer = tokenizers.made(template=CHATML)
    model = language_model("llama", tokenizer)
    own = logits(model)
    gguf_file.round_inputs(model, GGUFType.f16)
    assert torch.equal(logits(model), own)
    gguf_file.round_inputs(model, GGUFType.q8_0)
    assert 1e-3 < float((logits(model) - own).abs().max()) < 5


def test_matrices_of_odd_width_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tokenizers.made(template=CHATML)
    model = language_model("llama", tokenizer, intermediate_size=80)
    with caplog.at_level("WARNING", logger="rlhf.export"):
        written(tmp_path / "x.gguf", model, tokenizer, GGUFType.q8_0)
    assert "ffn_down" in caplog.text and "ffn_up" not in caplog.text


def test_weights_beyond_float16_are_refused(tmp_path: Path) -> None:
    tokenizer = tokenizers.made(template=CHATML)
    model = language_model("llama", tokenizer)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 7e4
    with pytest.raises(UserError, match="70000"):
        written(tmp_path / "x.gguf", model, tokenizer, GGUFType.f16)


@pytest.mark.parametrize(
    ("kind", "config", "named"),
    [
        ("gpt_neox", {}, "GPTNeoXForCausalLM"),
        ("gemma2", {"head_dim": 16}, "Gemma2ForCausalLM"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("mistral", {"sliding_window": 64, "head_dim": 16}, "sliding_window"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type",
        ),
    ],
)
def test_what_the_file_would_lose_is_refused(kind: str, config: Any, named: str) -> None:
    tokenizer = tokenizers.made()
    model = language_model(kind, tokenizer, **config)
    with pytest.raises(UserError, match=named) as refused:
        families.family_of(model.config, type(model).__name__)
    assert "stage.gguf" in str(refused.value)


# ---- tokenizers ----


def test_vocabulary_has_every_row() -> None:
    tokenizer = tokenizers.made(template=CHATML, bos="<|system|>")
    tokenizer.add_tokens(["<think>"])
    words = vocabulary.vocabulary_of(tokenizer, len(tokenizer) + 3)
    assert words.rules == "gpt-2"
    assert words.tokens[-3:] == tuple(f"[PAD{len(tokenizer) + i}]" for i in range(3))
    types = dict(zip(words.tokens, words.types, strict=True))
    assert (types["<|user|>"], types["<think>"], types["a"], types[words.tokens[-1]]) == (
        3,
        4,
        1,
        5,
    )
    ids = tokenizer.convert_tokens_to_ids(["<|system|>", "<|endoftext|>", "<|end|>"])
    assert [words.special[name] for name in ("bos", "eos", "eot")] == ids
    assert not words.adds_bos


@pytest.mark.parametrize(
    ("around", "template", "adds"),
    [
        ("<|system|> $A", None, True),
        ("<|system|> $A", tokenizers.GEMMA, True),
        ("<|system|> $A", tokenizers.PHI, False),  # its conversations begin without it
        (None, tokenizers.GEMMA, False),  # the template's own is text
    ],
)
def test_bos_stands_where_the_models_prompts_have_it(
    around: Any, template: Any, adds: bool
) -> None:
    tokenizer = tokenizers.made(bos="<|system|>", around=around, template=template)
    assert vocabulary.vocabulary_of(tokenizer, len(tokenizer)).adds_bos is adds


def test_rules_of_known_tokenizers() -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    digits = {"type": "Digits", "individual_digits": True}
    split = {
        "type": "Split",
        "pattern": {"Regex": GGUF_PRE_TOKENIZER_SPLITS["qwen2"]},
        "behavior": "Isolated",
        "invert": False,
    }
    model = {"type": "BPE", "ignore_merges": False}

    def rules(steps: list[Any], **more: Any) -> str:
        steps = {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0]
        return vocabulary.rules_of({"model": model, "pre_tokenizer": steps, **more})

    whole, bytes_only = words | {"use_regex": True}, words | {"use_regex": False}
    assert rules([whole]) == "gpt-2"
    assert rules([digits, whole]) == "smollm"
    assert rules([split, bytes_only], normalizer={"type": "NFC"}) == "qwen2"
    for steps in ([bytes_only], [digits | {"individual_digits": False}, whole], [split, whole]):
        with pytest.raises(UserError, match=r"stage\.gguf"):
            rules(steps)
    with pytest.raises(UserError, match="Lowercase"):
        rules([whole], normalizer={"type": "Lowercase"})
    with pytest.raises(UserError, match="ignore_merges"):
        vocabulary.rules_of({"model": model | {"ignore_merges": True}, "pre_tokenizer": whole})
    with pytest.raises(UserError, match="Unigram"):
        vocabulary.rules_of({"model": {"type": "Unigram"}})


def test_another_vocabulary_is_found_when_the_file_is_read(tmp_path: Path) -> None:
    tokenizer = tokenizers.made(template=CHATML)
    path = written(tmp_path / "x.gguf", language_model("llama", tokenizer), tokenizer, GGUFType.f32)
    other = tokenizers.made(specials=(BOS, EOS, PAD, UNK, "<|x|>"), eos=EOS)
    words = vocabulary.vocabulary_of(other, len(other))
    with pytest.raises(UserError, match="tokens"):
        gguf_file.check_vocabulary(path, other, words, [])
