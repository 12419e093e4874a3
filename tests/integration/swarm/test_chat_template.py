"""The loss mask of conversations with a real model's tokenizer and template."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from swarm.data.encoding import Tokenizer, encode_row
from swarm.data.rows import ChatRow

CHAT = ChatRow(
    where="here",
    messages=(
        {"role": "user", "content": "assistant"},
        {"role": "assistant", "content": "  Yes, I am.\nAsk on "},
        {"role": "user", "content": "Yes, I am."},
        {"role": "assistant", "content": "user"},
    ),
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
)
HEADLESS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
REFUSING = "{% if messages|length < 4 %}{{ raise_exception('too short') }}{% endif %}" + HEADLESS


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    return AutoTokenizer.from_pretrained(smollm2)


def learnt_text(tokenizer: Tokenizer, template: object) -> str:
    original = tokenizer.chat_template
    tokenizer.chat_template = template
    try:
        encoded = encode_row(CHAT, tokenizer)
    finally:
        tokenizer.chat_template = original
    return str(tokenizer.decode(encoded.ids[encoded.learn]))  # type: ignore[attr-defined]


@pytest.mark.parametrize("template", ["its own", MARKED, HEADLESS, REFUSING])
def test_the_loss_is_on_the_answers_and_their_end_of_turn(tokenizer: Tokenizer, template: str) -> None:
    learnt = learnt_text(tokenizer, tokenizer.chat_template if template == "its own" else template)
    answers = [answer.strip() for answer in learnt.split("<|im_end|>")]
    assert answers == ["Yes, I am.\nAsk on", "user", ""]
