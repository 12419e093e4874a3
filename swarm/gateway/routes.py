"""What each route does: OpenAI's API, health, metrics, and the swarms as JSON."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any, cast

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from swarm.gateway.answers import AsciiResponse, ChatShape, CompletionShape
from swarm.gateway.askers import Askers
from swarm.gateway.catalog import Served, base_name
from swarm.gateway.desk import Desk
from swarm.gateway.failures import ApiFailure
from swarm.gateway.keys import NO_LIMITS, ApiKey, AskerLimits, find_key
from swarm.gateway.metrics import CONTENT_TYPE, Metrics
from swarm.gateway.requests import ChatRequest, CompletionRequest
from swarm.gateway.streaming import Asked, stream_answer, whole_answer
from swarm.gateway.watching import SwarmWatch
from swarm.gateway.writing import TextRequest
from swarm.model import Sampling

_COMPLETION_TOKENS = 16  # OpenAI's own default for completions
_ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"description": "the request cannot be answered: OpenAI's error"}}
_TAKES_JSON: dict[int | str, dict[str, Any]] = {
    **_ERRORS,
    "5XX": {"description": "the swarm cannot answer now: OpenAI's error"},
}

router = APIRouter()


@dataclass(frozen=True, kw_only=True)
class Gateway:
    """What the routes work with. `keys` empty: anybody may ask, each address within `anonymous`.

    An answer has `most_tokens` at most, and `default_tokens` where a chat asks for no number.
    """

    catalog: Mapping[str, Served]
    desk: Desk
    watch: SwarmWatch
    metrics: Metrics
    askers: Askers
    keys: tuple[ApiKey, ...] = ()
    anonymous: AskerLimits = NO_LIMITS
    most_tokens: int = 4096
    default_tokens: int = 512


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks."""

    name: str
    limits: AskerLimits


def gateway_of(request: Request) -> Gateway:
    """What app.make_app was given."""
    return cast(Gateway, request.app.state.gateway)


def asker_of(request: Request) -> Asker:
    """Who asks, by the Authorization header.

    Raises:
        ApiFailure: 401, a key is needed.
    """
    gateway = gateway_of(request)
    if gateway.keys:
        key = find_key(request.headers.get("authorization"), gateway.keys)
        return Asker(f"key {key.name}", key.limits)
    return Asker(f"address {request.client.host if request.client else ''}", gateway.anonymous)


Known = Annotated[Asker, Depends(asker_of)]


@router.post("/v1/chat/completions", responses=_TAKES_JSON)
async def chat(body: ChatRequest, request: Request, asker: Known) -> Response:
    """Answer a conversation."""
    gateway = gateway_of(request)
    with ExitStack() as stack:
        stack.enter_context(gateway.askers.asking(asker.name, asker.limits))
        served = _served(gateway, body.model)
        ids = await asyncio.to_thread(served.words.of_chat, [message.plain() for message in body.messages])
        wanted = _Wanted("messages", served, gateway.default_tokens, body.most_tokens, body.noted)
        shape = ChatShape(served.name, served.words, with_logprobs=body.noted is not None)
        return await _answer(request, body, _texts(gateway, body, [ids], wanted), shape, stack)


@router.post("/v1/completions", responses=_TAKES_JSON)
async def complete(body: CompletionRequest, request: Request, asker: Known) -> Response:
    """Continue one text or several."""
    gateway = gateway_of(request)
    with ExitStack() as stack:
        stack.enter_context(gateway.askers.asking(asker.name, asker.limits))
        served = _served(gateway, body.model)
        prompts = await asyncio.to_thread(lambda: [_prompt_ids(served, prompt) for prompt in body.prompts])
        wanted = _Wanted("prompt", served, _COMPLETION_TOKENS, body.max_tokens, body.logprobs)
        shape = CompletionShape(served.name, served.words, with_logprobs=body.logprobs is not None)
        return await _answer(request, body, _texts(gateway, body, prompts, wanted), shape, stack)


@router.get("/v1/models", responses=_ERRORS)
async def models(request: Request, asker: Known) -> Response:
    """What is served."""
    catalog = gateway_of(request).catalog
    return AsciiResponse({"object": "list", "data": [served.plain() for served in catalog.values()]})


@router.get("/v1/models/{name:path}", responses=_ERRORS)
async def model(name: str, request: Request, asker: Known) -> Response:
    """One of them."""
    return AsciiResponse(_served(gateway_of(request), name).plain())


@router.get("/api/swarm", responses=_ERRORS)
async def swarm(request: Request, asker: Known) -> Response:
    """The swarms as they were seen last, for the page."""
    gateway = gateway_of(request)
    runs = [
        {"base": base_name(peer.node.spec.model.name), **seen.plain()} for peer, seen in gateway.watch.read().items()
    ]
    desk = {"writing": gateway.desk.writing, "waiting": gateway.desk.waiting}
    return AsciiResponse({"runs": runs, "gateway": desk}, headers={"cache-control": "no-store"})


@router.get("/metrics", responses=_ERRORS)
async def metrics(request: Request, asker: Known) -> Response:
    """For Prometheus."""
    gateway = gateway_of(request)
    return Response(gateway.metrics.page(gateway.desk), media_type=CONTENT_TYPE)


@router.get("/healthz", responses={503: {"description": "some blocks have no live holder"}})
async def healthz(request: Request) -> Response:
    """Whether every block of every run has a live holder."""
    unserved = gateway_of(request).watch.unserved()
    state = {"status": "missing blocks" if unserved else "ok", "missing_blocks": unserved}
    return AsciiResponse(state, status_code=503 if unserved else 200)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Where the prompt stands, how long an answer is if nobody says so, and if somebody does; what is noted of it."""

    param: str
    served: Served
    default_tokens: int
    said_tokens: int | None
    top_logprobs: int | None


def _served(gateway: Gateway, name: str) -> Served:
    served = gateway.catalog.get(name)
    if served is None:
        there = ", ".join(gateway.catalog)
        raise ApiFailure(404, f"this model is not served here; there are: {there}", "model_not_found", "model")
    return served


def _prompt_ids(served: Served, prompt: str | list[int]) -> list[int]:
    """A prompt's tokens.

    Raises:
        ApiFailure: 400, a token is not the model's, or there is none.
    """
    if not isinstance(prompt, str):
        if max(prompt) >= served.words.token_count:
            raise ApiFailure(400, f"a token is not one of {served.words.token_count}", "invalid_value", "prompt")
        return prompt
    first = served.words.tokenizer.bos_token_id
    ids = served.words.of_text(prompt) or ([] if first is None else [int(first)])
    if not ids:
        raise ApiFailure(400, "the prompt is empty; this model needs a token to begin with", "invalid_value", "prompt")
    return ids


def _texts(
    gateway: Gateway, body: ChatRequest | CompletionRequest, prompts: list[list[int]], wanted: _Wanted
) -> list[TextRequest]:
    """The texts of a request: `n` for each prompt, each with dice of its own.

    Raises:
        ApiFailure: 400, more tokens than the model or this gateway takes.
    """
    said, most = wanted.said_tokens, wanted.served.words.max_positions
    if said is not None and said > gateway.most_tokens:
        why = f"{said} tokens are asked for; this gateway writes {gateway.most_tokens} at most"
        raise ApiFailure(400, why, "invalid_value", "max_tokens")
    texts: list[TextRequest] = []
    for number, ids in enumerate(ids for ids in prompts for _ in range(body.n or 1)):
        room = most - len(ids)
        if room < (said or 1):
            why = f"this model takes {most} tokens; the prompt has {len(ids)} and {said or 1} are to be written"
            raise ApiFailure(400, f"{why}; shorten one of them", "context_length_exceeded", wanted.param)
        sampling = Sampling(
            max_new_tokens=min(said or wanted.default_tokens, room),
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=None if body.seed is None else body.seed + number,
        )
        texts.append(
            TextRequest(
                served=wanted.served,
                ids=tuple(ids),
                sampling=sampling,
                stops=body.stops,
                top_logprobs=wanted.top_logprobs,
            )
        )
    return texts


async def _answer(
    request: Request,
    body: ChatRequest | CompletionRequest,
    texts: list[TextRequest],
    shape: ChatShape,
    stack: ExitStack,
) -> Response:
    """Order the texts; what `stack` holds is given back when the answer is over."""
    order = gateway_of(request).desk.order(texts)
    asked = Asked(
        order=order,
        shape=shape,
        choices=len(texts),
        prompt_tokens=sum(len(text.ids) for text in texts[:: body.n or 1]),
        includes_usage=body.includes_usage,
        receive=request.receive,
        close=stack.pop_all().close,
    )
    return await (stream_answer(asked) if body.stream else whole_answer(asked))
