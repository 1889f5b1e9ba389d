"""The page at ``/``: files built from ``page/`` at the root of the repository, and nothing else.

They are read into memory when the server starts, so no path of a request ever reaches the file system.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request, Response

from slm.errors import ConfigError

FOLDER = Path(__file__).parent / "page"
"""The built files."""
MANIFEST = "build.json"
"""Lists them with their sha256, and the sha256 of the sources they were built from."""
ENTRY = "index.html"

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
        "trusted-types 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_FOREVER = "public, max-age=31536000, immutable"
_ASK_AGAIN = "no-cache"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class BuiltFile:
    """One file of the page.

    Attributes:
        content: its bytes.
        media_type: what it is.
        etag: its sha256, quoted.
        caching: the entry may change under its name; all others carry their hash in theirs.
    """

    content: bytes
    media_type: str
    etag: str
    caching: str


def load_page(folder: Path = FOLDER) -> dict[str, BuiltFile]:
    """Read the files that the manifest lists, by name.

    Raises:
        ConfigError: the page was not built, or a file is not the one that was built.
    """
    try:
        listed: Mapping[str, str] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        contents = {name: (folder / name).read_bytes() for name in listed}
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"the page in {folder} cannot be read ({error}): {_MEND}") from error
    files = {}
    for name, content in contents.items():
        digest = hashlib.sha256(content).hexdigest()
        if digest != listed[name] or Path(name).suffix not in _TYPES:
            raise ConfigError(f"{folder / name} is not the file that was built (sha256 {digest}): {_MEND}")
        caching = _ASK_AGAIN if name == ENTRY else _FOREVER
        files[name] = BuiltFile(content, _TYPES[Path(name).suffix], f'"{digest}"', caching)
    if ENTRY not in files:
        raise ConfigError(f"the page in {folder} has no {ENTRY}: {_MEND}")
    return files


_MEND = "install slm again, or run `npm ci && npm run build` in page/"


def page_router(files: Mapping[str, BuiltFile]) -> APIRouter:
    """``GET /`` and ``GET /page/NAME`` for the built files; any other name is not found."""
    router = APIRouter(include_in_schema=False)

    @router.api_route("/", methods=["GET", "HEAD"])
    async def index(request: Request) -> Response:
        return _send(request, files[ENTRY])

    @router.api_route("/page/{name}", methods=["GET", "HEAD"])
    async def asset(request: Request, name: str) -> Response:
        found = files.get(name)
        if found is None:
            return Response("not found\n", 404, media_type="text/plain", headers=dict(SECURITY_HEADERS))
        return _send(request, found)

    return router


def _send(request: Request, file: BuiltFile) -> Response:
    headers = SECURITY_HEADERS | {"Cache-Control": file.caching, "ETag": file.etag}
    if file.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=file.media_type)
