"""A tiny random model with a tokenizer, and rows that it learns within a few steps: real swarms that cost little."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from blocks.spans import Span
from swarm.data.stream import SampleSet

NUM_BLOCKS = 6
FRONT, BACK, WHOLE = Span(0, 3), Span(3, 6), Span(0, 6)
VOCAB_SIZE = 128
_FIRST_WORD, _NUM_WORDS = 3, 100
_ROW_WORDS = 24


def save_tiny_model(directory: Path) -> Path:
    """Six random llama blocks and a tokenizer of words w3 to w127. Large weights, so that texts are not all alike."""
    save_random_llama(directory, vocab_size=VOCAB_SIZE, seed=11)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="w3"
    ).save_pretrained(directory)
    return directory


def save_random_llama(directory: Path, *, vocab_size: int, seed: int) -> None:
    """NUM_BLOCKS blocks whose texts end at their length, so that tests know when."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.15,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)


def counting_rows(count: int, *, length: int = _ROW_WORDS, first: int = 0, by: int = 1) -> SampleSet:
    """Rows that count upwards `by` from different words: soon learnt, so that the loss falls within a few steps."""
    starts = np.arange(first, first + count) * 7 % _NUM_WORDS
    ids = (_FIRST_WORD + (starts[:, None] + by * np.arange(length)) % _NUM_WORDS).astype(np.int32).ravel()
    offsets = np.arange(count + 1, dtype=np.int64) * length
    return SampleSet(ids=ids, labels=ids.copy(), offsets=offsets, fingerprint=f"counting-{first}-{count}-{by}")


def save_counting_rows(path: Path, count: int) -> Path:
    """The same rows as text in a .jsonl file."""
    rows = counting_rows(count)
    texts = (" ".join(f"w{word}" for word in rows[number].input_ids) for number in range(count))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path
