"""A task of your own: is the road ahead free? A yes or no for every frame.

python tools/stream_eval.py --register examples/new_task.py --dataset kitti_step_video_sem_seg_val

Its numbers stand beside those of the built-in tasks in rows, summary, tables and figures, and its
picture takes the place of theirs in the overlay. ``tools/tabulate.py`` and ``tools/plot_run.py``
need the same ``--register``.
"""

import numpy as np

from ttt_video.formats.labels import read_sem_seg
from ttt_video.tasks import TASK_REGISTRY, Metric, Task, once
from ttt_video.tasks.outputs import class_map

TRAFFIC = range(11, 19)  # Cityscapes' people and vehicles


def is_free(classes):
    """Whether nobody is in the lower middle of an (H, W) class map, where the road should be."""
    height, width = classes.shape
    return not np.isin(classes[height // 2 :, width // 3 : -width // 3], TRAFFIC).any()


@TASK_REGISTRY.register()
class FreeRoad(Task):
    """Reads semantic labels and predictions; a record counts the frames that are judged right."""

    name = "free_road"
    label_keys = ("sem_seg_file_name",)
    output_keys = ("sem_seg",)
    evaluator_types = ("sem_seg", "video_sem_seg")  # the data sets that it is scored on
    headline = "free_road_accuracy"
    picture_rank = 2  # above all built-in ones

    def _record(self, frame, output):
        says, is_so = is_free(once(class_map, output)), is_free(once(read_sem_seg, frame))
        return {"right": int(says == is_so), "frames": 1}

    @classmethod
    def painter(cls, output, metadata):
        """Tints the frame: green where the road is free, else red."""
        color = (0, 160, 0) if is_free(class_map(output)) else (200, 0, 0)
        return lambda image: (image // 2 + np.array(color, np.uint8) // 2).astype(np.uint8)


@FreeRoad.add_metric
class FreeRoadAccuracy(Metric):
    """The share of right answers."""

    name = "free_road_accuracy"
    rule = "share of the labelled frames for which prediction and labels agree on a free road"
    example = ([{"right": 1, "frames": 1}, {"right": 0, "frames": 1}], 50.0)

    def value(self, total):
        return 100 * total["right"] / total["frames"]

    frame = value  # a frame alone has the number too, and so there is a curve
