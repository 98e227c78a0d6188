"""Chat templates by name: the families' texts, assistant tokens told apart in any script, one
beginning-of-sequence token.
"""
# ruff: noqa: RUF001 - other scripts are the point

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from conf.schema import DataConfig, ModelConfig
from rlhf.checks import inputs
from rlhf.models import templates
from rlhf.models.conversations import (
    encode_conversation,
    located_at_once,
    located_by_prefixes,
)
from rlhf.models.encoding import (
    IGNORED,
    encode_answer,
    prompt_ids,
    response_ids,
)
from rlhf.models.loading import load_tokenizer, train_tokenizer
from rlhf.models.templates import NAMES, template_text
from rlhf.types import UserError

# an answer begins with a space there, as those families' models were trained
SPACED = ("llama-2", "vicuna")
SCRIPTS = {
    "english": ("You are kind.", "What is it?", "A film.", "And then?", "It ends well."),
    "chinese": (
        "你是一个有帮助的助手。",
        "这部电影怎么样？",
        "很好看，\n推荐！",
        "为什么？",
        "演员很出色。",
    ),
    "arabic": ("كن لطيفاً.", "ما هذا؟", "فيلم جيد.", "ثم ماذا؟", "ينتهي نهاية سعيدة."),
    "hindi": ("दयालु रहो।", "यह क्या है?", "एक फ़िल्म।", "फिर?", "अंत अच्छा है।"),
    "japanese": ("親切に。", "これは何ですか？", "映画です。", "それから？", "ハッピーエンド。"),
    "korean": ("친절하게.", "이게 뭐야?", "영화.", "그다음은?", "끝이 좋다."),
    "russian": ("Будь добр.", "Что это?", "Фильм.", "А потом?", "Хороший конец."),
    "emoji": ("🙂", "👩‍👩‍👧?", "🎬🍿", "e\u0301?", "🏳️‍🌈!"),
}


def tokenizer(name: str, **special: str) -> Any:
    out = train_tokenizer(
        [
            "the film is good",
            "user assistant system INST Response Instruction",
            *SCRIPTS["chinese"],
        ],
        400,
        512,
    )
    if special:
        out.add_special_tokens(special)
    out.chat_template = template_text(name)
    return out


def conversation(script: str, system: bool) -> list[dict[str, str]]:
    said = SCRIPTS[script]
    roles = ("system", "user", "assistant", "user", "assistant")
    turns = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
    return turns if system else turns[1:]


def trained(tok: Any, labels: list[int]) -> str:
    return tok.decode([label for label in labels if label != IGNORED])


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("system", [True, False], ids=["system", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_exactly_the_assistants_turns_train(name: str, system: bool, script: str) -> None:
    tok, turns = tokenizer(name), conversation(script, system)
    ids, labels = encode_conversation(tok, turns, completion_only=True)
    space = " " if name in SPACED else ""
    after = " " if name == "llama-2" else ""
    said = [m["content"] for m in turns if m["role"] == "assistant"]
    assert trained(tok, labels) == "".join(f"{space}{text}{after}{tok.eos_token}" for text in said)
    assert ids[-1] == tok.eos_token_id
    text = tok.decode(ids)
    assert all(m["content"] in text for m in turns), "nothing that was said is lost"
    bos = 2 if name == "llama-2" else 0 if name in ("chatml", "qwen", "zephyr", "hermes") else 1
    assert ids.count(tok.bos_token_id) == bos
    assert not any(a == b == tok.bos_token_id for a, b in pairwise(ids)), "never doubled"


@pytest.mark.parametrize("system", [True, False], ids=["system", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_the_generation_marks_are_the_same_tokens(name: str, system: bool) -> None:
    """transformers' own mask, from the template's marks, against the mask from prefixes."""
    tok, turns = tokenizer(name), conversation("chinese", system)
    ids, labels = encode_conversation(tok, turns, completion_only=True)
    out = tok.apply_chat_template(
        turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert out["input_ids"][: len(ids)] == ids
    assert [int(label != IGNORED) for label in labels] == out["assistant_masks"][: len(ids)]
    assert not any(out["assistant_masks"][len(ids) :])


@pytest.mark.parametrize("name", [n for n in NAMES if n not in SPACED])
def test_what_trains_is_what_is_sampled_and_scored(name: str) -> None:
    tok, turns = tokenizer(name), conversation("korean", True)
    ids, _ = encode_conversation(tok, turns, completion_only=True)
    assert ids == prompt_ids(tok, turns[:-1]) + response_ids(tok, turns[-1]["content"])
    assert encode_answer(tok, turns[:-1], turns[-1:]) == ids


def wordpiece_like(name: str) -> Any:
    """A tokenizer that marks words with a metaspace, the text's first word included."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = ["<unk>", "</s>", "<s>", "<|im_start|>"]
    texts = [" ".join(said) for said in SCRIPTS.values()]
    core.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    )
    out = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    out.chat_template = template_text(name)
    return out


# beginnings and ends that a tokenizer may join with what stands beside them
EDGES = ("", " ", "\n", "  \n", "\u0301", "\ufb01")


@pytest.mark.parametrize("make", [tokenizer, wordpiece_like])
@pytest.mark.parametrize("name", NAMES)
def test_turns_located_at_once_are_those_located_by_prefixes(name: str, make: Any) -> None:
    """The same turns, or none: then they are located by prefixes."""
    tok, found = make(name), 0
    for script in SCRIPTS:
        for edge in EDGES:
            turns = [
                {**message, "content": edge + message["content"] + edge}
                for message in conversation(script, edge != " ")
            ]
            answers = [i for i, message in enumerate(turns) if message["role"] == "assistant"]
            try:
                expected = located_by_prefixes(tok, turns, answers, None)
            except ValueError:
                expected = None
            located = located_at_once(tok, turns, answers, None)
            assert located in (None, expected)
            found += located is not None
    assert found >= len(SCRIPTS) or make is wordpiece_like


FAMILIES = {
    "chatml": (
        {"eos_token": "<|im_end|>"},
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n<|im_start|>user\nC<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    "qwen": (
        {"eos_token": "<|im_end|>"},
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n<|im_start|>user\nC<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    "llama-3": (
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nA<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nB<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nC<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "llama-2": (
        {"bos_token": "<s>", "eos_token": "</s>"},
        "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nA [/INST] B </s><s>[INST] C [/INST]",
    ),
    "mistral": (
        {"bos_token": "<s>", "eos_token": "</s>"},
        "<s>[INST]S\n\nA[/INST]B</s>[INST]C[/INST]",
    ),
    "gemma": (
        {"bos_token": "<bos>", "eos_token": "<end_of_turn>"},
        "<bos><start_of_turn>user\nS\n\nA<end_of_turn>\n<start_of_turn>model\nB<end_of_turn>\n<start_of_turn>user\nC<end_of_turn>\n<start_of_turn>model\n",
    ),
    "zephyr": (
        {"eos_token": "</s>"},
        "<|system|>\nS</s>\n<|user|>\nA</s>\n<|assistant|>\nB</s>\n<|user|>\nC</s>\n<|assistant|>\n",
    ),
    "alpaca": (
        {"bos_token": "<s>", "eos_token": "</s>"},
        "<s>S\n\n### Instruction:\nA\n\n### Response:\nB</s>\n\n### Instruction:\nC\n\n### "
        "Response:\n",
    ),
    "vicuna": (
        {"bos_token": "<s>", "eos_token": "</s>"},
        "<s>S USER: A ASSISTANT: B</s>USER: C ASSISTANT:",
    ),
    "hermes": (
        {"eos_token": "<|im_end|>"},
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n<|im_start|>user\nC<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    "plain": ({"bos_token": "<s>", "eos_token": "</s>"}, "<s>S\nA\nB</s>\nC\n"),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_family_s_text(name: str) -> None:
    special, expected = FAMILIES[name]
    roles = ("system", "user", "assistant", "user")
    turns = [{"role": role, "content": text} for role, text in zip(roles, "SABC", strict=True)]
    assert (
        tokenizer(name, **special).apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        == expected
    )


@pytest.mark.parametrize(
    ("name", "start"),
    [
        (
            "qwen",
            "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful "
            "assistant.<|im_end|>\n<|im_start|>user\nA",
        ),
        (
            "alpaca",
            "<s>Below is an instruction that describes a task. Write a response that "
            "appropriately completes the request.\n\n### Instruction:\nA",
        ),
        (
            "vicuna",
            "<s>A chat between a curious user and an artificial intelligence assistant. The "
            "assistant gives helpful, detailed, and polite answers",
        ),
        ("chatml", "<|im_start|>user\nA"),
    ],
)
def test_without_a_system_message(name: str, start: str) -> None:
    tok = tokenizer(name, bos_token="<s>", eos_token="</s>")
    assert tok.apply_chat_template([{"role": "user", "content": "A"}], tokenize=False).startswith(
        start
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_tokenizer_without_a_beginning_token_takes_every_template(name: str) -> None:
    tok = tokenizer(name)
    tok.bos_token = None
    text = tok.apply_chat_template(conversation("english", True), tokenize=False)
    assert "None" not in text and "A film." in text


@pytest.mark.parametrize("name", ["llama-2", "mistral", "gemma", "alpaca", "vicuna"])
def test_a_role_that_a_family_has_not_is_refused(name: str) -> None:
    turns = [{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}]
    with pytest.raises(
        UserError,
        match=rf"2 messages: {name} knows the roles .*found 'tool'",
    ):
        prompt_ids(tokenizer(name), turns)


def test_the_option_takes_a_name_or_a_file(tmp_path: Path, tiny_model: Any) -> None:
    folder = tiny_model()
    tok = load_tokenizer(ModelConfig(path=str(folder)), "chatml")
    assert tok.chat_template == template_text("chatml")
    own = tmp_path / "own.jinja"
    own.write_text("{{ messages[0]['content'] }}", encoding="utf-8")
    assert (
        load_tokenizer(ModelConfig(path=str(folder)), str(own)).chat_template
        == "{{ messages[0]['content'] }}"
    )
    with pytest.raises(
        UserError,
        match=r"data.chat_template=chatlm: .*chatml, llama-2, .*Nearest name: chatml",
    ):
        inputs.check_template(DataConfig(path="x.jsonl", chat_template="chatlm"))


def test_every_template_is_packaged() -> None:
    folder = Path(templates.__file__).parent
    assert {p.stem for p in folder.glob("*.jinja")} == set(NAMES)
