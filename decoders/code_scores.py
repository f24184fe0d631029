"""The canvas of a TiTok checkpoint of the first stage when the VQGAN whose codes it scores is not at hand.

Yu et al. 2024, "An Image is Worth 32 Tokens for Reconstruction and Generation", arXiv 2406.07550, section 3.3.
"""

from __future__ import annotations

from torch import Tensor

from tokenizers_vis.decoders.canvas import Canvas, Resize


class CodeScores(Canvas):
    """Images are read as they are, in [0, 1]; scores of codes b k h w cannot become pictures here.

    needs: the file of the VQGAN that could show them, for the message.
    """

    def __init__(self, *, size: int, resize: Resize = "crop", needs: str) -> None:
        super().__init__()
        self.image_size, self.resize, self.needs = size, resize, needs

    @property
    def sides(self) -> tuple[int, None]:
        return self.image_size, None

    def read(self, images: Tensor) -> Tensor:
        return images

    def target(self, images: Tensor) -> Tensor:
        """Raises ``ValueError``: only the VQGAN knows the codes of an image."""
        raise ValueError(self._missing())

    def paint(self, y: Tensor) -> Tensor:
        """Raises ``ValueError``: only the VQGAN turns codes into a picture."""
        raise ValueError(self._missing())

    def _missing(self) -> str:
        return (
            f"this checkpoint is of TiTok's first stage: it scores the codes of a VQGAN and does not hold that VQGAN, "
            f"so it encodes but cannot paint; put {self.needs} into its folder and load it again"
        )
