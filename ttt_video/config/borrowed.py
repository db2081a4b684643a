"""Keys of other projects with their names and defaults, so that their configs merge unchanged."""

from __future__ import annotations

from detectron2.config import CfgNode


def mask2former_defaults() -> CfgNode:
    """Returns the keys and defaults of Mask2Former's ``add_maskformer2_config``."""
    cfg = CfgNode()

    cfg.INPUT = CfgNode()
    cfg.INPUT.DATASET_MAPPER_NAME = "mask_former_semantic"
    cfg.INPUT.COLOR_AUG_SSD = False  # SSD's colour jitter in training
    cfg.INPUT.SIZE_DIVISIBILITY = -1  # pad training crops to a multiple of this; -1: off
    cfg.INPUT.IMAGE_SIZE = 1024  # px, side of the large-scale-jitter crop
    cfg.INPUT.MIN_SCALE = 0.1  # large-scale jitter, relative to IMAGE_SIZE
    cfg.INPUT.MAX_SCALE = 2.0
    cfg.INPUT.CROP = CfgNode()
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 1.0  # redraw crops that one class fills beyond this

    cfg.SOLVER = CfgNode()
    cfg.SOLVER.WEIGHT_DECAY_EMBED = 0.0
    cfg.SOLVER.OPTIMIZER = "ADAMW"
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1  # learning rate of the backbone, relative to BASE_LR

    cfg.MODEL = CfgNode()
    former = cfg.MODEL.MASK_FORMER = CfgNode()
    former.DEEP_SUPERVISION = True
    former.NO_OBJECT_WEIGHT = 0.1
    former.CLASS_WEIGHT = 1.0
    former.DICE_WEIGHT = 1.0
    former.MASK_WEIGHT = 20.0
    former.NHEADS = 8
    former.DROPOUT = 0.1
    former.DIM_FEEDFORWARD = 2048
    former.ENC_LAYERS = 0
    former.DEC_LAYERS = 6  # number of supervised predictions: decoder layers + 1
    former.PRE_NORM = False
    former.HIDDEN_DIM = 256
    former.NUM_OBJECT_QUERIES = 100
    former.TRANSFORMER_IN_FEATURE = "res5"
    former.ENFORCE_INPUT_PROJ = False
    former.SIZE_DIVISIBILITY = 32  # px; images are zero-padded to a multiple of this
    former.TRANSFORMER_DECODER_NAME = "MultiScaleMaskedTransformerDecoder"
    former.TRAIN_NUM_POINTS = 112 * 112  # points per mask in the mask losses
    former.OVERSAMPLE_RATIO = 3.0
    former.IMPORTANCE_SAMPLE_RATIO = 0.75
    former.TEST = CfgNode()
    former.TEST.SEMANTIC_ON = True
    former.TEST.INSTANCE_ON = False
    former.TEST.PANOPTIC_ON = False
    former.TEST.OBJECT_MASK_THRESHOLD = 0.0
    former.TEST.OVERLAP_THRESHOLD = 0.0
    former.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE = False

    head = cfg.MODEL.SEM_SEG_HEAD = CfgNode()
    head.MASK_DIM = 256
    head.TRANSFORMER_ENC_LAYERS = 0
    # The one other default: Mask2Former's is an FPN decoder, which none of its configs uses.
    head.PIXEL_DECODER_NAME = "MSDeformAttnPixelDecoder"
    head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES = ["res3", "res4", "res5"]
    head.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS = 4
    head.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS = 8

    swin = cfg.MODEL.SWIN = CfgNode()
    swin.PRETRAIN_IMG_SIZE = 224
    swin.PATCH_SIZE = 4
    swin.EMBED_DIM = 96
    swin.DEPTHS = [2, 2, 6, 2]
    swin.NUM_HEADS = [3, 6, 12, 24]
    swin.WINDOW_SIZE = 7
    swin.MLP_RATIO = 4.0
    swin.QKV_BIAS = True
    swin.QK_SCALE = None
    swin.DROP_RATE = 0.0
    swin.ATTN_DROP_RATE = 0.0
    swin.DROP_PATH_RATE = 0.3
    swin.APE = False
    swin.PATCH_NORM = True
    swin.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    swin.USE_CHECKPOINT = False
    return cfg


def baseline_defaults() -> CfgNode:
    """Returns the keys of DeepLabV3+ and SegFormer.

    All keys of detectron2's DeepLab project are here, read or not, because every whole config that
    Mask2Former writes has them.
    """
    cfg = CfgNode()
    cfg.MODEL = CfgNode()
    # Mask2Former's base configs set the first two, too.
    resnets = cfg.MODEL.RESNETS = CfgNode()
    resnets.STEM_TYPE = "deeplab"
    resnets.RES5_MULTI_GRID = [1, 2, 4]
    resnets.RES4_DILATION = 1
    head = cfg.MODEL.SEM_SEG_HEAD = CfgNode()
    head.LOSS_TYPE = "hard_pixel_mining"
    head.PROJECT_FEATURES = ["res2"]
    head.PROJECT_CHANNELS = [48]
    head.ASPP_CHANNELS = 256
    head.ASPP_DILATIONS = [6, 12, 18]
    head.ASPP_DROPOUT = 0.1
    head.USE_DEPTHWISE_SEPARABLE_CONV = False

    segformer = cfg.MODEL.SEGFORMER = CfgNode()  # defaults: B4
    segformer.HIDDEN_SIZES = [64, 128, 320, 512]
    segformer.DEPTHS = [3, 8, 27, 3]
    segformer.NUM_HEADS = [1, 2, 5, 8]
    segformer.DECODER_DIM = 768
    return cfg
