"""Streams that tests send over a loopback port."""

from __future__ import annotations

import io
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import av
import numpy as np

HEIGHT, WIDTH = 48, 80


def transport_stream(first: int, count: int) -> bytes:
    """An MPEG transport stream, which can be joined to others; picture i is 2 i grey."""
    content = io.BytesIO()
    with av.open(content, "w", format="mpegts") as container:
        stream = container.add_stream("mpeg2video", rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.max_b_frames = 0
        for index in range(first, first + count):
            pixels = np.full((HEIGHT, WIDTH, 3), 2 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return content.getvalue()


@contextmanager
def sending(*parts: bytes, hold: bool = False) -> Iterator[str]:
    """The URL of a server that sends each client the next part, the last one again and again.

    It ends the connection after it, or with ``hold`` leaves it open and silent.
    """
    server = socket.create_server(("127.0.0.1", 0))
    connections: list[socket.socket] = []

    def serve() -> None:
        waiting = list(parts)
        with suppress(OSError):  # the server is closed
            while True:
                connection, _ = server.accept()
                connections.append(connection)
                with suppress(OSError):  # the client has gone
                    connection.sendall(waiting[0])
                if not hold:
                    connection.close()
                waiting = waiting[1:] or waiting

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"
    finally:
        for opened in (server, *connections):
            with suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)
            opened.close()
