"""The model with its processor as embeddings: of images and texts, in batches, and whose."""

from .batches import Outcome
from .embedder import Embedder, ImageEmbeddings, Mode
from .fingerprint import fingerprint

__all__ = ["Embedder", "ImageEmbeddings", "Mode", "Outcome", "fingerprint"]
