"""Every configuration key of this project, with its unit, its choices and what it must be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from detectron2.config import CfgNode


class Rule(NamedTuple):
    """A rule for a value: a test of it in its config, and the rule in words."""

    holds: Callable[[Any, CfgNode], bool]
    words: str


AUTO = "auto"
"""The value of a key that leaves a number to the run."""


class Key:
    """A configuration key: its default, its choices if they are few, and its rules.

    ``auto`` says that :data:`AUTO` may stand for a number; the rules are not asked then. ``file``
    says that the value names a file, whose content the numbers depend on; "" and :data:`AUTO` name
    none.
    """

    def __init__(
        self,
        default: Any,
        *rules: Rule,
        choices: tuple[Any, ...] = (),
        auto: bool = False,
        file: bool = False,
    ) -> None:
        self.default = default
        self.rules = rules
        self.choices = choices
        self.auto = auto
        self.file = file


def at_least(least: float, words: str = "") -> Rule:
    """Returns the rule that a value is ``least`` or more, and finite."""
    return Rule(lambda value, cfg: least <= value < math.inf, words or f"at least {least}")


def must_be(words: str, holds: Callable[[Any], bool]) -> Rule:
    """Returns a rule about the value alone."""
    return Rule(lambda value, cfg: holds(value), words)


def _is_rate_or_none(value: Any) -> bool:
    return value == 0 or 1e-3 <= value <= 1e5


def _is_whole_range(value: Any) -> bool:
    return _is_range(value) and all(type(x) is int for x in value)


def _is_range(value: Any) -> bool:
    return len(value) == 2 and 0 < value[0] <= value[1]


def _all_numbers(values: Any, holds: Callable[[float], bool] = lambda number: True) -> bool:
    return all(isinstance(v, int | float) and math.isfinite(v) and holds(v) for v in values)


_SHARES = must_be("a list of shares in (0, 1]", lambda v: _all_numbers(v, lambda x: 0 < x <= 1))
_ABOVE_0 = must_be("above 0", lambda value: 0 < value < math.inf)
_SHARE = must_be("a share in [0, 1)", lambda value: 0 <= value < 1)
_BETAS = must_be(
    "two shares in [0, 1)",
    lambda value: len(value) == 2 and _all_numbers(value, lambda x: 0 <= x < 1),
)


def _if_frames_reset(needed: Any, because: str) -> Rule:
    return Rule(
        lambda value, cfg: value == needed or cfg.TTT.RESET != "frame",
        f"{needed!r} where TTT.RESET is 'frame': {because}",
    )


# These keys belong to a model, its weights and their training. Presets leave them alone.
MODEL: Mapping[str, Key] = {
    # Images per forward and backward of joint training, whose gradients accumulate; 0 = each
    # process's share of IMS_PER_BATCH at once.
    "SOLVER.MICRO_BATCH_SIZE": Key(0, at_least(0, "a number of images, or 0")),
    # True: training starts from random weights if MODEL.WEIGHTS is empty (--from-scratch of
    # train_net.py). False: an empty MODEL.WEIGHTS is a mistake.
    "SOLVER.FROM_SCRATCH": Key(False),
    # Precision where SOLVER.AMP.ENABLED: "fp16" scales the loss; "auto" is bf16, but fp16 on GPUs
    # before Ampere.
    "SOLVER.AMP.PRECISION": Key("auto", choices=("auto", "bf16", "fp16")),
    # Exponent and least factor of WarmupPolyLR, with DeepLab's names and values.
    "SOLVER.POLY_LR_POWER": Key(0.9, at_least(0)),
    "SOLVER.POLY_LR_CONSTANT_ENDING": Key(0.0),
    "MODEL.SWIN.IN_CHANS": Key(4),  # RGB and the visibility channel (1 = visible, 0 = masked)
    # Width of the pixel decoder's feed-forward layers; Mask2Former fixes it at 1024.
    "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_DIM_FEEDFORWARD": Key(1024, at_least(1)),
    # MAE's base rate (--blr of its commands): the learning rate is BLR * IMS_PER_BATCH / 256. 0:
    # SOLVER.BASE_LR is the learning rate, whatever the batch. At test time TTT.OPTIMIZER.BASE_LR is
    # the learning rate, too.
    "SOLVER.BLR": Key(
        0.0,
        Rule(
            lambda value, cfg: value >= 0 and (value == 0) != (cfg.SOLVER.BASE_LR == 0),
            "at least 0, and 0 just where SOLVER.BASE_LR is not: one of the two is the rate",
        ),
    ),
    "SOLVER.BETAS": Key([0.9, 0.999], _BETAS),  # AdamW
    # What learns, and from which losses: "joint" (f, g, h; main task + reconstruction, Section
    # 4.1); "main_only" (f and h); and the two stages of Section 3.1, "pretrain" (f and g; the
    # reconstruction alone, without labels) and "probing" (only the head h, on a given f).
    "TTT.JOINT": Key("joint", choices=("joint", "main_only", "pretrain", "probing")),
    # True: training starts from MODEL.WEIGHTS with another number of classes, and the class layer
    # is new; or from those of another task, and the queries of colours are new. False: such weights
    # are a mistake.
    "TTT.NEW_CLASSES": Key(False),
    # What a colorization model predicts of a pixel: ab of CIE Lab, or a distribution over 313 bins.
    "TTT.COLOR.TARGET": Key("classification", choices=("classification", "regression")),
    "TTT.COLOR.TEMPERATURE": Key(0.38, _ABOVE_0),  # 1: the plain mean
    # File with the pixels of each colour bin in the training images; '': no rebalancing.
    "TTT.COLOR.PRIOR": Key("", file=True),
    # Share of the uniform distribution that is mixed into the prior; 1 weighs all colours equally.
    "TTT.COLOR.REBALANCING": Key(0.5, must_be("in (0, 1]", lambda v: 0 < v <= 1)),
    # ViTMAE (docs/images.md): a published encoder. The next four override its sizes; 0 = SIZE's.
    "MODEL.VIT_MAE.SIZE": Key("large", choices=("base", "large", "huge")),
    "MODEL.VIT_MAE.EMBED_DIM": Key(0, at_least(0)),
    "MODEL.VIT_MAE.DEPTH": Key(0, at_least(0)),
    "MODEL.VIT_MAE.NUM_HEADS": Key(0, at_least(0)),
    "MODEL.VIT_MAE.PATCH_SIZE": Key(0, at_least(0, "a number of px, or 0 for that of SIZE")),
    "MODEL.VIT_MAE.IMAGE_SIZE": Key(224, at_least(1)),  # px, side of all images
    "MODEL.VIT_MAE.DECODER_EMBED_DIM": Key(512, at_least(1)),
    "MODEL.VIT_MAE.DECODER_DEPTH": Key(8, at_least(0)),
    "MODEL.VIT_MAE.DECODER_NUM_HEADS": Key(16, at_least(1)),
    # Its head h: "classifier" is a ViT over all tokens, "linear" a layer on the class token.
    "MODEL.VIT_MAE.HEAD": Key("classifier", choices=("classifier", "linear")),
    "MODEL.VIT_MAE.CLASSIFIER_EMBED_DIM": Key(768, at_least(1)),
    "MODEL.VIT_MAE.CLASSIFIER_DEPTH": Key(12, at_least(0)),
    "MODEL.VIT_MAE.CLASSIFIER_NUM_HEADS": Key(12, at_least(1)),
    "MODEL.VIT_MAE.NUM_CLASSES": Key(1000, at_least(1)),
    # File that h is read from where MODEL.WEIGHTS has f and g alone, as the published files do.
    "MODEL.VIT_MAE.HEAD_WEIGHTS": Key("", file=True),
    "MODEL.VIT_MAE.LABEL_SMOOTHING": Key(0.0, must_be("in [0, 1)", lambda v: 0 <= v < 1)),
    # Frames of a model of colours are grey: "made" takes the colours off and keeps them as labels;
    # "film" is for black-and-white films, which have none. All other models have "off".
    "INPUT.GREY": Key("off", choices=("off", "made", "film")),
    "TTT.RECON.WEIGHT": Key(1.0, at_least(0)),  # factor on loss_recon in training
    # px. Images of an image set are resized so that their shorter side has this length (bicubic),
    # and the frame is the square of INPUT.IMAGE_SIZE in their centre. 0: whole images.
    "INPUT.SINGLE_CROP": Key(
        0,
        Rule(
            lambda value, cfg: (
                value == 0 or (value >= cfg.INPUT.IMAGE_SIZE and cfg.INPUT.MIN_SIZE_TEST == 0)
            ),
            "0, or at least INPUT.IMAGE_SIZE with INPUT.MIN_SIZE_TEST 0",
        ),
    ),
    # Image classification trains on a random part of each image, resized to INPUT.IMAGE_SIZE: the
    # part's share of the image's area lies in this range, as in MAE; [] takes the single crop.
    "INPUT.RANDOM_RESIZED_CROP": Key(
        [],
        Rule(
            lambda value, cfg: (
                len(value) == 0 or (_is_range(value) and cfg.INPUT.MIN_SIZE_TEST == 0)
            ),
            "[], or [low, high] with 0 < low <= high and INPUT.MIN_SIZE_TEST 0",
        ),
    ),
    # Normalise each target patch (MASK_PATCH_SIZE) to zero mean and unit variance, as in MAE.
    "TTT.RECON.NORMALIZE_TARGET": Key(False),
    # If MODEL.WEIGHTS has no g, training starts it from h's weights. False: from random ones.
    "TTT.RECON.INIT_FROM_MAIN": Key(False),
    # Training steps between reconstruction pictures; 0 = none, -1 = with every evaluation.
    "TTT.RECON.PICTURE_PERIOD": Key(-1, at_least(-1, "a number of steps, 0, -1")),
    # File of tools/measure_gradients.py with the size of each parameter tensor's gradient on
    # training images. Gradients are divided by it, so that BASE_LR is in units of the weights, and
    # steps are larger on images that are less like the training images (not in the paper).
    "TTT.OPTIMIZER.SOURCE_GRADIENTS": Key(
        "",
        Rule(
            lambda value, cfg: not value or cfg.TTT.OPTIMIZER.NAME == "SGD",
            "'' where TTT.OPTIMIZER.NAME is ADAMW, which undoes any scale of the gradient",
        ),
        file=True,
    ),
    # File of tools/measure_norm_statistics.py with statistics of layers on training images.
    "TTT.LN_ADAPT.SOURCE_STATISTICS": Key("", file=True),
}

# These keys say how a model adapts. A preset sets all of them, by its file or to the defaults.
ADAPTATION: Mapping[str, Key] = {
    "TTT.PRESET": Key(""),  # name of the preset that was merged last, for the record
    "TTT.METHOD": Key("online_ttt_mae"),  # a name in configs/methods.yaml, or a registered one
    # --- masking and reconstruction (training and test time) ---
    "TTT.MASK_RATIO": Key(
        0.8, must_be("in [0, 1), the share of hidden patches", lambda v: 0 <= v < 1)
    ),
    "TTT.MASK_PATCH_SIZE": Key(  # px
        16,
        must_be(
            "a positive multiple of 4 px, the reconstruction's own patch",
            lambda v: v >= 1 and v % 4 == 0,
        ),
    ),
    # A name in ttt_video.modeling.MASK_KINDS: "random" hides single patches, "block" rectangles.
    "TTT.MASK_KIND": Key("random"),
    # Pixels that count; "all" includes padding.
    "TTT.RECON.REGION": Key("masked", choices=("masked", "visible", "all")),
    # --- test-time training ---
    # Number k of frames in explicit memory, the current one included; 0 = no limit; "auto" = as the
    # gradients of the steps suggest (docs/theory.md).
    "TTT.WINDOW_SIZE": Key(16, at_least(0, "a number of frames, 0 for no limit"), auto=True),
    "TTT.AUTO_WINDOW.MAX": Key(64, at_least(1)),  # frames that "auto" keeps, and k at most
    "TTT.BATCH_SIZE": Key(32, at_least(1)),  # samples per gradient step
    # Samples per forward and backward; gradients accumulate. 0 = on a GPU the largest power of two
    # that fits its memory, on a CPU 8. It changes rounding alone, but with STEP_MODE train also
    # what stochastic depth draws for a sample, and which samples batch norms see together.
    "TTT.MICRO_BATCH_SIZE": Key(0, at_least(0, "a number of samples, or 0 to find one")),
    # Layers of f and g keep their inputs alone in a step and are run again for their gradients,
    # which stay the same: about a third more time for a fraction of the memory.
    "TTT.CHECKPOINT": Key(False),
    "TTT.STEPS_PER_FRAME": Key(1, at_least(1)),  # gradient steps of one update
    # An update is made at the first frame of a video and at every n-th frame after it.
    "TTT.UPDATE_EVERY": Key(
        1,
        at_least(1),
        _if_frames_reset(1, "the frames between two updates have the source weights"),
    ),
    # ms between two frames of a camera; 0 = no budget. The loop keeps up by steps on fewer samples,
    # or none; every frame is predicted. Numbers then depend on how fast the machine is at each
    # moment, and no run repeats another bit for bit, unless TTT.CLOCK.PROFILE is set.
    "TTT.FRAME_BUDGET_MS": Key(
        0,
        at_least(0, "a number of milliseconds, or 0 for none"),
        _if_frames_reset(0, "a frame whose update is skipped has the source weights"),
    ),
    # Frames are predicted "after" or "before" the update that they take part in.
    "TTT.PREDICT": Key(
        "after",
        _if_frames_reset("after", "before the update every frame has the source weights"),
        choices=("after", "before"),
    ),
    # "shuffled" orders each video's frames by SEED and the video, so that neighbours in the stream
    # no longer look alike (Section 6.1, "Temporal smoothness"). The others sort an image set: by
    # "class"; by corruption, the "first" or the "second" of two before the other; by "severity".
    "TTT.FRAME_ORDER": Key(
        "time", choices=("time", "shuffled", "class", "first", "second", "severity")
    ),
    # "with_replacement" is the paper's (Section 4.2); "shuffled_epochs" makes whole shuffled passes
    # over the window; "without_replacement" takes each frame at most once, for losses without
    # randomness.
    "TTT.SAMPLING": Key(
        "with_replacement", choices=("with_replacement", "shuffled_epochs", "without_replacement")
    ),
    # Submodules that move, by name or part, such as ["backbone.layers.3"] or ["f", "g"]; [] = the
    # method's.
    "TTT.MODULES": Key(
        [], must_be("a list of names", lambda value: all(type(name) is str for name in value))
    ),
    # Their parameters that move: "all", those of normalisation layers ("norm"), or those that
    # multiply ("matrices": no biases, norms, queries and position tables).
    "TTT.PARAMETERS": Key("all", choices=("all", "norm", "matrices")),
    # How often the source weights (f0, g0) and a fresh optimizer return.
    "TTT.RESET": Key("video", choices=("video", "frame", "never")),
    # "train" has stochastic depth and dropout in the step; predictions are always in eval mode.
    "TTT.STEP_MODE": Key("eval", choices=("train", "eval")),
    # They are those of the step and of predictions. On a GPU "fp32" multiplies exactly and "tf32"
    # with 10 bits of mantissa, in products and convolutions alike; on a CPU they are the same.
    # "bf16" and "fp16" are autocast's.
    "TTT.PRECISION": Key("fp32", choices=("fp32", "tf32", "bf16", "fp16")),
    "TTT.PREDICT_PRECISION": Key("fp32", choices=("fp32", "tf32", "bf16", "fp16")),
    "TTT.OPTIMIZER.NAME": Key("SGD", choices=("SGD", "ADAMW")),
    "TTT.OPTIMIZER.BASE_LR": Key(0.01, at_least(0)),
    "TTT.OPTIMIZER.MOMENTUM": Key(0.0, _SHARE),  # SGD
    "TTT.OPTIMIZER.BETAS": Key([0.9, 0.999], _BETAS),  # AdamW
    # Never applied to norms, embeddings and position biases.
    "TTT.OPTIMIZER.WEIGHT_DECAY": Key(0.0, at_least(0)),
    # Learning rate of f, relative to BASE_LR.
    "TTT.OPTIMIZER.BACKBONE_MULTIPLIER": Key(1.0, at_least(0)),
    # L2 norm of the whole gradient.
    "TTT.OPTIMIZER.CLIP_NORM": Key(0.0, at_least(0, "at least 0 (0 = no clipping)")),
    "TTT.OPTIMIZER.RESTART": Key(False),  # forget the optimizer's state after every frame
    # A step is undone if the loss on its own batch and masks grows by more than this factor; 0 =
    # never. The loss is computed again only after suspiciously large steps.
    "TTT.OPTIMIZER.MAX_LOSS_GROWTH": Key(
        3.0,
        must_be("a factor of at least 1, or 0 for no limit", lambda v: v == 0 or 1 <= v < math.inf),
    ),
    # After every step the weights move this share of the way back to the source weights (continual
    # weight ensembling, Marsden et al., WACV 2024; not in the paper).
    "TTT.OPTIMIZER.SOURCE_PULL": Key(0.0, must_be("in [0, 1]", lambda v: 0 <= v <= 1)),
    # --- augmentation of a sampled frame before it is masked, in px at network resolution ---
    # Factor on the frame's sides before the crop; 0.5 leaves a quarter of the pixels.
    "TTT.CROP.RESIZE": Key(
        1.0, must_be("above 0, a factor on a frame's sides", lambda v: 0 < v < math.inf)
    ),
    # [height, width] of a random crop; [] = the whole frame.
    "TTT.CROP.SIZE": Key(
        [],
        must_be(
            "[] for whole frames, or [height, width] in px",
            lambda v: len(v) in (0, 2) and all(side >= 1 for side in v),
        ),
    ),
    "TTT.CROP.FLIP": Key(False),  # mirror left-right with probability 1/2
    # Range of large-scale jitter, which resizes to a factor on CROP.SIZE before the crop; [] = off.
    # Short crops are padded with 128, as by detectron2's FixedSizeCrop.
    "TTT.CROP.SCALE_RANGE": Key(
        [],
        Rule(
            lambda value, cfg: len(value) == 0 or (_is_range(value) and bool(cfg.TTT.CROP.SIZE)),
            "[] or [low, high] with 0 < low <= high, and needs TTT.CROP.SIZE",
        ),
    ),
}

# These keys belong to single methods (docs/methods/). Presets leave them alone.
METHODS: Mapping[str, Key] = {
    # TTT.* keys that a config file has for single methods, by name, because losses differ in scale.
    # load_config merges those of the selected method and empties this section.
    "TTT.BY_METHOD": Key(CfgNode(new_allowed=True)),
    # Gradient steps on the whole video before its first prediction.
    "TTT.OFFLINE.STEPS": Key(1000, at_least(1)),
    # offline_ttt_mae_oracle: steps between two looks at the labels, and whether step 0, the source
    # weights, is a candidate (not in the paper).
    "TTT.OFFLINE.EVAL_EVERY": Key(100, at_least(1)),
    "TTT.OFFLINE.ALLOW_ZERO": Key(False),
    # Number of frames that weigh as much as the source statistics.
    "TTT.LN_ADAPT.PRIOR": Key(
        16.0, must_be("a number of frames, at least 0, or inf", lambda value: value >= 0)
    ),
    # Candidate factors on the adaptation: 0 = the frozen model, 1 = the adapted one.
    "TTT.LINE_SEARCH.SCALES": Key(
        [0.0, 0.25, 0.5, 1.0, 2.0, 3.0],
        must_be(
            "a list of factors on the adaptation, at least one and none negative",
            lambda v: len(v) > 0 and _all_numbers(v, lambda scale: scale >= 0),
        ),
    ),
    "TTT.LINE_SEARCH.EVERY": Key(5, at_least(1)),  # updates from one search to the next
    # Weight of the searches before.
    "TTT.LINE_SEARCH.DECAY": Key(0.5, must_be("in [0, 1)", lambda v: 0 <= v < 1)),
    # learn_on_change. READ names the parts of the head whose normalisation layers count, and
    # SOURCE_HEAD the file of what they give on training images. A usual training image has the
    # distance 1.
    "TTT.LEARN_ON_CHANGE.READ": Key(
        ["h"],
        must_be("at least one name", lambda v: len(v) > 0 and all(isinstance(n, str) for n in v)),
    ),
    "TTT.LEARN_ON_CHANGE.SOURCE_HEAD": Key("", file=True),
    # Distance from the source above which rest ends; distance from a place above which it is left.
    "TTT.LEARN_ON_CHANGE.ENTER": Key(1.25, at_least(0)),
    "TTT.LEARN_ON_CHANGE.MOVED": Key(1.75, at_least(0)),
    "TTT.LEARN_ON_CHANGE.PATIENCE": Key(2, at_least(1)),  # frames in a row that must be so
    # Frames from a search that found something new to the next one, and the most that there may
    # be: a search that changed nothing doubles them.
    "TTT.LEARN_ON_CHANGE.WAIT": Key(
        [10, 40],
        must_be("[first, longest] in whole frames with 1 <= first <= longest", _is_whole_range),
    ),
    # These are tried, beside 0: in a frame, deviations of a blur in pixels, and multiples of the
    # noise that is found in the picture, to be taken out of it; in the next, shares of the way to
    # the training images' colours.
    "TTT.LEARN_ON_CHANGE.BLUR": Key(
        [0.8, 1.5],
        must_be("a list of deviations above 0", lambda v: _all_numbers(v, lambda x: x > 0)),
    ),
    "TTT.LEARN_ON_CHANGE.DENOISE": Key(
        [1.0],
        must_be(
            "a list of multiples in [0.01, 100]",
            lambda v: _all_numbers(v, lambda x: 0.01 <= x <= 100),
        ),
    ),
    "TTT.LEARN_ON_CHANGE.COLOURS": Key([0.5, 1.0], _SHARES),
    # Frames after that which take a gradient step each.
    "TTT.LEARN_ON_CHANGE.STEP_FRAMES": Key(0, at_least(0)),
    # Leads, as shares of the frozen model's distance: that over the frozen model without which
    # nothing else predicts (half of it keeps what is kept), and that of one candidate over another.
    "TTT.LEARN_ON_CHANGE.MARGIN": Key(0.3, must_be("in [0, 1]", lambda v: 0 <= v <= 1)),
    "TTT.LEARN_ON_CHANGE.STEP": Key(0.05, must_be("in [0, 1]", lambda v: 0 <= v <= 1)),
    # Share of the way from the frozen model's distance to a training image's 1, on a logarithmic
    # scale, that changed colours must bring a frame.
    "TTT.LEARN_ON_CHANGE.COLOUR_APPROACH": Key(0.5, must_be("in [0, 1]", lambda v: 0 <= v <= 1)),
    # Share of the entropies of the frozen model, and of the same picture without changed colours,
    # below which that of a prediction with changed colours has to be; 0 asks for none.
    "TTT.LEARN_ON_CHANGE.COLOUR_ENTROPY": Key(0.9, must_be("in [0, 1]", lambda v: 0 <= v <= 1)),
    # Frames of keep, the search's last included, to the first comparison with the frozen model, and
    # the most from one to the next: one that what is kept passes doubles them.
    "TTT.LEARN_ON_CHANGE.CHECK_EVERY": Key(
        [2, 16],
        must_be("[first, longest] in whole frames with 1 <= first <= longest", _is_whole_range),
    ),
    # It is compared at once where what the correction does to the picture moves by more than this
    # share of it, which is 2 at most.
    "TTT.LEARN_ON_CHANGE.CHECK_EFFECT": Key(0.2, at_least(0)),
    # lambda: confidence above which a prediction is a label.
    "TTT.SELF_TRAIN.THRESHOLD": Key(0.9, must_be("in [0, 1]", lambda v: 0 <= v <= 1)),
    # The weights are reset if their number of predicted classes differs from that of the source
    # weights by more than this.
    "TTT.CLASS_BALANCE.THRESHOLD": Key(2, at_least(0)),
    # majority_vote and temporal_smoothing: the method whose predictions are combined.
    "TTT.ENSEMBLE.METHOD": Key("none"),
    # Votes per frame; the first one is for the frame as it is.
    "TTT.ENSEMBLE.PREDICTIONS": Key(100, at_least(1)),
    # Range of the size of augmented copies, relative to the network's input.
    "TTT.ENSEMBLE.SCALE_RANGE": Key(
        [0.5, 2.0], must_be("[low, high] with 0 < low <= high", _is_range)
    ),
    "TTT.ENSEMBLE.FLIP": Key(True),  # mirror augmented copies with probability 1/2
    "TTT.ENSEMBLE.COLOR": Key(True),  # SSD's colour jitter of augmented copies
    # Frames whose predictions are averaged, the current one included.
    "TTT.ENSEMBLE.WINDOW_SIZE": Key(4, at_least(1)),
}

# These keys say what a run records or how it works, and change no result. Presets leave them alone.
RECORDING: Mapping[str, Key] = {
    # Rows have the scores and scalars of each gradient step, which costs a prediction per step.
    "TTT.RECORD_STEPS": Key(False),
    # "auto" replays prediction and step as CUDA graphs on a GPU where shapes repeat.
    "TTT.CUDA_GRAPHS": Key("auto", choices=("auto", "off")),
}

# These keys say what time it is in a stream (docs/streaming.md). Presets leave them alone.
TIMING: Mapping[str, Key] = {
    # Frames per second of the camera that the videos stand for: a frame that comes while the loop
    # is busy is dropped, and each is also scored by the newest prediction that was finished when it
    # came. 0: the frames of a recording wait, and nobody minds how long.
    "TTT.CLOCK.FPS": Key(
        0.0,
        must_be("0, or a number of frames per second from 0.001 to 100000", _is_rate_or_none),
        Rule(
            lambda value, cfg: value == 0 or cfg.TTT.FRAME_ORDER == "time",
            "0 where TTT.FRAME_ORDER is not 'time': a camera gives its frames in time",
        ),
        Rule(
            lambda value, cfg: value > 0 or not cfg.TTT.CLOCK.PROFILE,
            "above 0 where TTT.CLOCK.PROFILE is set: the profile's clock needs a frame rate",
        ),
    ),
    # Name of a shipped profile of stage times (configs/profiles/), or a file of
    # tools/measure_costs.py: the clock is simulated from it, by SEED, and runs repeat. '': the wall
    # clock, by which no run repeats another.
    "TTT.CLOCK.PROFILE": Key("", file=True),
}


def _one_of(*choices: str) -> Rule:
    """Returns the rule that a value is one of a few."""
    return must_be(f"one of {', '.join(map(repr, choices))}", lambda value: value in choices)


def _are_swin_heads(value: Any, cfg: CfgNode) -> bool:
    widths = [cfg.MODEL.SWIN.EMBED_DIM * 2**stage for stage in range(4)]
    return _is_per_stage(value) and all(
        width % heads == 0 for width, heads in zip(widths, value, strict=True)
    )


def _is_per_stage(value: Any) -> bool:
    return len(value) == 4 and all(type(number) is int and number >= 1 for number in value)


def _predicts(value: bool, cfg: CfgNode) -> bool:
    test = cfg.MODEL.MASK_FORMER.TEST
    return value or test.INSTANCE_ON or test.PANOPTIC_ON


_NORMS = ("GN", "LN", "BN", "SyncBN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N", "FrozenBN")

# Rules for keys of detectron2 and Mask2Former, whose defaults stand elsewhere. A name of a registry
# is checked where it is looked up.
RULES_OF_OTHERS: Mapping[str, tuple[Rule, ...]] = {
    "MODEL.PIXEL_MEAN": (
        must_be("numbers for three channels", lambda v: len(v) == 3 and _all_numbers(v)),
    ),
    "MODEL.PIXEL_STD": (
        must_be(
            "numbers above 0 for three channels",
            lambda v: len(v) == 3 and _all_numbers(v, lambda x: x > 0),
        ),
    ),
    "MODEL.SWIN.PATCH_SIZE": (must_be("4, on which the heads' strides stand", lambda v: v == 4),),
    "MODEL.SWIN.EMBED_DIM": (at_least(1),),
    "MODEL.SWIN.DEPTHS": (must_be("four numbers of blocks, each at least 1", _is_per_stage),),
    "MODEL.SWIN.NUM_HEADS": (
        Rule(
            _are_swin_heads,
            "four numbers of heads, which divide the stages' widths: MODEL.SWIN.EMBED_DIM, and "
            "its double, fourfold and eightfold",
        ),
    ),
    "MODEL.SWIN.WINDOW_SIZE": (at_least(1),),
    "MODEL.SWIN.MLP_RATIO": (_ABOVE_0,),
    "MODEL.SWIN.QK_SCALE": (
        must_be("a number, or None", lambda value: value is None or _all_numbers([value])),
    ),
    "MODEL.SWIN.DROP_RATE": (_SHARE,),
    "MODEL.SWIN.ATTN_DROP_RATE": (_SHARE,),
    "MODEL.SWIN.DROP_PATH_RATE": (_SHARE,),
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": (at_least(1),),
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": (at_least(1),),
    "MODEL.SEM_SEG_HEAD.MASK_DIM": (at_least(1),),
    "MODEL.SEM_SEG_HEAD.NORM": (_one_of("", *_NORMS),),
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": (at_least(1),),
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": (at_least(0),),
    "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS": (at_least(1),),
    "MODEL.MASK_FORMER.HIDDEN_DIM": (at_least(1),),
    "MODEL.MASK_FORMER.NHEADS": (
        Rule(
            lambda value, cfg: value >= 1 and cfg.MODEL.MASK_FORMER.HIDDEN_DIM % value == 0,
            "a divisor of MODEL.MASK_FORMER.HIDDEN_DIM",
        ),
    ),
    "MODEL.MASK_FORMER.DROPOUT": (_SHARE,),
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": (at_least(1),),
    "MODEL.MASK_FORMER.DEC_LAYERS": (at_least(1),),
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": (at_least(1),),
    "MODEL.MASK_FORMER.NO_OBJECT_WEIGHT": (at_least(0),),
    "MODEL.MASK_FORMER.CLASS_WEIGHT": (at_least(0),),
    "MODEL.MASK_FORMER.DICE_WEIGHT": (at_least(0),),
    "MODEL.MASK_FORMER.MASK_WEIGHT": (at_least(0),),
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": (at_least(1),),
    "MODEL.MASK_FORMER.OVERSAMPLE_RATIO": (at_least(1),),
    "MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO": (
        must_be("a share in [0, 1]", lambda value: 0 <= value <= 1),
    ),
    "MODEL.MASK_FORMER.TEST.SEMANTIC_ON": (
        Rule(
            _predicts,
            "True where MODEL.MASK_FORMER.TEST.INSTANCE_ON and .PANOPTIC_ON are not: without an "
            "output a model predicts nothing",
        ),
    ),
    "TEST.DETECTIONS_PER_IMAGE": (at_least(1),),
    "INPUT.FORMAT": (_one_of("RGB", "BGR"),),
    "INPUT.MIN_SIZE_TEST": (at_least(0, "0 for the frame's own size, or a number of pixels"),),
    "INPUT.MAX_SIZE_TEST": (at_least(1),),
    "INPUT.MIN_SIZE_TRAIN": (
        must_be(
            "numbers of pixels, each 0 or more",
            lambda value: len(value) > 0 and _all_numbers(value, lambda x: x >= 0),
        ),
    ),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": (_one_of("choice", "range"),),
    "INPUT.RANDOM_FLIP": (_one_of("horizontal", "vertical", "none"),),
    "INPUT.IMAGE_SIZE": (at_least(1),),
    "INPUT.MIN_SCALE": (_ABOVE_0,),
    "INPUT.MAX_SCALE": (
        Rule(lambda value, cfg: value >= cfg.INPUT.MIN_SCALE, "at least INPUT.MIN_SCALE"),
    ),
    "DATALOADER.NUM_WORKERS": (at_least(0),),
    "SOLVER.BASE_LR": (at_least(0),),
    "SOLVER.MOMENTUM": (_SHARE,),
    "SOLVER.WEIGHT_DECAY": (at_least(0),),
    "SOLVER.WEIGHT_DECAY_NORM": (at_least(0),),
    "SOLVER.WEIGHT_DECAY_EMBED": (at_least(0),),
    "SOLVER.BACKBONE_MULTIPLIER": (at_least(0),),
    "SOLVER.WARMUP_ITERS": (at_least(0),),
    "SOLVER.CHECKPOINT_PERIOD": (at_least(1),),
    "SOLVER.REFERENCE_WORLD_SIZE": (
        Rule(
            lambda value, cfg: value == 0 or (value > 0 and cfg.SOLVER.IMS_PER_BATCH % value == 0),
            "0, or a divisor of SOLVER.IMS_PER_BATCH",
        ),
    ),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": (
        Rule(
            lambda value, cfg: value > 0 or not cfg.SOLVER.CLIP_GRADIENTS.ENABLED,
            "above 0 where SOLVER.CLIP_GRADIENTS.ENABLED",
        ),
    ),
}

KEYS: dict[str, Key] = {**MODEL, **ADAPTATION, **METHODS, **RECORDING, **TIMING}
"""All keys of this project, and those that were declared since."""


def declare_keys(section: str, keys: Mapping[str, Key]) -> None:
    """Adds the keys ``TTT.<section>.*`` to every config that is built from now on.

    A file of ``--register`` calls it for the keys of its method, model or mask. Presets leave them
    alone.

    Raises:
        ValueError: a key of this project has one of the names.
    """
    named = {f"TTT.{section}.{name}": key for name, key in keys.items()}
    for name in named:
        if name in {**MODEL, **ADAPTATION, **METHODS, **RECORDING}:
            raise ValueError(f"{name} is a key of this project; declare one of another name")
    KEYS.update(named)
