"""Published adapters are models of the gateway: listed as they come and go, chosen by name, alike for every client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from openai import NotFoundError, OpenAI
from peft import PeftModel

from swarm.cli.main import main
from swarm.model import Sampling
from tests.integration.gateway.small_gateway import gateway_over
from tests.integration.swarm.peft_adapters import save_adapter
from tests.integration.swarm.reference_run import local_model
from tests.integration.swarm.small_swarm import WHOLE, SmallSwarm, until
from tests.integration.swarm.test_texts_of_a_swarm import Local

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

LENGTH = 12
PROMPT = "What is it?"


@pytest.fixture
def small(tmp_path: Path, tiny_chat: Path) -> Iterator[SmallSwarm]:
    made = SmallSwarm.create(tmp_path, str(tiny_chat), tmp_path / "cache", {"adapter": {"lora_rank": 4}}, name="tales")
    try:
        yield made
    finally:
        made.close()


def listed(client: OpenAI) -> list[str]:
    return [model.id for model in client.models.list()]


def text(client: OpenAI, model: str) -> str:
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=LENGTH, temperature=0)
    assert answer.model == model
    return answer.choices[0].text


def command(*words: str) -> str:
    """What a command of the owner says."""
    done = CliRunner().invoke(main, list(words))
    assert done.exit_code == 0, done.output
    return done.output


def test_published_adapters_are_listed_and_chosen_by_name(
    small: SmallSwarm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    small.host("a", WHOLE)
    peer = small.enter("client")
    directory = save_adapter(small.source, tmp_path / "adapter", seed=5, rank=2)
    with gateway_over([peer]) as gateway:
        client = gateway.client()
        assert listed(client) == ["tales", "tiny-chat"]
        said = command("publish", str(small.run), str(directory), "--name", "pirate", "--wait", "60")
        assert "'pirate' is published (list 1): 1 of 1 hosts serve it" in said
        assert "pirate" in command("publish", str(small.run), "--list")
        until(lambda: listed(client) == ["tales", "tiny-chat", "pirate"], "the adapter is listed")
        assert client.models.retrieve("pirate").owned_by == "swarmtune-adapter"

        adapted = PeftModel.from_pretrained(local_model(small.source), directory).eval()
        expected = Local(adapted, peer.model()).generate(PROMPT, Sampling(max_new_tokens=LENGTH))[0]
        base = text(client, "tiny-chat")
        assert text(client, "pirate") == expected != base
        assert text(client, "tales") == base, "an untouched adapter adds nothing"

        assert "'pirate' is withdrawn (list 2)" in command("publish", str(small.run), "--withdraw", "pirate")
        until(lambda: listed(client) == ["tales", "tiny-chat"], "it is gone")
        with pytest.raises(NotFoundError) as refused:
            text(client, "pirate")
        assert refused.value.code == "model_not_found"
