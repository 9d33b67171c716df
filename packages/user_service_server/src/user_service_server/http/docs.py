"""/docs and /openapi.json: the contract for people, without anything from another origin."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import msgspec
import swagger_ui_bundle
from litestar import get
from litestar.params import FromPath
from litestar.response.base import ASGIResponse

from .answers import JSON, HTTPRequest
from .failures import RouteNotFound
from .openapi import openapi_document

_PAGE = b"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><title>User Service</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</body>
</html>
"""
_START = b"""SwaggerUIBundle({
  url: "/openapi.json", dom_id: "#swagger-ui", deepLinking: true,
  defaultModelsExpandDepth: 0, validatorUrl: null
});
"""
_MEDIA = {".css": "text/css", ".js": "text/javascript"}
_SECURITY = [
    (
        "Content-Security-Policy",
        (
            "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline';"
            " img-src 'self' data:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'"
        ),
    ),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
]
_FILES = ("swagger-ui.css", "swagger-ui-bundle.js")


@cache
def _file(name: FromPath[str]) -> bytes:
    return Path(swagger_ui_bundle.swagger_ui_path, name).read_bytes()


@get("/docs", include_in_schema=False)
async def show_docs() -> ASGIResponse:
    """Show the contract in Swagger UI."""
    return ASGIResponse(body=_PAGE, media_type="text/html", headers=_SECURITY)


@get("/docs/{name:str}", include_in_schema=False)
async def get_docs_file(name: FromPath[str]) -> ASGIResponse:
    """Serve a file of Swagger UI."""
    if name == "start.js":
        body = _START
    elif name in _FILES:
        body = _file(name)
    else:
        raise RouteNotFound
    media_type = _MEDIA[Path(name).suffix]
    return ASGIResponse(body=body, media_type=media_type, headers=_SECURITY)


@get("/openapi.json", include_in_schema=False)
async def get_openapi(request: HTTPRequest) -> ASGIResponse:
    """Serve the OpenAPI document."""
    state = request.app.state
    if "openapi" not in state:
        state.openapi = msgspec.json.encode(openapi_document(request.app, state.version))
    return ASGIResponse(body=state.openapi, media_type=JSON)
