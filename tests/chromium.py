"""A headless Chromium, driven through its DevTools protocol: Debian's, without another package."""

from __future__ import annotations

import asyncio
import base64
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

PROGRAM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
"""Path of the browser; "" where there is none."""


def fault() -> str:
    """Says why the browser does not run here, where its sandbox is refused, say; "" if it does."""
    command = [PROGRAM, "--headless", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom"]
    command += ["--no-sandbox"] if os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            run = subprocess.run(
                [*command, f"--user-data-dir={folder}", "about:blank"],
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return "it does not start within two minutes"
    return "" if run.returncode == 0 and "<html>" in run.stdout else run.stderr[-500:]


class Tab:
    """A page in the browser."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket, self.number = socket, 0

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        await self.socket.send_json({"id": self.number, "method": method, "params": params})
        while (answer := await self.socket.receive_json(timeout=60)).get("id") != self.number:
            pass
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    async def js(self, expression: str) -> Any:
        """The value of an expression; what it throws fails the test."""
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def until(self, expression: str, seconds: float = 60) -> Any:
        """Waits for an expression to be true."""
        end = time.monotonic() + seconds
        while not (value := await self.js(expression)):
            assert time.monotonic() < end, f"never true: {expression}"
            await asyncio.sleep(0.05)
        return value

    async def picture(self) -> bytes:
        """A PNG of what is seen."""
        shot = await self.call("Page.captureScreenshot", format="png")
        return base64.b64decode(shot["data"])


class Browser:
    """Opens tabs."""

    def __init__(self, address: str, session: aiohttp.ClientSession) -> None:
        self.address, self.session = address, session

    async def open(self, url: str) -> Tab:
        async with self.session.put(f"http://{self.address}/json/new?{url}") as response:
            tab = await response.json(content_type=None)
        return Tab(await self.session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0))


@asynccontextmanager
async def chromium(width: int = 1280, height: int = 720) -> AsyncIterator[Browser]:
    """A browser of this block's own."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = await asyncio.create_subprocess_exec(
            PROGRAM,
            *("--headless", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
            *("--remote-debugging-port=0", f"--user-data-dir={folder}"),
            f"--window-size={width},{height}",
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            assert process.stderr is not None
            found = None
            while not found:
                line = await asyncio.wait_for(process.stderr.readline(), 60)
                assert line, "Chromium has ended"
                found = re.search(rb"DevTools listening on ws://([^/]+)/", line)
            async with aiohttp.ClientSession() as session:
                yield Browser(found[1].decode(), session)
        finally:
            process.terminate()
            await process.wait()
