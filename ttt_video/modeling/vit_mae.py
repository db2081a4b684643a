"""ViTMAE: a masked autoencoder on a vision transformer (He et al., 2022) with a head of classes.

The model of "Test-Time Training with Masked Autoencoders" (Gandelsman et al., 2022). Blocks are
timm's, an optional extra, which is imported when a model is built.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import ImageList
from torch import Tensor, nn

from ..config.keys import KEYS
from ..errors import UserError
from .interface import prefixes
from .masking import MAEMasks, unpatchify
from .pixel_classes import MainTask, PixelClasses
from .position_encoding import mae_position_table
from .recomputing import run_layer
from .reconstructing import ReconstructingModel
from .reconstruction import ReconstructionTask
from .weights import read_checkpoint

MLP_RATIO = 4
EPSILON = 1e-6
"""Added to the variance by layer norms and by the linear head's batch norm."""

PUBLISHED_HEADS = {"head.0.": "bn.", "head.1.": "head."}
"""What stands in files of linear probing for the names of a linear head."""


class Tower(NamedTuple):
    """The sizes of a stack of transformer blocks; a depth of 0 is none."""

    dim: int
    depth: int
    heads: int


class Size(NamedTuple):
    """The sizes of a published encoder, and of its patches in px."""

    encoder: Tower
    patch: int


SIZES = {
    "base": Size(Tower(768, 12, 12), 16),
    "large": Size(Tower(1024, 24, 16), 16),
    "huge": Size(Tower(1280, 32, 16), 14),
}
"""By their names in ``MODEL.VIT_MAE.SIZE``."""

PARTS = {
    "f": ("cls_token", "pos_embed", "patch_embed", "blocks", "norm"),
    # Published encoders come without a mask token, which is what g puts where f saw nothing.
    "g": (
        "mask_token",
        "decoder_embed",
        "decoder_pos_embed",
        "decoder_blocks",
        "decoder_norm",
        "decoder_pred",
    ),
}
"""Names of f and g."""

HEADS = {
    "classifier": (
        "classifier_embed",
        "classifier_pos_embed",
        "classifier_blocks",
        "classifier_norm",
        "classifier_pred",
    ),
    "linear": ("bn", "head"),
}
"""Names of h by ``MODEL.VIT_MAE.HEAD``."""


def _timm() -> Any:
    try:
        from timm.models import vision_transformer
    except ImportError as error:
        raise UserError(
            "ViTMAE needs timm, an optional extra: pip install 'timm>=1.0,<2'"
        ) from error
    return vision_transformer


_norm = partial(nn.LayerNorm, eps=EPSILON)


def shown_patches(visible: Tensor, patch_size: int) -> Tensor:
    """Returns the indices of the visible patches, (B, V) in ascending order.

    Args:
        visible: (B, 1, H, W), 1 = visible, constant within patches.
        patch_size: side of a patch, px; it divides H and W.

    Raises:
        ValueError: a mask cuts a patch, or the images do not show equally many.
    """
    cells = visible[:, :, ::patch_size, ::patch_size]
    whole = F.interpolate(cells, scale_factor=patch_size, mode="nearest")
    shown = cells.flatten(1) > 0
    counts = shown.sum(1)
    if not torch.equal(whole, visible):
        raise ValueError(f"image_mask hides parts of patches; a ViT sees {patch_size} px or none")
    if (counts != counts[0]).any():
        raise ValueError(f"masks of one batch show different numbers of patches: {counts.tolist()}")
    return shown.nonzero()[:, 1].view(len(visible), -1)


@META_ARCH_REGISTRY.register()
class ViTMAE(ReconstructingModel):
    """Classifies images, and reconstructs masked ones from their visible patches alone.

    Parameters have the published names: ``cls_token``, ``patch_embed``, ``blocks``, ``norm`` (f),
    ``mask_token``, ``decoder_*`` (g), and ``classifier_*`` or ``bn`` and ``head`` (h). Position
    tables are buffers, which nothing trains. All images have one size.
    """

    outputs: ClassVar = frozenset({"image_class"})
    pos_embed: Tensor
    decoder_pos_embed: Tensor
    classifier_pos_embed: Tensor
    blocks: nn.ModuleList
    decoder_blocks: nn.ModuleList
    classifier_blocks: nn.ModuleList
    norm: nn.LayerNorm
    decoder_norm: nn.LayerNorm
    classifier_norm: nn.LayerNorm

    @configurable
    def __init__(
        self,
        *,
        image_size: int,
        encoder: Tower,
        decoder: Tower,
        classifier: Tower | None,
        num_classes: int,
        label_smoothing: float,
        head_weights: str,
        **common: Any,
    ) -> None:
        """
        Args:
            image_size: side of the images, px.
            encoder: sizes of f; decoder: of g; classifier: of h, None for a linear head.
            num_classes: K.
            label_smoothing: share of the uniform distribution in the labels of training.
            head_weights: a file that h is read from, "" for one that is in the file of f.
            common: :class:`ReconstructingModel`'s arguments, without the parts.
        """
        h = HEADS["linear" if classifier is None else "classifier"]
        super().__init__(parts={**PARTS, "h": h}, **common)
        self.use_checkpoint = False
        self.linear = classifier is None
        self.image_size, self.patch_size = image_size, self.masks.patch_size
        self.label_smoothing, self.head_weights = label_smoothing, head_weights
        if image_size % self.patch_size:
            raise UserError(
                f"MODEL.VIT_MAE.IMAGE_SIZE is {image_size} px, which patches of "
                f"{self.patch_size} px do not divide"
            )
        self.patch_embed = _timm().PatchEmbed(image_size, self.patch_size, 3, encoder.dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, encoder.dim))
        self._add_tower("", encoder)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder.dim))
        self.decoder_embed = nn.Linear(encoder.dim, decoder.dim)
        self._add_tower("decoder_", decoder)
        self.decoder_pred = nn.Linear(decoder.dim, 3 * self.patch_size**2)
        if classifier is None:
            self.bn = nn.BatchNorm1d(encoder.dim, affine=False, eps=EPSILON)
            self.head = nn.Linear(encoder.dim, num_classes)
        else:
            self.classifier_embed = nn.Linear(encoder.dim, classifier.dim)
            self._add_tower("classifier_", classifier)
            self.classifier_pred = nn.Linear(classifier.dim, num_classes)
        self._initialize()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Reads ``MODEL.VIT_MAE.*``, ``MODEL.PIXEL_*`` and ``TTT.*``.

        Masks hide the encoder's own patches. ``TTT.MASK_PATCH_SIZE`` may be their size or stay at
        its default, which is that of other models.
        """
        common = cls.common_arguments(cfg)
        own, ttt = cfg.MODEL.VIT_MAE, cfg.TTT
        size = SIZES[own.SIZE]
        patch = own.PATCH_SIZE or size.patch
        if ttt.MASK_PATCH_SIZE not in (patch, KEYS["TTT.MASK_PATCH_SIZE"].default):
            raise UserError(
                f"TTT.MASK_PATCH_SIZE is {ttt.MASK_PATCH_SIZE}, but a ViT hides its own patches of "
                f"{patch} px (MODEL.VIT_MAE.PATCH_SIZE): leave the key away"
            )
        head = Tower(own.CLASSIFIER_EMBED_DIM, own.CLASSIFIER_DEPTH, own.CLASSIFIER_NUM_HEADS)
        recon = ttt.RECON
        normalized = patch if recon.NORMALIZE_TARGET else None
        return {
            **common,
            "image_size": own.IMAGE_SIZE,
            "encoder": Tower(
                own.EMBED_DIM or size.encoder.dim,
                own.DEPTH or size.encoder.depth,
                own.NUM_HEADS or size.encoder.heads,
            ),
            "decoder": Tower(own.DECODER_EMBED_DIM, own.DECODER_DEPTH, own.DECODER_NUM_HEADS),
            "classifier": None if own.HEAD == "linear" else head,
            "num_classes": own.NUM_CLASSES,
            "label_smoothing": own.LABEL_SMOOTHING,
            "head_weights": own.HEAD_WEIGHTS,
            "size_divisibility": patch,
            "masks": MAEMasks(patch, ttt.MASK_RATIO, ttt.MASK_KIND),
            "reconstruction": ReconstructionTask(recon.WEIGHT, recon.REGION, normalized),
        }

    def _add_tower(self, prefix: str, tower: Tower) -> None:
        """Adds a position table, blocks and their last norm."""
        if tower.dim % tower.heads or tower.dim % 4:
            key = f"MODEL.VIT_MAE.{prefix.upper()}"
            raise UserError(
                f"{key}EMBED_DIM is {tower.dim}; it must be a multiple of 4 and of {key}NUM_HEADS, "
                f"which is {tower.heads}"
            )
        side = self.image_size // self.patch_size
        self.register_buffer(f"{prefix}pos_embed", mae_position_table(side, side, tower.dim))
        settings = {"mlp_ratio": MLP_RATIO, "qkv_bias": True, "norm_layer": _norm}
        blocks = [_timm().Block(tower.dim, tower.heads, **settings) for _ in range(tower.depth)]
        self.add_module(f"{prefix}blocks", nn.ModuleList(blocks))
        self.add_module(f"{prefix}norm", _norm(tower.dim))

    def _initialize(self) -> None:
        """Draws MAE's initial weights."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def read_weights(self, path: str) -> dict[str, Tensor]:
        """Reads published files: f and g from ``path``, h from ``MODEL.VIT_MAE.HEAD_WEIGHTS``.

        A file of h may also have the f that it was trained on, which the published method does not
        use.

        Raises:
            UserError: a file cannot be read, or that of h has none.
        """
        weights = {_own_name(name): value for name, value in read_checkpoint(path).items()}
        if not self.head_weights:
            return weights
        h = prefixes(self, "h")
        read = read_checkpoint(self.head_weights).items()
        head = {own: value for name, value in read if (own := _own_name(name)).startswith(h)}
        if not head:
            raise UserError(
                f"MODEL.VIT_MAE.HEAD_WEIGHTS {self.head_weights} has none of {', '.join(h)}: give "
                "the file of a head of MODEL.VIT_MAE.HEAD's kind"
            )
        return {**{n: v for n, v in weights.items() if not n.startswith(h)}, **head}

    def normalize(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """Returns the normalised images: (B, 3, S, S) float32.

        Raises:
            UserError: an image has another size than the position tables.
        """
        for x in batched_inputs:
            height, width = x["image"].shape[-2:]
            if (height, width) != (self.image_size, self.image_size):
                raise UserError(
                    f"an image of {height}x{width} px, but the model takes "
                    f"{self.image_size}x{self.image_size}: resize and crop images to it, or set "
                    "MODEL.VIT_MAE.IMAGE_SIZE to that of the weights"
                )
        return super().normalize(batched_inputs)

    def encode(self, pixels: Tensor, visible: Tensor | None = None) -> Tensor:
        """Returns f of (B, 3, S, S) pixels, (B, 1 + V, C): the class token and V visible patches.

        Hidden patches are not in the transformer's input. Patches come row by row. ``visible`` is
        (B, 1, S, S); None shows all.
        """
        tokens = self.patch_embed(pixels) + self.pos_embed[:, 1:]
        if visible is not None:
            shown = shown_patches(visible, self.patch_size)
            tokens = tokens.gather(1, shown[..., None].expand(-1, -1, tokens.shape[-1]))
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        tokens = torch.cat([first, tokens], dim=1)
        for block in self.blocks:
            tokens = run_layer(block, tokens, recompute=self.use_checkpoint, draws=block.training)
        return self.norm(tokens)

    def decode(self, features: Tensor, visible: Tensor) -> Tensor:
        """Returns g of f: (B, 3, S, S) pixels, in the units of the target."""
        embedded = self.decoder_embed(features)
        shown = shown_patches(visible, self.patch_size)[..., None]
        count = self.decoder_pos_embed.shape[1] - 1
        patches = self.mask_token.to(embedded.dtype).expand(len(embedded), count, -1)
        patches = patches.scatter(1, shown.expand(-1, -1, embedded.shape[-1]), embedded[:, 1:])
        tokens = torch.cat([embedded[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            tokens = run_layer(block, tokens, recompute=self.use_checkpoint, draws=block.training)
        predicted = self.decoder_pred(self.decoder_norm(tokens))[:, 1:]
        return unpatchify(predicted, self.patch_size, self.image_size, self.image_size)

    def classify(
        self, tokens: Tensor, visible: Tensor | None = None, *, learning: bool = False
    ) -> Tensor:
        """Returns h of f: (B, K) logits.

        Args:
            tokens: of :meth:`encode`.
            visible: that f was given.
            learning: a linear head normalises by the batch in training mode; else by its running
                statistics in every mode, so that a test-time step does not depend on the batch.
        """
        if self.linear:
            bn, token = self.bn, tokens[:, 0]
            fixed = F.batch_norm(token, bn.running_mean, bn.running_var, eps=bn.eps)
            return self.head(bn(token) if learning else fixed)
        places = self.classifier_pos_embed
        if visible is not None:
            shown = shown_patches(visible, self.patch_size)
            places = torch.cat([places[:, :1].expand(len(shown), -1, -1), places[0, 1:][shown]], 1)
        tokens = self.classifier_embed(tokens) + places
        for block in self.classifier_blocks:
            tokens = block(tokens)
        return self.classifier_pred(self.classifier_norm(tokens)[:, 0])

    def main_losses(
        self, batched_inputs: list[dict[str, Any]], normalizers: None = None
    ) -> dict[str, Tensor]:
        """Returns ``loss_class``, the mean cross-entropy of ``class_id`` (int) in nats."""
        tokens = self.encode(self.normalize(batched_inputs).tensor)
        logits = self.classify(tokens, learning=True)
        labels = torch.tensor([x["class_id"] for x in batched_inputs], device=self.device)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        return {"loss_class": loss}

    def main_task(
        self, batched_inputs: list[dict[str, Any]], *, mask_with: torch.Generator | None = None
    ) -> MainTask:
        """Returns the distribution over the classes, as that of one pixel: (B, K, 1, 1).

        ``mask_with`` is a CPU generator that draws masks of patches to hide, as in reconstruction.
        The head of a ViT then gets the visible patches alone, at their places.
        """
        images = self.normalize(batched_inputs)
        visible = None
        if mask_with is not None:
            visible = self.masks.of_batch(batched_inputs, images, mask_with)
        logits = self.classify(self.encode(images.tensor, visible), visible)
        inside = torch.ones(len(logits), 1, 1, device=logits.device)
        return MainTask(PixelClasses.of_logits(logits[..., None, None]), inside)

    def predict(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns ``image_class`` for each input: (K,) float32 logits."""
        logits = self.classify(self.encode(self.normalize(batched_inputs).tensor))
        return [{"image_class": each} for each in logits.float()]


def _own_name(name: str) -> str:
    """Returns the model's name for a published one."""
    old = next((old for old in PUBLISHED_HEADS if name.startswith(old)), None)
    return name if old is None else PUBLISHED_HEADS[old] + name.removeprefix(old)
