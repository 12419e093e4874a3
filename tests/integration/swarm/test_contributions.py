"""What hosts say that they have given is what they did, to the token; and a restart does not lose it."""

from __future__ import annotations

import pytest

from blocks.decoding.speculation import PLAIN
from peers.records import PeerRecord
from swarm.hosts import announcing
from swarm.model import Sampling
from swarm.peer import Peer
from tests.integration.swarm.conftest import MakeSwarm
from tests.integration.swarm.small_swarm import BACK, FRONT, random_samples, until

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

NEW = 9
PROMPT = "w17 w23 w5 w99"


def said(peer: Peer) -> dict[str, tuple[int, int]]:
    """Trained and served, as each host announces it."""

    def of(record: PeerRecord) -> tuple[int, int]:
        return record.trained_tokens, record.served_tokens

    return {record.peer: of(record) for record in peer.status().hosts}


def test_totals_are_announced_kept_and_counted_on(make_swarm: MakeSwarm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announcing, "_GIVEN_SECONDS", 1)
    swarm = make_swarm()
    front, back = swarm.hosts(a=FRONT, b=BACK)
    client = swarm.enter("client")
    data = random_samples(8)
    labelled = int((data.labels != -100).sum()) - sum(int(data.labels[start] != -100) for start in data.offsets[:-1])
    client.train(data, steps=2)  # each row once
    until(lambda: set(said(client).values()) == {(labelled, 0)}, "what was trained is announced by both")
    model = client.model()
    prompt = len(model.tokenizer(PROMPT)["input_ids"])
    model.generate(PROMPT, Sampling(max_new_tokens=NEW), speculation=PLAIN)
    served = prompt + NEW - 1  # the last token goes to nobody
    until(lambda: set(said(client).values()) == {(labelled, served)}, "what was served is announced by both")
    rows = client.status().given_rows()
    assert sorted(rows) == sorted((peer.id[-8:], f"{labelled:,}", str(served)) for peer in (front, back))

    swarm.stop("a")
    again = swarm.host("a", FRONT)
    assert again.id == front.id
    until(lambda: said(client).get(again.id) == (labelled, served), "a restart loses nothing")
    client.train(data, steps=1)
    until(lambda: said(client)[again.id][0] > labelled, "and goes on")
