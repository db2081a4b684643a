"""The page in a real Chromium: it shows frames, and its buttons do what they say."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

pytest.importorskip("aiohttp")
import chromium
from aiohttp.test_utils import TestServer

from ttt_video.live.server import LiveServer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not chromium.PROGRAM, reason="needs Chromium (apt-get install chromium)"),
]


def test_the_page_in_two_browsers(studio):
    if fault := chromium.fault():
        pytest.skip(f"Chromium does not run here: {fault}")
    player = studio.player

    async def feed(tab: chromium.Tab) -> None:
        """Lets one frame through and waits until the page shows it."""
        before = int(await tab.js("document.body.dataset.frames || 0"))
        await asyncio.to_thread(studio.next)
        await tab.until(f"document.body.dataset.frames > {before}")

    async def click(tab: chromium.Tab, button: str) -> None:
        await tab.js(f"document.getElementById('{button}').click()")

    async def becomes(wanted: Callable[[], object]) -> None:
        end = time.monotonic() + 30
        while not wanted():
            assert time.monotonic() < end, "a click has no effect"
            await asyncio.sleep(0.02)

    async def choose(tab: chromium.Tab, name: str, value: str) -> None:
        element = f"document.getElementById('{name}')"
        await tab.js(f"{element}.value = '{value}'; {element}.dispatchEvent(new Event('change'))")

    async def play(url: str) -> None:
        player.start()
        async with chromium.chromium() as browser:
            tab, other = await browser.open(url), await browser.open(url)
            for each in (tab, other):
                await each.until("document.querySelector('#method option') !== null")
            await feed(tab)
            pixels = "document.getElementById('{}').toDataURL()"
            first = {name: await tab.js(pixels.format(name)) for name in ("original", "adapted")}
            await feed(tab)
            for name, picture in first.items():
                assert await tab.js(pixels.format(name)) != picture, "frames change"
            assert await tab.js("document.getElementById('where').textContent") == "a, frame 1"
            loss = await tab.js("document.getElementById('value-loss').textContent")
            assert loss == f"{player.history[-1]['loss']:.4f}"
            titles = "[...document.querySelectorAll('figcaption')].map((f) => f.textContent)"
            assert await tab.js(titles) == ["original", "frozen", "online_ttt_mae"]

            await click(tab, "keep")
            await becomes(lambda: player.moments)
            await tab.until("document.getElementById('moments').value === '1'")
            await click(tab, "reset")
            await becomes(lambda: not studio.moved())
            await click(tab, "back")
            await becomes(studio.moved)
            await choose(tab, "step_size", "0.25")
            await becomes(lambda: player.step_size == 0.25)
            await click(tab, "save")
            await becomes(lambda: player.state()["saving"])
            await feed(tab)
            await tab.until("document.getElementById('save').ariaPressed === 'true'")
            await click(tab, "save")
            await becomes(lambda: not player.state()["saving"])
            assert [*(studio.folder / "saved_1" / "masks" / "a").glob("*.png")]
            await click(tab, "learn")
            await becomes(lambda: not player.state()["learning"])
            await other.until("document.getElementById('learn').ariaPressed === 'false'")
            await choose(tab, "method", "tent")
            await becomes(lambda: player.method == "tent")
            await feed(tab)
            assert (await tab.js(titles))[2] == "tent"
            await choose(tab, "step_size", "-1")  # refused, and told
            await tab.until("document.getElementById('told').className === 'bad'")
            await click(tab, "view")
            caption = "document.querySelector('#adapted-box figcaption').textContent"
            assert await tab.js(caption) == "left frozen, right tent"
            await click(tab, "pause")
            await becomes(lambda: player.state()["paused"])
            await tab.until("document.getElementById('pause').ariaPressed === 'true'")
            await click(tab, "pause")
            await becomes(lambda: not player.state()["paused"])

            await tab.call("Page.close")  # the other one goes on
            await feed(other)
            await feed(other)
            assert len(await other.picture()) > 10_000

    async def main() -> None:
        async with TestServer(LiveServer(player).application(), host="127.0.0.1") as server:
            await play(str(server.make_url("/")))

    asyncio.run(asyncio.wait_for(main(), 240))
