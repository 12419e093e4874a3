"""Requests made from the gateway's own description, right and wrong ones: none is a server's error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from swarm.gateway.serve import GatewayConfig
from tests.integration.gateway.conftest import Served
from tests.integration.gateway.small_gateway import KEY, QUICK, SmallGateway, gateway_over

schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis: pip install 'swarmtune[dev]'")
EXAMPLES = 20
OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("GET", "/api/swarm"),
    ("GET", "/metrics"),
    ("GET", "/healthz"),
]


@pytest.fixture(scope="module")
def gateway(served: Served) -> Iterator[SmallGateway]:
    """With short answers, so that right requests cost little."""
    config = GatewayConfig(watch=QUICK, most_tokens=2, default_tokens=1)
    with gateway_over(served.clients[:1], config) as small:
        yield small


def test_the_description_names_every_operation(gateway: SmallGateway) -> None:
    schema = schemathesis.openapi.from_url(f"{gateway.url}/openapi.json")
    found = {(op.ok().method.upper(), op.ok().path) for op in schema.get_all_operations()}
    assert found == set(OPERATIONS)


RIGHT, WRONG = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
REQUESTS = [(*each, RIGHT) for each in OPERATIONS] + [(*each, WRONG) for each in OPERATIONS if each[0] == "POST"]


@pytest.mark.parametrize(("method", "path", "mode"), REQUESTS)
def test_no_request_is_a_servers_error(
    gateway: SmallGateway, method: str, path: str, mode: schemathesis.GenerationMode
) -> None:
    operation = schemathesis.openapi.from_url(f"{gateway.url}/openapi.json")[path][method]
    statuses: Counter[int] = Counter()

    @settings(
        max_examples=EXAMPLES if method == "POST" else 8,
        phases=[Phase.generate],  # a failure is shown as it was found: shrinking it would ask a thousand times
        suppress_health_check=list(HealthCheck),
        deadline=None,
        derandomize=True,
        database=None,
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case) -> None:
        if method == "POST" and isinstance(case.body, dict):  # else every one fails for its model's name
            case.body = {**case.body, "model": "tales"}
        answer = case.call(headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
        statuses[answer.status_code] += 1
        assert answer.status_code < 500, f"{answer.status_code} {answer.text[:300]}"
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    ask()
    if mode is WRONG:
        assert statuses[400] > EXAMPLES / 2, statuses
    elif path != "/v1/models/{name}":
        assert statuses[200], statuses
