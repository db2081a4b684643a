"""DeepLabV3+ of detectron2's own project, as a frozen baseline in the stream."""

from __future__ import annotations

from typing import Any, ClassVar

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, SemanticSegmentor

from ..errors import UserError


@META_ARCH_REGISTRY.register()
class DeepLabV3Plus(SemanticSegmentor):
    """detectron2's ``SemanticSegmentor`` whose scores are probabilities, as other models' are.

    The parts, their config keys and their parameter names are detectron2's, so the checkpoints of
    its DeepLab project fit.
    """

    parts: ClassVar = {"f": "backbone", "h": "sem_seg_head"}
    outputs: ClassVar = frozenset({"sem_seg"})

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Builds backbone and head from the names in ``cfg``, detectron2's DeepLab among them.

        Raises:
            UserError: the installed detectron2 comes without its projects.
        """
        try:
            import detectron2.projects.deeplab  # noqa: F401  registers its parts
        except ImportError as error:
            raise UserError(
                f"DeepLabV3+ needs detectron2's project deeplab, which does not import ({error}); "
                "install detectron2 with its projects"
            ) from error
        return super().from_config(cfg)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Returns losses in training mode, else ``sem_seg``: (K, height, width) probabilities."""
        outputs = super().forward(batched_inputs)
        if self.training:
            return outputs
        return [{"sem_seg": output["sem_seg"].softmax(0)} for output in outputs]
