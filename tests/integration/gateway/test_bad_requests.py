"""Whatever is asked wrongly is answered in OpenAI's shape, with the right status and one line that says why."""

from __future__ import annotations

import http.client
import json
from urllib.parse import urlsplit

import pytest
from openai import APIStatusError, BadRequestError, NotFoundError

from tests.integration.gateway.conftest import Served

GOOD = {"model": "tales", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
JSON = {"content-type": "application/json"}


def send(
    served: Served, method: str, path: str, body: bytes | str = b"", headers: dict[str, str] | None = None
) -> tuple[int, dict[str, object]]:
    """Status and JSON of a request as it is."""
    connection = http.client.HTTPConnection(urlsplit(served.gateway.url).netloc, timeout=60)
    try:
        connection.request(method, path, body, headers if headers is not None else JSON)
        answer = connection.getresponse()
        content = answer.read()
        return answer.status, json.loads(content) if content else {}
    finally:
        connection.close()


def error_of(answer: dict[str, object]) -> dict[str, object]:
    error = answer["error"]
    assert isinstance(error, dict)
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in str(error["message"])
    assert len(str(error["message"])) < 400
    return error


@pytest.mark.parametrize("path", ["/", "/v1/models", "/healthz", "/page/app.js"])
def test_a_page_whose_name_leads_here_reads_nothing(served: Served, path: str) -> None:
    status, answer = send(served, "GET", path, headers={"Host": "evil.example:8000"})
    assert status == 403
    error = error_of(answer)
    assert error["code"] == "host_not_allowed"
    assert "--allow-host" in str(error["message"])
    assert send(served, "GET", "/v1/models", headers={"Host": "localhost"})[0] == 200


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"temperature": True}, "temperature", "valid number"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"top_p": -0.1}, "top_p", "greater than or equal to 0"),
        ({"n": 5}, "n", "less than or equal to 4"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 201}, "max_tokens", "200 at most"),
        ({"max_tokens": 1.5}, "max_tokens", "integer"),
        ({"max_completion_tokens": 3}, None, "give one of them"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"top_logprobs": 2}, None, "needs logprobs"),
        ({"stream_options": {"include_usage": True}}, None, "only for stream"),
        ({"presence_penalty": 0.5}, "presence_penalty", "less than or equal to 0"),
        ({"logit_bias": {"5": 10}}, "logit_bias", "at most 0"),
        ({"tools": [{"type": "function"}]}, "tools", "at most 0"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "'text'"),
        ({"colour": "red"}, "colour", "not known"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'user'"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", "'text'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "begins with its user"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages", "512 tokens"),
        ({"messages": [{"role": "user", "content": "x" * 400}], "max_tokens": 150}, "messages", "shorten one"),
    ],
)
def test_a_wrong_value_is_named(served: Served, change: dict[str, object], param: str | None, words: str) -> None:
    with pytest.raises(BadRequestError) as refused:
        served.gateway.client().post("/chat/completions", body={**GOOD, **change}, cast_to=object)
    error = error_of(dict(refused.value.response.json()))
    assert error["type"] == "invalid_request_error"
    assert str(error["param"] or "").startswith(param or "")
    assert words in str(error["message"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"echo": True}, "'echo'"),
        ({"suffix": "x"}, "'suffix'"),
        ({"best_of": 3}, "best_of"),
        ({"prompt": [[5], [999]]}, "not one of 259"),
        ({"prompt": [-1]}, "greater than or equal to 0"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["x"] * 9}, "at most 8"),
        ({"prompt": None}, "prompt"),
        ({"logprobs": 6}, "less than or equal to 5"),
        ({"prompt": "x" * 600}, "512 tokens"),
    ],
)
def test_a_wrong_completion_is_refused(served: Served, change: dict[str, object], words: str) -> None:
    body = {"model": "tales", "prompt": "hi", "max_tokens": 2, **change}
    with pytest.raises(BadRequestError) as refused:
        served.gateway.client().post("/completions", body=body, cast_to=object)
    assert words in str(error_of(dict(refused.value.response.json()))["message"])


def test_an_unknown_model_is_told_which_there_are(served: Served) -> None:
    client = served.gateway.client()
    for ask in (
        lambda: client.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "x"}]),
        lambda: client.completions.create(model="gpt", prompt="x", stream=True),
        lambda: client.models.retrieve("gpt"),
    ):
        with pytest.raises(NotFoundError) as refused:
            ask()
        assert refused.value.code == "model_not_found"
        assert "tales, news, tiny-chat" in refused.value.message


def test_what_cannot_be_read_is_refused(served: Served) -> None:
    post = "/v1/chat/completions"
    for body, status, code in (
        (b"", 400, None),
        (b"{", 400, "invalid_json"),
        (b"[" * 100_000, 400, None),
        (b"\xff\xfe", 400, None),
        (b'"text"', 400, None),
        (b"[]", 400, None),
        (b'{"model": NaN}', 400, None),
        (json.dumps({**GOOD, "temperature": 1e999}).encode(), 400, None),
        (json.dumps({**GOOD, "seed": 10**400}).encode(), 400, None),
        (json.dumps({**GOOD, "model": "\ud800"}).encode(), 400, None),
        (json.dumps({**GOOD, "messages": [{"role": "user", "content": "\udfff"}]}).encode(), 400, None),
        (json.dumps({**GOOD, "\ud800\n": 1}).encode(), 400, None),
        (b" " * ((1 << 20) + 1), 413, "body_too_large"),
    ):
        found, answer = send(served, "POST", post, body)
        assert (found, code or error_of(answer)["code"]) == (status, error_of(answer)["code"]), body[:40]
    assert send(served, "POST", post, json.dumps(GOOD), {"content-type": "text/plain"})[0] == 400, "as browsers send it"
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", post, 405),
        ("GET", "/page/../app.py", 404),
        ("GET", "/page/%2e%2e/app.py", 404),
    ):
        found, answer = send(served, method, path)
        assert found == status
        assert error_of(answer)["type"] == "invalid_request_error"


def test_fields_that_mean_nothing_here_are_taken(served: Served) -> None:
    answer = served.gateway.client().chat.completions.create(
        model="tales",
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "ann"},
            {"role": "assistant", "content": "c", "refusal": None},
            {"role": "user", "content": "d"},
        ],
        max_tokens=2,
        user="ann",
        presence_penalty=0,
        frequency_penalty=0.0,
        logit_bias={},
        response_format={"type": "text"},
        metadata={"a": "b"},
        stop=None,
        n=None,
    )
    assert answer.choices[0].finish_reason == "length"


def test_errors_before_a_stream_have_a_status_of_their_own(served: Served) -> None:
    with pytest.raises(APIStatusError) as refused:
        served.gateway.client().chat.completions.create(
            model="tales", messages=[{"role": "user", "content": "x" * 600}], stream=True
        )
    assert refused.value.status_code == 400
    assert refused.value.code == "context_length_exceeded"
