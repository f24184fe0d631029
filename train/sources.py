"""The reader of training images, which lies a floor below, where the programs that judge reach it too."""

from __future__ import annotations

from tokenizers_vis.sources import ImageSource as ImageSource
from tokenizers_vis.sources import open_source as open_source
