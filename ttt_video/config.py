"""Every configuration key of the project, with its unit and its choices.

``MODEL.MASK_FORMER.*``, ``MODEL.SEM_SEG_HEAD.*``, ``MODEL.SWIN.*`` and the ``INPUT`` / ``SOLVER``
additions are Mask2Former's keys with Mask2Former's names and defaults, so that its configs merge
unchanged. One default differs: ``MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME`` is the decoder of all its
configs, not the FPN decoder of its code, which is not here. ``TTT.*`` is ours.
:func:`add_ttt_config` works alone and on top of Mask2Former's own ``add_maskformer2_config``: keys
that are already there are left as they are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.config import get_cfg as detectron2_cfg

from .errors import UserError

CHOICES: dict[str, tuple[Any, ...]] = {
    "SOLVER.AMP.PRECISION": ("auto", "bf16", "fp16"),
    "TTT.JOINT": ("joint", "main_only", "probing"),
    "TTT.RECON.REGION": ("masked", "visible", "all"),
    "TTT.SAMPLING": ("with_replacement", "shuffled_epochs", "without_replacement"),
    "TTT.RESET": ("video", "frame", "never"),
    "TTT.PREDICT": ("after", "before"),
    "TTT.FRAME_ORDER": ("time", "shuffled"),
    "TTT.PARAMETERS": ("all", "norm", "matrices"),
    "TTT.STEP_MODE": ("train", "eval"),
    "TTT.PRECISION": ("fp32", "bf16", "fp16"),
    "TTT.OPTIMIZER.NAME": ("SGD", "ADAMW"),
}
"""Keys with a closed set of values; checked by :func:`validate_config`."""


Rules = Mapping[str, tuple[Callable[[Any], bool], str]]
"""By key: whether a value can work, and what it must be, in words."""

_DECLARED: dict[str, tuple[Mapping[str, Any], Rules]] = {}


def declare_keys(section: str, defaults: Mapping[str, Any], rules: Rules | None = None) -> None:
    """Adds the keys ``TTT.<section>.*`` to every config that is built from now on.

    A file of ``--register`` calls it for the keys of its method, model or mask.

    Args:
        section: in capitals, such as the method's name.
        defaults: values by key, whose types overrides must have.
        rules: that values must keep; :func:`validate_config` checks them.
    """
    _DECLARED[section] = (defaults, rules or {})


def _mask2former_defaults() -> CfgNode:
    """Mask2Former's keys and defaults, those of its ``add_maskformer2_config``."""
    cfg = CfgNode()

    cfg.INPUT = CfgNode()
    cfg.INPUT.DATASET_MAPPER_NAME = "mask_former_semantic"
    cfg.INPUT.COLOR_AUG_SSD = False  # SSD's colour jitter in training
    cfg.INPUT.SIZE_DIVISIBILITY = -1  # pad training crops to a multiple of this; -1: do not
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
    # Mask2Former's default names its FPN decoder, which none of its configs uses.
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


def _baseline_defaults() -> CfgNode:
    """Keys of other architectures: DeepLabV3+ and SegFormer.

    Those of detectron2's DeepLab project are all here, read or not, because they stand in every
    whole config that Mask2Former writes.
    """
    cfg = CfgNode()
    cfg.MODEL = CfgNode()
    # Mask2Former's base configs set the first two as well.
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


def _ttt_defaults() -> CfgNode:
    """The keys this project adds."""
    cfg = CfgNode()
    cfg.SOLVER = CfgNode()
    # Images per forward and backward of joint training; the gradients of a batch accumulate. 0 =
    # each process's share of IMS_PER_BATCH at once.
    cfg.SOLVER.MICRO_BATCH_SIZE = 0
    # Training may start from random weights where MODEL.WEIGHTS is empty (train_net.py's
    # --from-scratch). False: no weights are a mistake.
    cfg.SOLVER.FROM_SCRATCH = False
    cfg.SOLVER.AMP = CfgNode()
    # Of mixed precision, where SOLVER.AMP.ENABLED: "bf16", "fp16" (which scales the loss), or
    # "auto": bf16, but fp16 on GPUs before Ampere.
    cfg.SOLVER.AMP.PRECISION = "auto"
    # WarmupPolyLR's exponent and least factor on the learning rate; names and values of DeepLab's.
    cfg.SOLVER.POLY_LR_POWER = 0.9
    cfg.SOLVER.POLY_LR_CONSTANT_ENDING = 0.0
    cfg.MODEL = CfgNode()
    cfg.MODEL.SWIN = CfgNode()
    cfg.MODEL.SWIN.IN_CHANS = 4  # RGB and the visibility channel (1 = visible, 0 = masked)
    cfg.MODEL.SEM_SEG_HEAD = CfgNode()
    # Width of the pixel decoder's feed-forward layers; Mask2Former fixes it at 1024.
    cfg.MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_DIM_FEEDFORWARD = 1024

    ttt = cfg.TTT = CfgNode()
    # Name of the preset merged last ("paper", "release", "realtime"), recorded with every result.
    ttt.PRESET = ""
    # Which losses train the model: "joint" (main task + reconstruction, Section 4.1), "main_only",
    # "probing" (f and g frozen, only the head h learns, Section 3).
    ttt.JOINT = "joint"
    # Training may start from MODEL.WEIGHTS with other classes than MODEL.SEM_SEG_HEAD.NUM_CLASSES;
    # the class layer is then new. False: such weights are a mistake.
    ttt.NEW_CLASSES = False

    # --- masking and reconstruction (training and test time) ---
    ttt.MASK_RATIO = 0.8  # share of patches hidden, in [0, 1)
    ttt.MASK_PATCH_SIZE = 16  # px
    # A name in ttt_video.modeling.MASK_KINDS: "random" patches, each by itself; "block",
    # rectangles of patches.
    ttt.MASK_KIND = "random"
    ttt.RECON = CfgNode()
    ttt.RECON.WEIGHT = 1.0  # factor on loss_recon in joint training
    ttt.RECON.REGION = "masked"  # pixels that count: "masked", "visible", "all" (padding too)
    # Normalise each target patch (MASK_PATCH_SIZE) to zero mean and unit variance, as in MAE.
    ttt.RECON.NORMALIZE_TARGET = False
    # Where MODEL.WEIGHTS has no g, training starts g from h's weights. False: from random ones.
    ttt.RECON.INIT_FROM_MAIN = False
    # Training steps between reconstruction pictures; 0 = none, -1 = with every evaluation.
    ttt.RECON.PICTURE_PERIOD = -1

    # --- test-time training ---
    ttt.METHOD = "online_ttt_mae"  # a name in ttt_video.adaptation.ADAPTER_REGISTRY
    # TTT.* keys that a config file has for single methods, by name: what suits the loss of one does
    # not suit another's. Those of the selected method count as the file's; cli.load_config merges
    # them, and leaves none here.
    ttt.BY_METHOD = CfgNode(new_allowed=True)
    ttt.WINDOW_SIZE = 16  # frames of explicit memory k, the current one included; 0 = unbounded
    ttt.BATCH_SIZE = 32  # samples per gradient step
    ttt.MICRO_BATCH_SIZE = 8  # samples per forward and backward; gradients accumulate
    ttt.STEPS_PER_FRAME = 1  # gradient steps of one update
    ttt.UPDATE_EVERY = 1  # frames: update at the first frame of a video and every n-th after it
    # ms from one frame of a camera to the next: the loop keeps up by steps on fewer samples, or
    # none; every frame is predicted. 0 = no budget. With one, numbers depend on how fast the
    # machine is at each moment, and no run repeats another bit for bit.
    ttt.FRAME_BUDGET_MS = 0
    ttt.PREDICT = "after"  # predict a frame "after" the update it takes part in, or "before"
    # "time", or "shuffled": each video's frames in an order that SEED and the video decide, so that
    # neighbours in the stream no longer look alike (Section 6.1, "Temporal smoothness").
    ttt.FRAME_ORDER = "time"
    # "with_replacement" (Section 4.2); "shuffled_epochs": whole shuffled passes over the window;
    # "without_replacement": each frame of the window at most once, for losses without randomness.
    ttt.SAMPLING = "with_replacement"
    # Submodules of the model that move, by name or by part ("f", "g", "h"), such as
    # ["backbone.layers.3"] or ["f", "g"]; [] = those of the method.
    ttt.MODULES = []
    # Which of their parameters: "all"; "norm", those of normalisation layers; "matrices", those
    # that multiply: no biases, norms, queries and position tables.
    ttt.PARAMETERS = "all"
    # When to return to the source weights (f0, g0) and a fresh optimizer.
    ttt.RESET = "video"
    # "train": stochastic depth and dropout on in the step; predictions are always in eval mode.
    ttt.STEP_MODE = "eval"
    ttt.PRECISION = "fp32"  # of the step; predictions are fp32
    ttt.OPTIMIZER = CfgNode()
    ttt.OPTIMIZER.NAME = "SGD"
    ttt.OPTIMIZER.BASE_LR = 0.01
    ttt.OPTIMIZER.MOMENTUM = 0.0  # SGD
    ttt.OPTIMIZER.BETAS = [0.9, 0.999]  # AdamW
    ttt.OPTIMIZER.WEIGHT_DECAY = 0.0  # never applied to norms, embeddings and position biases
    ttt.OPTIMIZER.BACKBONE_MULTIPLIER = 1.0  # learning rate of f, relative to BASE_LR
    ttt.OPTIMIZER.CLIP_NORM = 0.0  # L2 norm of the whole gradient; 0 = no clipping
    ttt.OPTIMIZER.RESTART = False  # forget the optimizer's state after every frame
    # A step is undone if the loss on its own batch and masks is more than so many times as large
    # after it; 0 = no step is. It is looked at after steps that are suspiciously large only.
    ttt.OPTIMIZER.MAX_LOSS_GROWTH = 3.0
    # After every step the weights move this share of the way back to the source weights; 0 = none.
    # Continual weight ensembling, Marsden et al., WACV 2024 (not in the paper).
    ttt.OPTIMIZER.SOURCE_PULL = 0.0
    # File of tools/measure_gradients.py: how large each parameter tensor's gradient is on training
    # images. Gradients are divided by it, so that a step is as large as the images are unlike
    # those, and BASE_LR is in units of the weights (not in the paper). For SGD: AdamW has a scale
    # of its own.
    ttt.OPTIMIZER.SOURCE_GRADIENTS = ""
    # Augmentation of a sampled frame before it is masked. Sizes in px at network resolution.
    ttt.CROP = CfgNode()
    ttt.CROP.RESIZE = 1.0  # of the frame's sides before the crop; 0.5: a quarter of the pixels
    ttt.CROP.SIZE = []  # [height, width] of a random crop; [] = the whole frame
    ttt.CROP.FLIP = False  # mirror left-right with probability 1/2
    # Large-scale jitter: resize to SCALE * CROP.SIZE before the crop; [] = off. Short crops are
    # padded with 128, as detectron2's FixedSizeCrop does.
    ttt.CROP.SCALE_RANGE = []
    # Methods that only some of these concern; each has its page in docs/methods/.
    ttt.OFFLINE = CfgNode()
    ttt.OFFLINE.STEPS = 1000  # gradient steps on the whole video before its first prediction
    ttt.OFFLINE.EVAL_EVERY = 100  # offline_ttt_mae_oracle: steps between two looks at the labels
    # offline_ttt_mae_oracle: the source weights, step 0, are a candidate, too (not in the paper).
    ttt.OFFLINE.ALLOW_ZERO = False
    ttt.LN_ADAPT = CfgNode()
    # File of tools/measure_norm_statistics.py: what the layers gave on the training images.
    ttt.LN_ADAPT.SOURCE_STATISTICS = ""
    ttt.LN_ADAPT.PRIOR = 16.0  # frames that the source statistics weigh as much as
    ttt.LINE_SEARCH = CfgNode()
    # How far along the adaptation a prediction may go: 0 = the frozen model, 1 = the adapted one.
    ttt.LINE_SEARCH.SCALES = [0.0, 0.25, 0.5, 1.0, 2.0, 3.0]
    ttt.LINE_SEARCH.EVERY = 5  # updates from one search to the next
    ttt.LINE_SEARCH.DECAY = 0.5  # weight of the searches before, in [0, 1)
    ttt.SELF_TRAIN = CfgNode()
    ttt.SELF_TRAIN.THRESHOLD = 0.9  # lambda: confidence above which a prediction is a label
    ttt.CLASS_BALANCE = CfgNode()
    # Reset when the numbers of predicted classes, of the current and the source weights, differ by
    # more than this.
    ttt.CLASS_BALANCE.THRESHOLD = 2
    # Methods that combine predictions: majority_vote and temporal_smoothing.
    ttt.ENSEMBLE = CfgNode()
    ttt.ENSEMBLE.METHOD = "none"  # the method whose predictions are combined
    ttt.ENSEMBLE.PREDICTIONS = 100  # votes per frame, the first of the frame as it is
    ttt.ENSEMBLE.SCALE_RANGE = [0.5, 2.0]  # of augmented copies, relative to the network's input
    ttt.ENSEMBLE.FLIP = True  # mirror augmented copies with probability 1/2
    ttt.ENSEMBLE.COLOR = True  # SSD's colour jitter of augmented copies
    ttt.ENSEMBLE.WINDOW_SIZE = 4  # frames whose predictions are averaged, the current one included
    for section, (keys, _) in _DECLARED.items():
        ttt[section] = CfgNode(copy.deepcopy(dict(keys)))
    return cfg


def _merge_missing(cfg: CfgNode, defaults: CfgNode) -> None:
    for key, value in defaults.items():
        if key not in cfg:
            cfg[key] = value
        elif isinstance(value, CfgNode):
            _merge_missing(cfg[key], value)


def add_ttt_config(cfg: CfgNode) -> None:
    """Adds Mask2Former's keys (where missing) and this project's keys to ``cfg``, in place."""
    _merge_missing(cfg, _mask2former_defaults())
    _merge_missing(cfg, _baseline_defaults())
    _merge_missing(cfg, _ttt_defaults())


def get_cfg() -> CfgNode:
    """detectron2's default config with the keys of this project."""
    cfg = detectron2_cfg()
    add_ttt_config(cfg)
    return cfg


def _lookup(cfg: CfgNode, dotted: str) -> Any:
    for part in dotted.split("."):
        cfg = cfg[part]
    return cfg


def validate_config(cfg: CfgNode) -> None:
    """Raises :class:`UserError` for the first key whose value cannot work, with the fix."""
    for key, choices in CHOICES.items():
        value = _lookup(cfg, key)
        if value not in choices:
            raise UserError(f"{key} is {value!r}; choose one of {', '.join(map(repr, choices))}")

    def require(condition: bool, key: str, rule: str) -> None:
        if not condition:
            raise UserError(f"{key} is {_lookup(cfg, key)!r}; it must be {rule}")

    ttt = cfg.TTT
    for section, (_, rules) in _DECLARED.items():
        for key, (works, rule) in rules.items():
            require(works(ttt[section][key]), f"TTT.{section}.{key}", rule)
    require(cfg.SOLVER.MICRO_BATCH_SIZE >= 0, "SOLVER.MICRO_BATCH_SIZE", "a number of images, or 0")
    require(cfg.SOLVER.POLY_LR_POWER >= 0, "SOLVER.POLY_LR_POWER", "at least 0")
    require(ttt.RECON.PICTURE_PERIOD >= -1, "TTT.RECON.PICTURE_PERIOD", "a number of steps, 0, -1")
    require(0.0 <= ttt.MASK_RATIO < 1.0, "TTT.MASK_RATIO", "in [0, 1), the share of hidden patches")
    require(
        ttt.MASK_PATCH_SIZE >= 1 and ttt.MASK_PATCH_SIZE % 4 == 0,
        "TTT.MASK_PATCH_SIZE",
        "a positive multiple of 4 px, the reconstruction's own patch",
    )
    require(ttt.WINDOW_SIZE >= 0, "TTT.WINDOW_SIZE", "a number of frames, or 0 for no limit")
    for key in ("BATCH_SIZE", "MICRO_BATCH_SIZE", "STEPS_PER_FRAME", "UPDATE_EVERY"):
        require(ttt[key] >= 1, f"TTT.{key}", "at least 1")
    require(
        ttt.PREDICT == "after" or ttt.RESET != "frame",
        "TTT.PREDICT",
        "'after' where TTT.RESET is 'frame': before the update every frame has the source weights",
    )
    require(
        ttt.UPDATE_EVERY == 1 or ttt.RESET != "frame",
        "TTT.UPDATE_EVERY",
        "1 where TTT.RESET is 'frame': the frames between two updates have the source weights",
    )
    require(
        ttt.FRAME_BUDGET_MS >= 0, "TTT.FRAME_BUDGET_MS", "a number of milliseconds, or 0 for none"
    )
    require(
        ttt.FRAME_BUDGET_MS == 0 or ttt.RESET != "frame",
        "TTT.FRAME_BUDGET_MS",
        "0 where TTT.RESET is 'frame': a frame whose update is skipped has the source weights",
    )
    require(ttt.OFFLINE.STEPS >= 1, "TTT.OFFLINE.STEPS", "at least 1")
    require(ttt.OFFLINE.EVAL_EVERY >= 1, "TTT.OFFLINE.EVAL_EVERY", "at least 1")
    require(ttt.LN_ADAPT.PRIOR >= 0, "TTT.LN_ADAPT.PRIOR", "a number of frames, at least 0")
    require(
        len(ttt.LINE_SEARCH.SCALES) > 0
        and all(0 <= scale < math.inf for scale in ttt.LINE_SEARCH.SCALES),
        "TTT.LINE_SEARCH.SCALES",
        "a list of factors on the adaptation, at least one and none negative",
    )
    require(ttt.LINE_SEARCH.EVERY >= 1, "TTT.LINE_SEARCH.EVERY", "at least 1")
    require(0 <= ttt.LINE_SEARCH.DECAY < 1, "TTT.LINE_SEARCH.DECAY", "in [0, 1)")
    require(0 <= ttt.SELF_TRAIN.THRESHOLD <= 1, "TTT.SELF_TRAIN.THRESHOLD", "in [0, 1]")
    require(ttt.CLASS_BALANCE.THRESHOLD >= 0, "TTT.CLASS_BALANCE.THRESHOLD", "at least 0")
    require(ttt.OPTIMIZER.BASE_LR >= 0, "TTT.OPTIMIZER.BASE_LR", "at least 0")
    require(0 <= ttt.OPTIMIZER.SOURCE_PULL <= 1, "TTT.OPTIMIZER.SOURCE_PULL", "in [0, 1]")
    require(
        not ttt.OPTIMIZER.SOURCE_GRADIENTS or ttt.OPTIMIZER.NAME == "SGD",
        "TTT.OPTIMIZER.SOURCE_GRADIENTS",
        "'' where TTT.OPTIMIZER.NAME is ADAMW, which undoes any scale of the gradient",
    )
    require(ttt.OPTIMIZER.CLIP_NORM >= 0, "TTT.OPTIMIZER.CLIP_NORM", "at least 0 (0 = no clipping)")
    growth = ttt.OPTIMIZER.MAX_LOSS_GROWTH
    require(
        growth == 0 or 1 <= growth < math.inf,
        "TTT.OPTIMIZER.MAX_LOSS_GROWTH",
        "a factor of at least 1, or 0 for no limit",
    )
    require(ttt.CROP.RESIZE > 0, "TTT.CROP.RESIZE", "above 0, a factor on a frame's sides")
    require(
        len(ttt.CROP.SIZE) in (0, 2) and all(side >= 1 for side in ttt.CROP.SIZE),
        "TTT.CROP.SIZE",
        "[] for whole frames, or [height, width] in px",
    )
    scales = ttt.CROP.SCALE_RANGE
    require(
        len(scales) == 0 or (len(scales) == 2 and 0 < scales[0] <= scales[1] and ttt.CROP.SIZE),
        "TTT.CROP.SCALE_RANGE",
        "[] or [low, high] with 0 < low <= high, and needs TTT.CROP.SIZE",
    )
    ensemble = ttt.ENSEMBLE
    for key in ("PREDICTIONS", "WINDOW_SIZE"):
        require(ensemble[key] >= 1, f"TTT.ENSEMBLE.{key}", "at least 1")
    low_high = ensemble.SCALE_RANGE
    require(
        len(low_high) == 2 and 0 < low_high[0] <= low_high[1],
        "TTT.ENSEMBLE.SCALE_RANGE",
        "[low, high] with 0 < low <= high",
    )
