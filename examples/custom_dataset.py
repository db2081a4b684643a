"""Train on a data set of your own in COCO's format, then predict.

python custom_dataset.py IMAGE_DIR ANNOTATIONS.json [KEY VALUE ...]
"""

import sys

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor, DefaultTrainer

from ttt_video.config import load_config

image_dir, annotations, *overrides = sys.argv[1:]
register_coco_instances("mine", {}, annotations, image_dir)

cfg = load_config("quick/joint_coco_instance.yaml", opts=overrides)
cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("mine",), ()
cfg.MODEL.MASK_ON = True  # detectron2's own mapper drops masks otherwise
cfg.INPUT.MASK_FORMAT = "bitmask"  # of polygons and of run lengths (RLE) alike
# detectron2's own trainer knows neither Mask2Former's clipping nor its schedule.
cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "norm"
cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupCosineLR"

trainer = DefaultTrainer(cfg)
trainer.resume_or_load(resume=False)
trainer.train()

cfg.MODEL.WEIGHTS = f"{cfg.OUTPUT_DIR}/model_final.pth"
predictor = DefaultPredictor(cfg)
names = MetadataCatalog.get("mine").thing_classes
for record in DatasetCatalog.get("mine"):
    instances = predictor(read_image(record["file_name"], "BGR"))["instances"]
    best = instances.scores.argmax()
    name, score = names[instances.pred_classes[best]], instances.scores[best]
    print(f"{record['file_name']}: {name} {score:.2f}, {instances.pred_masks[best].sum():.0f} px")
