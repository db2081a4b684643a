"""A stream in plain Python: the shipped small model learns from a video while it predicts it.

python examples/plain_stream.py [FOLDER_OF_FRAMES] [KEY VALUE ...]

Without a folder the video is a drawn street. No files are written; tools/stream_eval.py keeps rows,
scores and an overlay.
"""

import sys
from pathlib import Path

from ttt_video.config import load_config
from ttt_video.data import BaseSource
from ttt_video.data.cityscapes import CITYSCAPES_CLASSES
from ttt_video.data.sources import FolderSource, FrameTransform
from ttt_video.stream import Stream, load_source_model
from ttt_video.world import WorldVideo


class DrawnStreet(BaseSource):
    """A source of your own: a name, and frames as often as they are asked for."""

    video_id, num_frames = "street", 5

    def __iter__(self):
        for index, drawn in enumerate(WorldVideo(2000, self.num_frames, 64, 128)):
            yield {
                "image": transform(drawn.image),
                "height": 64,
                "width": 128,
                "video_id": self.video_id,
                "frame_index": index,
                "file_name": f"drawn {index}",
            }


arguments = sys.argv[1:]
folder = arguments.pop(0) if arguments and Path(arguments[0]).is_dir() else None
cfg = load_config("quick/stream_world.yaml", opts=arguments)
transform = FrameTransform.from_config(cfg)
source = DrawnStreet() if folder is None else FolderSource(folder, transform)
stream = Stream.from_config(cfg, load_source_model(cfg))
for result in stream.run(source):
    counts = result.output["sem_seg"].argmax(0).flatten().bincount(minlength=19).tolist()
    seen = {name: n for name, n in zip(CITYSCAPES_CLASSES, counts, strict=True) if n}
    print(result.frame["frame_index"], f"{result.record['loss_recon']:.4f}", seen)
