"""The server: its routes, its door, what errors look like, and the page's files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.resources import files

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from swarm.gateway.answers import error_response
from swarm.gateway.door import Door, DoorRules
from swarm.gateway.failures import ApiFailure, bad_request, bug
from swarm.gateway.routes import Gateway, router


def make_app(gateway: Gateway, door: DoorRules, failed: Callable[[BaseException], None]) -> FastAPI:
    """The ASGI application. `failed` is told if a peer cannot go on."""
    # Without the interactive documentation, whose scripts come from elsewhere.
    app = FastAPI(title="swarmtune", docs_url=None, redoc_url=None, lifespan=_lifespan_of(gateway, failed))
    app.state.gateway = gateway
    app.add_middleware(Door, rules=door, answered=gateway.metrics.answered)
    for error in (ApiFailure, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(error, _failed)
    app.include_router(router)
    _add_page(app)
    return app


async def _failed(request: Request, error: Exception) -> Response:
    """OpenAI's shape for whatever goes wrong."""
    if isinstance(error, RequestValidationError):
        return error_response(bad_request(error.errors()))
    if isinstance(error, HTTPException):
        words = {404: "there is nothing at this address", 405: "this address does not take that method"}
        message = words.get(error.status_code, "the request cannot be read")
        failure = ApiFailure(error.status_code, message, "not_found" if error.status_code == 404 else "invalid_request")
        answer = error_response(failure)
        answer.headers.update(error.headers or {})
        return answer
    return error_response(error if isinstance(error, ApiFailure) else bug())


def _add_page(app: FastAPI) -> None:
    """The page and its files, which come with this package."""
    directory = str(files("swarm.gateway") / "page")

    async def page() -> Response:
        return FileResponse(f"{directory}/index.html", media_type="text/html; charset=utf-8")

    app.get("/", include_in_schema=False)(page)
    app.mount("/page", StaticFiles(directory=directory), name="page")


def _lifespan_of(
    gateway: Gateway, failed: Callable[[BaseException], None]
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """While the server runs, its swarms are watched; at its end, its texts are ended. `failed` is told if a peer cannot
    go on.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await gateway.watch.look()
        watching = asyncio.create_task(gateway.watch.run(), name="watch")

        def ended(task: asyncio.Task[None]) -> None:
            error = None if task.cancelled() else task.exception()
            if error is not None:
                failed(error)

        watching.add_done_callback(ended)
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            await gateway.desk.close()

    return lifespan
