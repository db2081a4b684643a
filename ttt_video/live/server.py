"""Serves the live page: who may open it, and what goes to and fro."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from ..errors import UserError
from .commands import LONGEST, parse_command
from .player import Player
from .shown import Shown

try:
    from aiohttp import WSMsgType, web
except ImportError as error:
    raise UserError(
        f"the live page needs aiohttp, which is missing: pip install aiohttp ({error})"
    ) from error

PAGE = Path(__file__).with_name("page.html")

LOCAL = ("127.0.0.1", "localhost", "::1")
"""Names of this machine. With another one a page elsewhere could speak through its own domain."""

CLIENTS = 16
"""Browsers at once; more are turned away."""

HEARTBEAT = 10.0
"""Seconds after which a browser is asked whether it is there; one that is not is forgotten."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src blob: data:; connect-src 'self'; "
    "script-src 'unsafe-inline'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class _Client:
    """A browser: the newest frame that it has not got, and whether the state has changed."""

    def __init__(self, socket: web.WebSocketResponse, shown: Shown | None) -> None:
        self.socket = socket
        self.shown = shown
        self.state_changed = True
        self.news = asyncio.Event()
        self.news.set()


class LiveServer:
    """The page, and a websocket for each browser that shows it.

    Frames are drawn and encoded in a thread of the server's own, once for all browsers, and only
    those that a browser is ready for: others are dropped, and the stream waits for nobody.
    """

    def __init__(self, player: Player, token: str = "") -> None:
        """
        Args:
            player: started by whoever made it.
            token: what a browser has to know, "" for nothing, which only this machine's may.
        """
        self.player, self.token = player, token
        self.clients: set[_Client] = set()
        self.newest: Shown | None = None
        self._drawing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="drawing")

    def application(self) -> web.Application:
        """Returns the application, for aiohttp's runner."""
        app = web.Application(middlewares=[self._guard])
        app.router.add_get("/", self._page)
        app.router.add_get("/stream", self._stream)
        app.on_startup.append(self._listen)
        app.on_shutdown.append(self._close)
        return app

    async def _listen(self, app: web.Application) -> None:
        loop = asyncio.get_running_loop()

        def call(function: Callable[..., None], *values: object) -> None:
            with suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(function, *values)

        self.player.listen(lambda shown: call(self._offer, shown), lambda: call(self._offer_state))

    async def _close(self, app: web.Application) -> None:
        for client in [*self.clients]:
            await client.socket.close(code=1001, message=b"the stream has ended")
        self._drawing.shutdown(wait=False, cancel_futures=True)

    def _offer(self, shown: Shown) -> None:
        self.newest = shown
        for client in self.clients:
            client.shown = shown  # in place of one that it was too slow for
            client.news.set()

    def _offer_state(self) -> None:
        for client in self.clients:
            client.state_changed = True
            client.news.set()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuses browsers without the token, and pages of other origins."""
        host = urlsplit(f"//{request.host}")
        if not self.token and host.hostname not in LOCAL:
            raise web.HTTPForbidden(text="this page is for the machine that it runs on")
        origin = request.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != request.host:
            raise web.HTTPForbidden(text="pages of other origins are refused")
        given = request.query.get("token", "").encode()
        if self.token and not hmac.compare_digest(given, self.token.encode()):
            raise web.HTTPUnauthorized(text="add ?token=... with the token of --token")
        response = await handler(request)
        if not response.prepared:
            response.headers.update(HEADERS)
        return response

    async def _page(self, request: web.Request) -> web.StreamResponse:
        return web.Response(text=PAGE.read_text(encoding="utf-8"), content_type="text/html")

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        if len(self.clients) >= CLIENTS:
            raise web.HTTPServiceUnavailable(text=f"{CLIENTS} browsers are there already")
        socket = web.WebSocketResponse(heartbeat=HEARTBEAT, max_msg_size=4 * LONGEST)
        await socket.prepare(request)
        client = _Client(socket, self.newest)  # else a page opened in a pause would be empty
        self.clients.add(client)
        sending = asyncio.create_task(self._send(client))
        try:
            await socket.send_json({"history": [*self.player.history]})
            async for message in socket:
                if message.type == WSMsgType.TEXT:
                    await self._obey(client, message.data)
                else:
                    await socket.close(code=1003, message=b"text is expected")
        finally:
            self.clients.discard(client)
            sending.cancel()
        return socket

    async def _obey(self, client: _Client, text: str) -> None:
        """Does what a browser asks for; a mistake is told to it alone."""
        try:
            name, value = parse_command(text)
            await asyncio.to_thread(self.player.do, name, value)
        except UserError as error:
            await client.socket.send_json({"error": str(error)})
        else:
            await client.socket.send_json({"done": name})

    async def _send(self, client: _Client) -> None:
        """Sends what is newest, whenever the browser has taken what was sent before."""
        loop = asyncio.get_running_loop()
        with suppress(ConnectionError, RuntimeError):  # it is gone
            while True:
                await client.news.wait()
                client.news.clear()
                if client.state_changed:
                    client.state_changed = False
                    await client.socket.send_str(json.dumps({"state": self.player.state()}))
                shown, client.shown = client.shown, None
                if shown is not None:
                    message = await loop.run_in_executor(
                        self._drawing, partial(getattr, shown, "message")
                    )
                    await client.socket.send_bytes(message)


async def serve(
    player: Player, host: str, port: int, token: str, tell: Callable[[str], None]
) -> None:
    """Serves the page until it is cancelled, or the stream fails.

    Args:
        player: not started yet.
        host, port: where; port 0 takes a free one.
        token: see :class:`LiveServer`.
        tell: is given the page's address, once it can be opened.

    Raises:
        UserError: the port is taken, or there is no such host; or what ended the stream.
    """
    runner = web.AppRunner(
        LiveServer(player, token).application(), access_log=None, shutdown_timeout=1.0
    )
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"nothing can be served at {host} port {port} ({reason}): choose another --port"
            ) from error
        shown = f"[{host}]" if ":" in host else host
        query = f"/?token={token}" if token else "/"
        tell(f"http://{shown}:{runner.addresses[0][1]}{query}")
        player.start()
        while player.failure is None:
            await asyncio.sleep(0.2)
        raise player.failure
    finally:
        await runner.cleanup()
