"""One frame after each gradient step, as in the paper's Figure 3: reconstruction and prediction.

python examples/figure_3.py [FOLDER_OF_FRAMES] [KEY VALUE ...]

figure_3.png shows the first frame of a folder, or of a drawn street in shifted colours. Each line
that is printed has the steps so far, the loss l_s of a mask that stays the same, and of the street
the share of its pixels that are predicted right.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from ttt_video.config import load_config
from ttt_video.data.cityscapes import CITYSCAPES_COLORS
from ttt_video.data.sources import FolderSource, FrameTransform
from ttt_video.stream import Stream, load_source_model
from ttt_video.visualization.grid import picture_grid
from ttt_video.visualization.overlay import colorize, to_rgb
from ttt_video.world import WorldVideo
from ttt_video.world.corruptions import corrupt

arguments = sys.argv[1:]
folder = arguments.pop(0) if arguments and Path(arguments[0]).is_dir() else None
steps = ["TTT.STEPS_PER_FRAME", "20", "TTT.RECORD_STEPS", "True"]
cfg = load_config("quick/stream_world.yaml", opts=[*steps, *arguments])
transform = FrameTransform.from_config(cfg)
labels = None
if folder is None:
    drawn = WorldVideo(2000, 1)[0]
    labels = drawn.sem_seg
    frame = {
        "image": transform(corrupt(drawn.image, "colour_shift", 3.0, 0, 0)),
        "height": labels.shape[0],
        "width": labels.shape[1],
        "video_id": "street",
        "frame_index": 0,
        "file_name": "drawn 0",
    }
else:
    frame = next(iter(FolderSource(folder, transform)))
model = load_source_model(cfg)
rows = []


@torch.no_grad()
def look(frame, output, record):
    """Keeps pictures, and prints numbers, of the model as it is after a step."""
    mask = torch.Generator().manual_seed(0)
    (pictures,) = model.reconstruct([frame], mask)
    loss = model.reconstruction_losses([frame], mask.manual_seed(0))["loss_recon"]
    classes = output["sem_seg"].argmax(0).cpu().numpy()
    right = "" if labels is None else f"{(classes == labels)[labels != 255].mean():.3f}"
    print(len(rows), f"{loss:.4f}", right)
    shown = {"masked input": pictures["masked_input"], "reconstruction": pictures["recon"]}
    rows.append({name: to_rgb(picture, cfg.INPUT.FORMAT) for name, picture in shown.items()})
    rows[-1]["prediction"] = colorize(classes, np.array(CITYSCAPES_COLORS, np.uint8))
    return record


look(frame, model([frame])[0], {})
Stream.from_config(cfg, model, record_step=look).step(frame)
last = len(rows) - 1
picture_grid([rows[i] for i in sorted({0, 1, 2, 5, 10, last}) if i <= last], "figure_3.png")
print("written: figure_3.png")
