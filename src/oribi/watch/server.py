"""The page's server: on this machine alone, for those who have its token, and with no address but its own allowed to pages."""

import contextlib
import hmac
import secrets
import socket
import webbrowser
from collections.abc import Awaitable, Callable
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

import fastapi
import gradio as gr
import uvicorn

from oribi.errors import ConfigError
from oribi.text import say
from oribi.watch.fragments import STYLE
from oribi.watch.page import build_page
from oribi.watch.runs import Watched
from oribi.watch.talk import Talk

HOST = "127.0.0.1"
PORT = 7860  # gradio's own; the next free one is taken where no port was asked for
_TRIED = 20
# gradio writes scripts and styles into its page, and its plots compile expressions; nothing may come from or go elsewhere
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; img-src 'self' data: "
    "blob:; font-src 'self' data:; worker-src 'self' blob:; connect-src 'self'; frame-ancestors 'none'; form-action 'self'"
)
_HEADERS = ((b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer"), (b"x-content-type-options", b"nosniff"))  # fmt: skip
_REFUSED = "This page belongs to one user. Open the address that `oribi watch` printed, with its token.\n"


class Gate:
    """Lets requests through that carry the token, in the address at first and in a cookie from then on.

    Args:
        app: an ASGI application. token: the secret. port: of the server; cookies of two servers on one machine are apart.
    """

    def __init__(self, app: Any, token: str, port: int) -> None:
        self.app, self.token, self.cookie = app, token, f"oribi-watch-{port}"

    async def __call__(
        self, scope: dict[str, Any], receive: Any, send: Callable[..., Awaitable[None]]
    ) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if scope["type"] != "http" or not _is_local(headers.get(b"host", b"")):
            # a foreign name that was made to lead here is an attack (DNS rebinding)
            await _respond(scope, send, 403, _REFUSED)
            return
        if self._is_right(_from_query(scope)):
            cookie = f"{self.cookie}={self.token}; Path=/; HttpOnly; SameSite=Lax"
            await _respond(scope, send, 303, "", ((b"location", b"/"), (b"set-cookie", cookie.encode())))
        elif self._is_right(_from_cookie(headers.get(b"cookie", b""), self.cookie)):
            await self.app(scope, receive, _with_headers(send))
        else:
            await _respond(scope, send, 403, _REFUSED)

    def _is_right(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), self.token.encode())


def _is_local(host: bytes) -> bool:
    name = (
        host.decode("latin-1").rsplit(":", 1)[0]
        if b"]" not in host
        else host.decode("latin-1").partition("]")[0] + "]"
    )
    return name in (HOST, "localhost", "[::1]")


def _from_query(scope: dict[str, Any]) -> str:
    return parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [""])[0]


def _from_cookie(header: bytes, name: str) -> str:
    cookies: SimpleCookie = SimpleCookie()
    with contextlib.suppress(CookieError):
        cookies.load(header.decode("latin-1"))
    return cookies[name].value if name in cookies else ""


def _with_headers(send: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    async def sending(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
        await send(message)

    return sending


async def _respond(
    scope: dict[str, Any], send: Callable[..., Awaitable[None]], status: int, text: str, headers: Any = ()
) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    kind = ((b"content-type", b"text/plain; charset=utf-8"), *_HEADERS)
    await send({"type": "http.response.start", "status": status, "headers": [*kind, *headers]})
    await send({"type": "http.response.body", "body": text.encode()})


def watch_app(watched: Watched, talk: Talk, token: str, port: int) -> Gate:
    """The whole application, behind its gate."""
    page = build_page(watched, talk)
    app = gr.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None), page, path="/", server_name=HOST, server_port=port,
        theme=_theme(), css=STYLE, footer_links=[], run_history=False, ssr_mode=False, mcp_server=False, pwa=False,
        enable_monitoring=False,
    )  # fmt: skip
    return Gate(app, token, port)


def _theme() -> Any:
    """gradio's plainest theme, with the system's fonts and colours that are read easily."""
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    primary = {
        "button_primary_background_fill": "*primary_700",
        "button_primary_background_fill_hover": "*primary_800",
    }
    return theme.set(
        **primary, **{f"{name}_dark": value for name, value in primary.items()},
        input_placeholder_color="*neutral_600", input_placeholder_color_dark="*neutral_300",
        block_label_text_color="*neutral_700", block_label_text_color_dark="*neutral_200",
        block_title_text_color="*neutral_700", block_title_text_color_dark="*neutral_200",
        body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300",
    )  # fmt: skip


def listen(port: int | None) -> socket.socket:
    """A socket on this machine's own address.

    Args:
        port: to listen at; None takes 7860 or the next free one.

    Raises:
        ConfigError: it is in use.
    """
    for candidate in [port] if port is not None else [*range(PORT, PORT + _TRIED), 0]:
        found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((HOST, candidate))
            return found
        except OSError as error:
            found.close()
            if port is not None:
                raise ConfigError(
                    f"--port {port}: {error.strerror}; leave it out to take a free one"
                ) from error
    raise ConfigError("no port is free")


def serve_page(watched: Watched, port: int | None = None, opens: bool = False) -> None:
    """Serve the page until the process is interrupted.

    Args:
        watched: the runs. port: as in `listen`. opens: whether a browser is opened.
    """
    talk, token = Talk(), secrets.token_urlsafe(24)
    with listen(port) as listening:
        number = listening.getsockname()[1]
        address = f"http://{HOST}:{number}/?token={token}"
        server = uvicorn.Server(
            uvicorn.Config(watch_app(watched, talk, token, number), log_level="warning", access_log=False)
        )
        say(f"oribi watch: {address}")
        say(
            f"From another machine: ssh -L {number}:{HOST}:{number} THIS-MACHINE, then the same address. Ctrl-C ends it."
        )
        if opens:
            webbrowser.open(address)
        try:
            server.run(sockets=[listening])
        finally:
            talk.close()
