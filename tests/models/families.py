"""Small tokenizers with the habits that people's tokenizers have: what they write around a text,
how their templates write a turn, and which tokens end it.
"""

from typing import Any

_TEXTS = ["the cat sat on the mat and looked at the dog", "user assistant system is it so"] * 4
PHI = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
SILENT = (  # no system role, and no word about it
    "{% for m in messages %}{% if m['role'] != 'system' %}<|{{ m['role'] }}|>\n"
    "{{ m['content'] }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
UNPROMPTED = (  # no generation prompt
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
)
SPACED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }} <|end|>"
    "{% else %}<|user|>{{ m['content'] }}<|assistant|>{% endif %}{% endfor %}"
)
# Answers before the last question lose their reasoning, as in Qwen 3
THINKING = (
    "{% set ns = namespace(asked=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|{{ m['role'] }}|>\n"
    "{% if m['role'] == 'assistant' and loop.index0 > ns.asked "
    "and (loop.last or m.reasoning_content) %}"
    "<think>{{ m.reasoning_content or '' }}</think>{% endif %}"
    "{{ m['content'] }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
ROLES = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")


def made(
    specials: tuple[str, ...] = ROLES,
    *,
    eos: str = "<|endoftext|>",
    bos: str | None = None,
    template: str | None = None,
    around: str | None = None,
    prefix_space: bool = False,
) -> Any:
    """A byte-level tokenizer. around: what its post-processor writes, such as "<s> $A </s>";
    prefix_space: a text by itself begins with a space, as with SentencePiece.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_TEXTS, trainer)
    if around is not None:
        named = [token for token in around.split() if token != "$A"]
        core.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=[(token, core.token_to_id(token)) for token in named]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=eos, bos_token=bos, model_max_length=256
    )
    tokenizer.chat_template = template
    return tokenizer


def ids(tokenizer: Any, *tokens: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(token) for token in tokens]
