"""``ttt-video live``: what it serves, how it ends, what it refuses."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import signal
import socket
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from live_servers import sending, transport_stream
from PIL import Image

from ttt_video.cli import config_of, run_tool
from ttt_video.errors import UserError
from ttt_video.modeling.weights import save_safetensors
from ttt_video_cli import call, live


@pytest.fixture
def flags(tiny_cfg, tiny_model, tmp_path) -> list[str]:
    """--config, --weights and --video-dir of the tiny model and three frames."""
    tiny_cfg.merge_from_list(["TTT.BATCH_SIZE", 1, "TTT.MICRO_BATCH_SIZE", 1])
    config, weights, folder = (
        tmp_path / "tiny.yaml",
        tmp_path / "w.safetensors",
        tmp_path / "street",
    )
    config.write_text(tiny_cfg.dump())
    save_safetensors(tiny_model.state_dict(), str(weights))
    folder.mkdir()
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (48, 64, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    files = {"--config": config, "--weights": weights, "--video-dir": folder, "--output": "out"}
    return [word for flag, path in files.items() for word in (flag, str(path))]


def refused(argv: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as end:
        live.argument_parser("ttt-video live").parse(argv)
    assert end.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        ([], "no video: give --camera N"),
        (["--video", "a.mp4", "--latest"], "--latest is for --camera and --source"),
        (["--world", "--port", "70000"], "--port is 70000"),
        (["--world", "--host", "0.0.0.0"], "give --token, too"),
        (["--world", "--token", "short"], "at least 8 letters"),
        (["--world", "--token", "long enough?"], "at least 8 letters"),
        (["--world", "--camera", "0"], "not allowed with"),
    ],
)
def test_flags_that_do_not_go_together(argv, match, capsys):
    assert match in refused(argv, capsys)


def test_the_commands_of_the_page_are_right():
    page = (Path(__file__).resolve().parents[2] / "docs" / "live.md").read_text(encoding="utf-8")
    shown = re.findall(r"^ttt-video live (.*)$", page, re.M)
    assert len(shown) == 3
    for words in shown:
        live.argument_parser().parse(shlex.split(words))


def test_a_page_shows_one_live_source(flags, tmp_path):
    pytest.importorskip("aiohttp")
    listed = tmp_path / "two.txt"
    part = transport_stream(0, 12)
    with sending(part) as first, sending(part) as second:
        listed.write_text(f"{first}\n{second}\n")
        video = flags.index("--video-dir")
        argv = [*flags[:video], "--source", str(listed), *flags[video + 2 :]]
        with pytest.raises(UserError, match=r"two.txt names 2 sources; a page shows one"):
            call("live", argv)


def test_another_method_has_the_settings_of_the_flags(flags):
    argv = [*flags, "TTT.METHOD", "none", "TTT.WINDOW_SIZE", "2"]
    args = live.argument_parser().parse(argv)
    cfg = config_of(args, args.method)
    assert live.config_of_method(args, cfg, None) is cfg
    other = live.config_of_method(args, cfg, "tent")
    assert (other.TTT.METHOD, other.TTT.WINDOW_SIZE) == ("tent", 2)
    assert other.MODEL.WEIGHTS == cfg.MODEL.WEIGHTS


def test_a_port_that_is_taken_is_one_line(flags):
    pytest.importorskip("aiohttp")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(UserError, match=f"port {port} .*: choose another --port"):
            call("live", [*flags, "--port", port])


def test_without_aiohttp_one_line_says_so(flags, monkeypatch):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.delitem(sys.modules, "ttt_video.live.server", raising=False)
    with pytest.raises(UserError, match="needs aiohttp, which is missing: pip install"):
        call("live", flags)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_a_signal_and_leaves_whole_files(
    flags, tmp_path, monkeypatch, capsys, number
):
    aiohttp = pytest.importorskip("aiohttp")
    monkeypatch.chdir(tmp_path)
    addresses: list[str] = []
    found: dict[str, object] = {}

    async def visit() -> None:
        async with aiohttp.ClientSession() as session:
            async with session.get(addresses[0]) as page:
                found["page"] = page.status
            async with session.ws_connect(addresses[0] + "stream") as socket:
                async for message in socket:
                    told = json.loads(message.data) if isinstance(message.data, str) else {}
                    if told.get("state", {}).get("ended"):
                        break

    def visitor() -> None:
        try:
            asyncio.run(asyncio.wait_for(visit(), 60))
            found["ended"] = True
        finally:
            os.kill(os.getpid(), number)

    def tell(address: str) -> None:
        addresses.append(address)
        threading.Thread(target=visitor, daemon=True).start()

    monkeypatch.setattr(live, "_tell", tell)
    with pytest.raises(SystemExit) as end:
        run_tool(lambda: call("live", [*flags, "--port", "0", "TTT.WINDOW_SIZE", "2"]))
    assert end.value.code == 128 + number
    assert found == {"page": 200, "ended": True}
    assert "Traceback" not in capsys.readouterr().err
    assert not any(t.name == "live stream" and t.is_alive() for t in threading.enumerate())
    assert not (tmp_path / "out").exists()  # nothing was to be saved


@pytest.mark.parametrize(
    ("words", "method"),
    [
        ([], "learn_on_change"),  # of the demo's model, which has its file
        (["--preset", "realtime"], None),
        (["MODEL.WEIGHTS", "mine.pth"], None),
        (["TTT.METHOD", "tent"], None),
        (["--config", "joint_cityscapes.yaml"], None),
    ],
)
def test_the_page_opens_with_the_method_that_the_weights_are_ready_for(words, method):
    args = live.argument_parser().parse_args(["--camera", "0", *words])
    live.choose_config(args)
    assert live._default_method(args) == method
