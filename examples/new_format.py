"""A format of your own for saved predictions: label maps that ``numpy.load`` reads.

python tools/stream_eval.py --register examples/new_format.py --video street.mp4 --save masks,npy
"""

from functools import partial

import numpy as np

from ttt_video.files import write_atomically
from ttt_video.stream.saving import FORMAT_REGISTRY, Format
from ttt_video.tasks.outputs import class_map


@FORMAT_REGISTRY.register()
class Npy(Format):
    """``NAME.npy``: (H, W) int16 class ids, -1 for none."""

    name = "npy"

    def __init__(self, predicted):
        predicted.need(self.name, "sem_seg", "panoptic_seg", fix="its pixels have no class")
        super().__init__(predicted)

    def frame(self, frame, output):
        path = self.place.folder / f"{self.place.stems(frame)}.npy"
        return partial(write_atomically, path, partial(_write, classes=class_map(output)))


def _write(part, classes):
    with part.open("wb") as file:
        np.save(file, classes)
