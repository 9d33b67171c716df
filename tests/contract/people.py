"""Owns the people of the contract suite, and what is expected of answers about them."""

from __future__ import annotations

from itertools import count
from typing import Any

import httpx

USERS = "/api/v1/users"
RESOLVE = "/api/v1/deliveries/resolve"
FEEDBACK = "/api/v1/feedback"
PASSWORD = "Ladder-Onion-42"
NOBODY = "01a205c7-a743-7a16-a135-c839ba84936e"

_numbers = count(1)


def new_email() -> str:
    """Return an address that nobody has."""
    return f"person{next(_numbers)}@example.com"


def new_token() -> str:
    """Return a token that nobody has."""
    return f"token-{next(_numbers)}"


async def register(raw: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    """Register somebody; returns the document."""
    body = {"name": "Ada", "email": new_email(), "password": PASSWORD, **fields}
    answer = await raw.post(f"{USERS}/", json=body)
    assert answer.status_code == 201, answer.text
    document: dict[str, Any] = data_of(answer)
    return document


def data_of(answer: httpx.Response) -> Any:
    """Return the data of a success."""
    body = answer.json()
    assert answer.is_success, answer.text
    assert list(body) == ["success", "data", "message", "error"]
    assert body["success"] is True
    assert body["message"]
    assert body["error"] is None
    return body["data"]


def assert_refused(answer: httpx.Response, status: int, code: str, *fields: str) -> None:
    """The answer has this status and code, and names these fields."""
    body = answer.json()
    assert (answer.status_code, body["error"]["code"]) == (status, code), answer.text
    assert list(body) == ["success", "data", "message", "error"]
    assert (body["success"], body["data"]) == (False, None)
    assert body["message"]
    assert body["error"]["request_id"] == answer.headers["x-request-id"]
    assert {detail["field"] for detail in body["error"]["details"]} == set(fields), answer.text


def version_of(answer: httpx.Response) -> int:
    """Return the version in an answer's ETag."""
    return int(answer.headers["etag"].strip('"').split(".")[2])
