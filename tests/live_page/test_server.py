"""The page's server: what browsers get and may do, and that none of them slows the stream."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

aiohttp = pytest.importorskip("aiohttp")
from aiohttp.test_utils import TestClient, TestServer  # noqa: E402

from ttt_video.errors import UserError  # noqa: E402
from ttt_video.live import COMMANDS, Shown  # noqa: E402
from ttt_video.live import server as live_server  # noqa: E402
from ttt_video.live.server import CLIENTS, LiveServer, serve  # noqa: E402

TOKEN = "correcthorse"
PADDING = b"\0"


def served(
    studio: Any, play: Callable[[TestClient], Awaitable[None]], token: str = "", host: str = ""
) -> None:
    """Runs ``play`` with a client of the server of a studio's player, which is started."""

    async def main() -> None:
        studio.server = LiveServer(studio.player, token)
        app = studio.server.application()
        async with TestClient(TestServer(app, host=host or "127.0.0.1")) as client:
            studio.player.start()
            await play(client)

    asyncio.run(asyncio.wait_for(main(), 60))


def split(message: bytes) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Head and pictures of a frame's message."""
    end = 4 + int.from_bytes(message[:4], "little")
    head, pictures = json.loads(message[4:end]), []
    for _, size in head["pictures"]:
        pictures.append(np.asarray(Image.open(io.BytesIO(message[end : end + size]))))
        end += size
    assert message[end:].strip(PADDING) == b""
    return head, pictures


async def until(socket: Any, wanted: Callable[[Any], Any]) -> Any:
    """Receives until ``wanted`` returns something that is true, and returns that."""
    while True:
        message = await socket.receive(timeout=30)
        assert message.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY), message
        content = message.data
        if message.type == aiohttp.WSMsgType.TEXT:
            content = json.loads(content)
        if found := wanted(content):
            return found


def frame(number: int) -> Callable[[Any], Any]:
    def wanted(content: Any) -> Any:
        if not isinstance(content, bytes):
            return None
        head, pictures = split(content)
        return (head, pictures) if head["numbers"]["frame"] == number else None

    return wanted


def key(name: str) -> Callable[[Any], Any]:
    return lambda content: content.get(name) if isinstance(content, dict) else None


async def ask(socket: Any, name: str, value: Any = None) -> dict[str, Any]:
    """Sends a command; returns the answer."""
    await socket.send_json({"do": name} if value is None else {"do": name, "value": value})
    has = {"done", "error"}
    return await until(socket, lambda c: c if isinstance(c, dict) and has & c.keys() else None)


def test_the_page_is_one_file_that_asks_nobody_else(studio):
    async def play(client: TestClient) -> None:
        response = await client.get("/")
        text = await response.text()
        assert (response.status, response.content_type) == (200, "text/html")
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        for other in ("http://", "https://", "src=", "@import", "url("):
            assert other not in text
        assert (await client.get("/other")).status == 404

    served(studio, play)


def test_a_browser_gets_history_state_and_frames(studio, make_video):
    async def play(client: TestClient) -> None:
        await asyncio.to_thread(studio.next, 2)
        socket = await client.ws_connect("/stream")
        history = await until(socket, key("history"))
        assert [row["frame"] for row in history] == [0, 1]
        state = await until(socket, key("state"))
        assert (state["method"], state["paused"], state["learning"]) == (
            "online_ttt_mae", False, True,
        )  # fmt: skip
        await asyncio.to_thread(studio.next)
        head, pictures = await until(socket, frame(2))
        assert head["numbers"] == studio.player.history[-1]
        assert [title for title, _ in head["pictures"]] == ["original", "frozen", "online_ttt_mae"]
        assert {picture.shape for picture in pictures} == {(64, 64, 3)}
        pixels = make_video("a", 3, 64, 64)[2]["image"].permute(1, 2, 0).numpy()
        exact = io.BytesIO()
        Image.fromarray(pixels).save(exact, "JPEG", quality=85)
        assert (pictures[0] == np.asarray(Image.open(exact))).all()

    served(studio, play)


def test_a_page_that_is_opened_in_a_pause_shows_the_last_frame(studio):
    async def play(client: TestClient) -> None:
        await asyncio.to_thread(studio.next)
        await asyncio.to_thread(studio.player.do, "pause", True)
        socket = await client.ws_connect("/stream")
        head, _ = await until(socket, frame(0))
        assert head["numbers"] == studio.player.history[-1]

    served(studio, play)


def test_every_button_has_its_effect(studio):
    async def play(client: TestClient) -> None:
        player, done = studio.player, set()
        await asyncio.to_thread(studio.next, 2)
        socket = await client.ws_connect("/stream")

        async def click(name: str, value: Any = None) -> None:
            assert await ask(socket, name, value) == {"done": name}
            done.add(name)

        await click("keep")
        assert [m.number for m in player.moments] == [1]
        assert studio.moved()
        await click("reset")
        assert studio.moved() == []
        await click("back", 1)
        assert studio.moved()
        await click("learn", False)
        assert (await asyncio.to_thread(studio.next))["loss"] is None
        await click("learn", True)
        await click("step_size", 0.125)
        assert player.stream.adapter.optimizer.param_groups[0]["lr"] > 0
        assert player.step_size == 0.125
        await click("save", True)
        await asyncio.to_thread(studio.next)
        await click("save", False)
        assert [*(studio.folder / "saved_1" / "masks" / "a").glob("*.png")]
        await click("method", "none")
        assert (await asyncio.to_thread(studio.next))["loss"] is None
        await click("pause", True)
        studio.tap.next()
        shown = len(studio.shown)
        await asyncio.sleep(0.2)
        assert len(studio.shown) == shown
        await click("pause", False)
        await asyncio.to_thread(studio.next)
        assert done == set(COMMANDS)

    served(studio, play)


def test_all_browsers_see_what_one_has_clicked_and_one_may_go(studio):
    async def play(client: TestClient) -> None:
        first, second = [await client.ws_connect("/stream") for _ in range(2)]
        await asyncio.to_thread(studio.next)
        await asyncio.gather(until(first, frame(0)), until(second, frame(0)))
        assert studio.shown[0].__dict__["message"] is studio.shown[0].message  # drawn once
        assert await ask(first, "learn", False) == {"done": "learn"}
        await until(
            second, lambda c: isinstance(c, dict) and c.get("state", {}).get("learning") is False
        )
        first._response.connection.transport.abort()  # without a word
        await asyncio.to_thread(studio.next, 3)
        head, _ = await until(second, frame(3))
        assert head["numbers"]["loss"] is None
        assert await ask(second, "learn", True) == {"done": "learn"}

    served(studio, play)


def test_a_browser_that_reads_nothing_slows_nobody_and_costs_a_frame_of_memory(studio, monkeypatch):
    size = 1 << 21
    small = Shown.message.func
    monkeypatch.setattr(Shown, "message", property(lambda s: small(s).ljust(size, PADDING)))

    async def play(client: TestClient) -> None:
        sleeper = socket.create_connection((client.host, client.port))
        request = (
            f"GET /stream HTTP/1.1\r\nHost: 127.0.0.1:{client.port}\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        sleeper.sendall(request.encode())
        reader = await client.ws_connect("/stream", max_msg_size=0)
        for number in range(12):  # far more than the sockets' buffers hold
            await asyncio.to_thread(studio.next)
            await until(reader, frame(number))
        waiting = [
            each.socket._req.transport.get_write_buffer_size() for each in studio.server.clients
        ]
        assert len(waiting) == 2
        assert 0 < max(waiting) <= 2 * size
        sleeper.close()

    served(studio, play)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 101),
        ({"Origin": "http://127.0.0.1:{port}"}, 101),
        ({"Origin": "http://localhost:{port}", "Host": "localhost:{port}"}, 101),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "null"}, 403),
        # A name of theirs that leads to this machine.
        ({"Origin": "http://evil.example:{port}", "Host": "evil.example:{port}"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
    ],
)
def test_other_origins_are_refused(studio, headers, status):
    async def play(client: TestClient) -> None:
        own = {name: value.format(port=client.port) for name, value in headers.items()}
        assert await upgrade(client, own) == status

    served(studio, play)


async def upgrade(client: TestClient, headers: dict[str, str], query: str = "") -> int:
    """The status of an attempt to open the websocket."""
    try:
        socket = await client.ws_connect(f"/stream{query}", headers=headers)
    except aiohttp.WSServerHandshakeError as error:
        return error.status
    await socket.close()
    return 101


@pytest.mark.parametrize(
    ("query", "status"),
    [("", 401), ("?token=", 401), ("?token=wrong", 401), (f"?token={TOKEN}", 101)],
)
def test_with_a_token_whoever_knows_it_may_come_by_any_name(studio, query, status):
    async def play(client: TestClient) -> None:
        host = {"Host": "robot.local", "Origin": "http://robot.local"}
        assert await upgrade(client, host, query) == status
        page = await client.get(f"/{query}", headers=host)
        assert page.status == {101: 200}.get(status, status)
        evil = {"Host": "robot.local", "Origin": "http://evil.example"}
        assert await upgrade(client, evil, query) == 403

    served(studio, play, TOKEN)


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"do": "explode"}', '{"do": "pause", "value": 3}', '{"do": "back", "value": 9}'],
)
def test_bad_input_gets_a_line_and_changes_nothing(studio, text):
    async def play(client: TestClient) -> None:
        socket = await client.ws_connect("/stream")
        before = {**studio.player.state()}
        await socket.send_str(text)
        error = await until(socket, key("error"))
        assert error
        assert "\n" not in error
        assert studio.player.state() == before

    served(studio, play)


@pytest.mark.parametrize("long", [False, True])
def test_what_is_no_text_or_too_long_ends_the_connection(studio, long):
    async def play(client: TestClient) -> None:
        socket = await client.ws_connect("/stream")
        await (socket.send_str("x" * 10**6) if long else socket.send_bytes(b"\0"))
        while True:
            message = await socket.receive(timeout=30)
            if message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED):
                break
        assert socket.close_code == (1009 if long else 1003)

    served(studio, play)


def test_no_more_browsers_than_there_is_room_for(studio):
    async def play(client: TestClient) -> None:
        for _ in range(CLIENTS):
            await client.ws_connect("/stream")
        assert await upgrade(client, {}) == 503

    served(studio, play)


# ---- serve


def test_the_address_is_told_and_what_ends_the_stream_is_raised(studio):
    told: list[str] = []
    studio.tap.let(UserError("the camera is gone"))
    with pytest.raises(UserError, match="the camera is gone"):
        asyncio.run(serve(studio.player, "127.0.0.1", 0, TOKEN, told.append))
    assert told[0].startswith("http://127.0.0.1:")
    assert told[0].endswith(f"/?token={TOKEN}")


@pytest.mark.parametrize("host", ["127.0.0.1", "no.such.host.invalid"])
def test_a_port_that_cannot_be_had_is_one_line(studio, host):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"nothing can be served at {host} port {port}"):
            asyncio.run(serve(studio.player, host, port, "", print))
    assert not any(t.name == "live stream" and t.is_alive() for t in threading.enumerate())


def test_the_page_names_every_command():
    text = live_server.PAGE.read_text(encoding="utf-8")
    assert all(f'ask("{name}"' in text for name in COMMANDS)


def test_of_two_frames_a_slow_browser_gets_the_later_one(studio):
    server = LiveServer(studio.player)
    client = live_server._Client(None, None)
    server.clients.add(client)
    for shown in ("first", "second"):
        server._offer(shown)
    assert (client.shown, server.newest) == ("second", "second")
    assert client.news.is_set()
