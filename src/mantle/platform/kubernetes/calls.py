"""What may come of a call to the API server besides its answer: a refusal, or nothing at all."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2
from lightkube import ApiError

NOT_FOUND, CONFLICT = 404, 409


class Refused(Exception):
    """The API server answered, and not with success. `code` is the HTTP status."""

    def __init__(self, doing: str, code: int, message: str) -> None:
        super().__init__(f"{doing}: {message} (status {code})")
        self.code = code


class Unreachable(Exception):
    """No answer from the API server; the text says what was being done."""


@asynccontextmanager
async def doing(what: str) -> AsyncIterator[None]:
    """Around a call: its failures as `Refused` and `Unreachable`, with `what` was being done."""
    try:
        yield
    except ApiError as error:
        raise Refused(what, int(error.status.code or 0), str(error.status.message)) from error
    except httpx2.HTTPStatusError as error:
        raise Refused(what, error.response.status_code, error.response.text[:200]) from error
    except RecursionError as error:  # `managedFields` may be nested by the thousand
        raise Refused(what, 200, "the answer is nested too deep to be read") from error
    except httpx2.HTTPError as error:
        raise Unreachable(f"{what}: {type(error).__name__} {error}".rstrip()) from error
