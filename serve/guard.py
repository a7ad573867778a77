"""Around every route: the token, the largest body, a line of the log, errors without traceback."""

import hmac
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from datetime import UTC, datetime
from typing import Any

from starlette.exceptions import HTTPException

from encache.serve.metrics import Metrics

logger = logging.getLogger("encache.serve")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

#: Where a request's scope, and a record of the log, hold what is to be logged.
FACTS = "encache_facts"
#: Bytes of the largest request body.
LARGEST_BODY = 2**18
#: What anybody may fetch: whether the server lives, the page, and pictures by their secret names.
_OPEN = re.compile(r"/|/healthz|/readyz|/v1/images/files/.*")


class Guard:
    """ASGI middleware.

    Args:
        app: what answers.
        metrics: is told of every answer.
        token: that clients must send as "Authorization: Bearer TOKEN"; None asks for none.
    """

    def __init__(self, app: App, metrics: Metrics, token: str | None) -> None:
        self._app = app
        self._metrics = metrics
        self._expected = f"Bearer {token}".encode() if token else None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            if not self._allows(scope):
                await answer_error(
                    sending,
                    401,
                    "This server wants its token: Authorization: Bearer TOKEN.",
                    "invalid_api_key",
                )
            else:
                await self._app(scope, _bounded(receive), sending)
        except Exception:
            logger.exception("A request failed.")
            if not status:
                await answer_error(
                    sending, 500, "The server failed; its log says why.", "server_error"
                )
        self._note(scope, status, time.monotonic() - start)

    def _allows(self, scope: Message) -> bool:
        if self._expected is None or is_open(scope["path"]):
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, self._expected)

    def _note(self, scope: Message, status: int, seconds: float) -> None:
        # Only routes that exist: anything else would let clients fill the memory with names.
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.on_answered(route, status, seconds)
        facts = {"method": scope["method"], "route": route, "status": status}
        facts |= {"seconds": round(seconds, 4), **scope.get(FACTS, {})}
        logger.info("answered", extra={FACTS: facts})


def is_open(path: str) -> bool:
    """Whether a path needs no token."""
    return _OPEN.fullmatch(path) is not None


class JsonLines(logging.Formatter):
    """A log whose lines are JSON objects; prompts are not in it."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        facts = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, FACTS, {}),
        }
        if record.exc_info:
            facts["traceback"] = self.formatException(record.exc_info)
        return json.dumps(facts)


def _bounded(receive: Receive) -> Receive:
    total = 0

    async def receiving() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > LARGEST_BODY:
            raise HTTPException(413, f"A request may have {LARGEST_BODY} bytes at most.")
        return message

    return receiving


def error_body(message: str, code: str) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {
        "error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    }


async def answer_error(send: Send, status: int, message: str, code: str) -> None:
    """Send an error as the whole answer."""
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    body = json.dumps(error_body(message, code)).encode()
    await send({"type": "http.response.body", "body": body})
