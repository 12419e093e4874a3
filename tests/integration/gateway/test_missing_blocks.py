"""A swarm in which a host dies: told by /healthz, and answered with 503 in a bounded time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from openai import InternalServerError

from tests.integration.gateway.small_gateway import SmallGateway, gateway_over
from tests.integration.swarm.small_swarm import BACK, FRONT, SmallSwarm, until

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture
def swarm(tmp_path: Path, tiny_chat: Path) -> Iterator[SmallSwarm]:
    made = SmallSwarm.create(tmp_path, str(tiny_chat), tmp_path / "cache", {}, name="tales")
    yield made
    made.close()


def health(gateway: SmallGateway) -> tuple[int, dict[str, object]]:
    try:
        with urlopen(f"{gateway.url}/healthz", timeout=30) as answer:
            return answer.status, json.load(answer)
    except HTTPError as error:
        return error.code, json.load(error)


def test_a_dead_host_is_told_and_its_return_is_seen(swarm: SmallSwarm) -> None:
    swarm.hosts(a=FRONT, b=BACK)
    client_peer = swarm.enter("client", swarm.config("client", route_seconds=1.0))
    with gateway_over([client_peer]) as gateway:
        assert health(gateway) == (200, {"status": "ok", "missing_blocks": {}})
        client = gateway.client()
        ask = {"model": "tales", "messages": USER, "max_tokens": 3}
        assert client.chat.completions.create(**ask).choices[0].finish_reason == "length"
        stream = client.chat.completions.create(**{**ask, "max_tokens": 200}, stream=True)
        next(stream)
        swarm.kill("b")
        until(lambda: health(gateway)[0] == 503, "the death is told")
        assert health(gateway)[1] == {"status": "missing blocks", "missing_blocks": {"tales": [3, 4, 5]}}
        for streamed in (False, True):
            with pytest.raises(InternalServerError) as refused:
                client.chat.completions.create(**ask, stream=streamed)
            assert (refused.value.status_code, refused.value.code) == (503, "no_route")
            assert "3:6" in refused.value.message
            assert int(refused.value.response.headers["retry-after"]) > 0
        swarm.host("c", BACK)
        until(lambda: health(gateway)[0] == 200, "another holder is seen")
        assert client.chat.completions.create(**ask).choices[0].finish_reason == "length"
        events = json.load(urlopen(f"{gateway.url}/api/swarm", timeout=30))["runs"][0]["events"]
        assert next(event["what"] for event in events if event["blocks"] == [3, 6]) == "joined"
