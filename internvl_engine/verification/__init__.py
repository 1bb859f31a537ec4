"""Checks a downloaded checkpoint: its files, names, shapes, values, hashes, and worked example."""

from .checks import verify
from .example import check_example
from .report import Finding, Report

__all__ = ["Finding", "Report", "check_example", "verify"]
