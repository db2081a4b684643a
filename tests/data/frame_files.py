"""Pictures, folders and video files that tests read."""

from __future__ import annotations

import threading
from fractions import Fraction

import av
import numpy as np
from PIL import Image

from ttt_video.formats.images import FrameTransform

KEEP = FrameTransform(min_size=0)


def picture(seed: int, height: int = 24, width: int = 40) -> np.ndarray:
    """Smooth, so that lossy codecs keep it, and different for every seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def write_folder(folder, count: int = 4, **size: int):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.fromarray(picture(index, **size)).save(folder / f"frame{index}.png")
    return folder


def write_video(path, count: int = 12, size=(48, 64), codec="libx264", bt709=False):
    options = {"crf": "4"} if codec == "libx264" else {"qscale": "2"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(10), options=options)
        stream.height, stream.width = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if bt709:
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = 1
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(picture(index, *size), format="rgb24")
            frame = frame.reformat(
                format=stream.pix_fmt, dst_colorspace="ITU709" if bt709 else "ITU601"
            )
            frame.pts, frame.time_base = index, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def pixels(frame) -> np.ndarray:
    return frame["image"].permute(1, 2, 0).numpy()


def background_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("frames")]
