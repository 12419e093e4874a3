"""A tiny random model that can chat: a token for every byte, so that any text can be said, and a chat template."""

from __future__ import annotations

from pathlib import Path

from parts.tiny_model import save_random_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END, BEGIN = "<|im_end|>", "<|im_start|>"
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] == 'assistant' %}"
    "{{ raise_exception('a conversation begins with its user') }}{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, as byte-level vocabularies begin: most characters beyond ASCII are several tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {"<pad>": 0, BEGIN: 1, END: 2} | {letter: 3 + number for number, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token=BEGIN, eos_token=END, additional_special_tokens=[BEGIN]
    )
    made.chat_template = TEMPLATE
    return made


def save_tiny_chat(directory: Path) -> Path:
    """Six random llama blocks with this tokenizer. Texts end at their length, so that tests know when."""
    tokenizer = byte_tokenizer()
    save_random_llama(directory, vocab_size=len(tokenizer), seed=13)
    tokenizer.save_pretrained(directory)
    return directory
