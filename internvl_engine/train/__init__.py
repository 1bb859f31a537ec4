"""Training: the texts of captioned images as the published losses take them."""

from .captions import clean_caption, encode_for_training

__all__ = ["clean_caption", "encode_for_training"]
