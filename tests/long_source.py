"""Streams a looped video through ``--source`` and watches memory, frames and files.

python tests/long_source.py bikes.mp4 --frames 10000 --breaks 3 --output output/long -- FLAGS

FLAGS are those of ``ttt-video stream``. FFmpeg, through PyAV, sends the video's own packets lap
after lap over a loopback port, without a pause; the tool's process is watched from outside. With
``--kill SEED`` it is killed once, at a frame that the seed chooses, and goes on with ``--resume``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import av
from processes import python_path

ROOT = Path(__file__).resolve().parents[1]
LOOK = 0.05  # seconds between looks at the run


def pictures_of(video: Path) -> int:
    """Returns how many pictures the video has."""
    with av.open(str(video)) as container:
        return sum(1 for _ in container.decode(video=0))


def send(video: Path, laps: int, connection: socket.socket) -> None:
    """Sends a video ``laps`` times as one MPEG transport stream whose clock runs on."""
    with (
        connection,
        connection.makefile("wb") as pipe,
        av.open(pipe, "w", format="mpegts") as target,
    ):
        stream, clock = None, 0
        for _ in range(laps):
            with av.open(str(video)) as source:
                film = source.streams.video[0]
                stream = stream or target.add_stream_from_template(film)
                packets = [packet for packet in source.demux(film) if packet.dts is not None]
            first = min(packet.dts for packet in packets)
            shown = [packet.pts for packet in packets]
            for packet in packets:
                packet.pts += clock - first
                packet.dts += clock - first
                packet.stream = stream
                target.mux(packet)
            clock += max(shown) - min(shown) + packets[0].duration


@contextmanager
def looped(video: Path, laps: int, breaks: int = 0) -> Iterator[str]:
    """Gives the URL of a server that sends ``laps`` laps, and breaks off ``breaks`` times between.

    Afterwards it refuses connections.
    """
    server = socket.create_server(("127.0.0.1", 0))
    parts = [laps // (breaks + 1)] * breaks
    parts.append(laps - sum(parts))

    def serve() -> None:
        with suppress(OSError):  # the server is closed
            for part in parts:
                connection, _ = server.accept()
                with suppress(OSError):  # the reader is gone
                    send(video, part, connection)
            server.close()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"
    finally:
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        server.close()


def resident(pid: int) -> float:
    """Returns a process's resident memory in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


class Rows:
    """Counts the lines of a file that grows, reading each byte once."""

    def __init__(self, file: Path) -> None:
        self.file, self.read, self.count = file, 0, 0

    def look(self) -> int:
        """Returns how many whole lines there are."""
        with suppress(FileNotFoundError), self.file.open("rb") as file:
            file.seek(self.read)
            new = file.read()
            self.read, self.count = self.read + len(new), self.count + new.count(b"\n")
        return self.count


def start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Starts ``ttt-video stream`` in a process of its own; what it says goes to a file."""
    environment = {**os.environ, "PYTHONPATH": python_path()}
    with log.open("ab") as file:
        command = [sys.executable, "-m", "ttt_video", "stream", *words]
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment)


def watch(
    process: subprocess.Popen[bytes], rows: Rows, saw: Callable[[int], bool] = lambda _: True
) -> int:
    """Calls ``saw`` with each new number of rows; False kills the process at once, and whole.

    Returns:
        The process's exit code.
    """
    last = -1
    while process.poll() is None:
        if rows.look() != last:
            last = rows.count
            if not saw(last):
                process.kill()
                break
        time.sleep(LOOK)
    return process.wait()


def main() -> None:
    """Runs one stream and prints what was seen as lines of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("video", type=Path)
    parser.add_argument("--frames", type=int, required=True, help="a multiple of the video's")
    parser.add_argument("--breaks", type=int, default=0, help="how often the sender breaks off")
    parser.add_argument("--kill", type=int, metavar="SEED", help="kill it once, and go on")
    parser.add_argument("--every", type=int, default=1000, help="frames between looks at memory")
    parser.add_argument("--output", type=Path, required=True)
    own = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    args, flags = parser.parse_args(own), sys.argv[len(own) + 2 :]
    lap = pictures_of(args.video)
    laps, rest = divmod(args.frames, lap)
    if rest:
        parser.error(f"--frames {args.frames}: the video has {lap} pictures; take a multiple")
    started, seen = time.monotonic(), 0
    args.output.mkdir(parents=True)

    kill_at = args.frames + 1  # never
    if args.kill is not None:
        kill_at = random.Random(args.kill).randrange(args.frames // 4, args.frames * 3 // 4)

    def saw(rows: int) -> bool:
        nonlocal seen
        if rows // args.every > seen // args.every or (seen < 100 <= rows):
            seconds = round(time.monotonic() - started)
            facts = {"rows": rows, "seconds": seconds, "mib": round(resident(process.pid), 1)}
            print(json.dumps(facts), flush=True)
        seen = rows
        return rows < kill_at

    run = args.output / "run"
    rows_there = Rows(run / "frames.jsonl")
    # The killed process leaves frames that are gone, so that laps have to be enough for both.
    parts = (laps, args.breaks) if args.kill is None else (2 * laps, 1)
    with looped(args.video, *parts) as url:
        words = ["--source", url, "--max-frames", str(args.frames), "--output", str(run)]
        process = start([*words, *flags], args.output / "log.txt")
        code = watch(process, rows_there, saw)
        if args.kill is not None:
            pictures = {folder.name: len(list(folder.glob("*/*.png"))) for folder in run.iterdir()}
            facts = {name: count for name, count in pictures.items() if count}
            print(json.dumps({"exit": code, "killed at": rows_there.look(), **facts}), flush=True)
            kill_at = args.frames + 1
            process = start([*words, "--resume", *flags], args.output / "log.txt")
            code = watch(process, rows_there, saw)
            summary = json.loads((run / "summary.json").read_text())
            print(json.dumps({"gaps": summary.get("gaps")}))
    rows = [json.loads(line) for line in (run / "frames.jsonl").read_text().splitlines()]
    in_order = [row["frame_index"] for row in rows] == list(range(args.frames))
    print(json.dumps({"exit": code, "rows": len(rows), "every index in order": in_order}))
    for folder in sorted(run.glob("*/*/000000.png")):
        print(json.dumps({folder.parts[-3]: same_laps(folder.parent, args.frames, lap)}))


def same_laps(folder: Path, frames: int, lap: int) -> dict[str, int]:
    """Counts the pictures that are there, and those with the bytes of the same one of lap 0."""
    there = [folder / f"{index:06d}.png" for index in range(frames)]
    same = sum(
        file.is_file() and file.read_bytes() == there[index % lap].read_bytes()
        for index, file in enumerate(there)
    )
    return {"files": sum(file.is_file() for file in there), "same as in lap 0": same}


if __name__ == "__main__":
    main()
