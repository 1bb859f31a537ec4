"""The model with its processor as embeddings: of images and texts, in batches, and whose."""

from .batches import Outcome
from .embedder import Embedder, Mode
from .fingerprint import fingerprint
from .images import ImageEmbeddings

__all__ = ["Embedder", "ImageEmbeddings", "Mode", "Outcome", "fingerprint"]
