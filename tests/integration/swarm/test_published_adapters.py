"""Finished adapters beside the one that is trained: the same hosts serve each, and each text is what peft computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from peft import PeftModel

import swarm as swarm_api
from peers.private.membership import Role
from swarm.errors import BadConfig
from swarm.model import Sampling
from swarm.peer import Peer
from swarm.peer_config import PeerConfig
from tests.integration.swarm.conftest import MakeSwarm
from tests.integration.swarm.machines import Machine
from tests.integration.swarm.peft_adapters import save_adapter
from tests.integration.swarm.reference_run import local_model
from tests.integration.swarm.small_swarm import BACK, FRONT, WHOLE, SmallSwarm, until
from tests.integration.swarm.test_texts_of_a_swarm import Local

PROMPT = "w17 w23 w5 w99"
GREEDY = Sampling(max_new_tokens=16)
SETTINGS = {"adapter": {"lora_rank": 8}}


def owner_config(swarm: SmallSwarm, *others: Peer) -> PeerConfig:
    """The owner on a machine of its own, who knows the run's first peers and `others`."""
    config, known = swarm.config("owner"), tuple(address for other in others for address in other.join.peers)
    return replace(config, network=replace(config.network, bootstrap=known))


def serves(peer: Peer, *contents: bytes) -> bool:
    """Whether a host announces exactly these adapters."""
    assert peer.node.hosting is not None
    return set(peer.node.hosting.announcer.adapters()) == {content[:8] for content in contents}


def texts_of(client: Peer, *names: str) -> dict[str, str]:
    """What each published adapter says, and the run's own, and the base model."""
    texts = {name: client.model(adapter=name).generate(PROMPT, GREEDY)[0] for name in names}
    model = client.model()
    return texts | {
        "own": model.generate(PROMPT, GREEDY)[0],
        "base": model.generate(PROMPT, GREEDY, adapter=False)[0],
    }


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_texts_by_each_name_are_what_peft_computes(make_swarm: MakeSwarm, tmp_path: Path) -> None:
    swarm = make_swarm(SETTINGS)
    hosts = swarm.hosts(a=FRONT, b=BACK)
    client = swarm.enter("client")
    made = {
        "pirate": save_adapter(swarm.source, tmp_path / "one", seed=1, rank=8),
        "lawyer-1.5": save_adapter(swarm.source, tmp_path / "two", seed=2, rank=3, targets=("q_proj",)),
    }
    config, contents = owner_config(swarm), []
    for name, directory in made.items():
        done = swarm_api.publish(swarm.run, directory, name=name, wait_seconds=60, config=config)
        assert done.spread.is_whole, done.spread.words()
        contents.append(done.adapter.content)
    assert all(serves(host, *contents) for host in hosts)

    found = texts_of(client, *made)
    assert len(set(found.values())) == 3, found  # the run's own is untrained, so it says what the base does
    for name, directory in made.items():
        adapted = PeftModel.from_pretrained(local_model(swarm.source), directory).eval()
        assert found[name] == Local(adapted, client.model()).generate(PROMPT, GREEDY)[0]

    assert [row[:3] for row in client.status().adapter_rows()] == [
        ("lawyer-1.5", "2 of 2", "1"),
        ("pirate", "2 of 2", "1"),
    ]

    # The owner is gone: a newcomer has them from the others, and serves all alone when these are gone, too.
    late = swarm.host("late", WHOLE)
    until(lambda: serves(late, *contents), "the newcomer serves both")
    client.model(adapter="pirate")
    swarm.stop("a", "b")
    until(lambda: len(client.status().hosts) == 1, "the first hosts are gone")
    assert texts_of(client, *made) == found

    assert swarm_api.withdraw(swarm.run, "pirate", config=owner_config(swarm, late)) == 3
    until(lambda: serves(late, contents[1]), "one is withdrawn")
    with pytest.raises(BadConfig, match=r"no published adapter 'pirate'; there are: lawyer-1\.5"):
        client.model(adapter="pirate")
    assert texts_of(client, "lawyer-1.5")["lawyer-1.5"] == found["lawyer-1.5"]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_in_a_private_run_invited_hosts_serve_it_and_invited_clients_ask_for_it(
    make_swarm: MakeSwarm, tmp_path: Path
) -> None:
    swarm = make_swarm({**SETTINGS, "security": {"private": True}})
    swarm.host("own", FRONT)
    bobs, cems = Machine(tmp_path / "bob", swarm), Machine(tmp_path / "cem", swarm)
    swarm.hold(bobs.enter("bob", bobs.invited(Role.HOST)), BACK)
    client = cems.enter("client", cems.invited(Role.CLIENT), client_mode=True)
    directory = save_adapter(swarm.source, tmp_path / "one", seed=1, rank=8)
    done = swarm_api.publish(swarm.run, directory, name="pirate", wait_seconds=60, config=owner_config(swarm))
    assert done.spread.is_whole, done.spread.words()
    adapted = PeftModel.from_pretrained(local_model(swarm.source), directory).eval()
    model = client.model(adapter="pirate")
    assert model.generate(PROMPT, GREEDY) == Local(adapted, model).generate(PROMPT, GREEDY)
