"""Whole checkpoints: checking a downloaded one, and converting one into another.

Models are loaded by their own `from_pretrained` (internvl_engine.checkpoint).
"""

from .conversion import convert
from .example import check_example
from .verification import Finding, Report, verify

__all__ = ["Finding", "Report", "check_example", "convert", "verify"]
