"""A metric of your own on a task that is there: IoU weighted by how often classes occur.

python tools/stream_eval.py --register examples/new_metric.py --dataset kitti_step_video_sem_seg_val
python tools/tabulate.py --register examples/new_metric.py --metric fwIoU --layout plain RUN
"""

import math

from ttt_video.tasks import Metric, SemanticTask
from ttt_video.tasks.semantic import class_iou


@SemanticTask.add_metric
class FrequencyWeightedIoU(Metric):
    """Mean IoU that weighs a class by its share of the labelled pixels."""

    name = "fwIoU"
    rule = "IoU of each class over the pixels of all frames pooled; mean weighted by their pixels"
    # Pixels by class: right, predicted but wrong, missed.
    example = ([{"0": [3, 0, 0], "1": [0, 0, 1]}], 75.0)

    def value(self, total):
        pixels = {int(k): right + missed for k, (right, _, missed) in total.items()}
        weighted = [iou * pixels[k] for k, iou in class_iou(total).items()]
        return math.fsum(weighted) / sum(pixels.values()) if weighted else None

    frame = value  # a frame alone has the number too, and so there is a curve
