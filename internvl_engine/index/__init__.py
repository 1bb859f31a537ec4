"""An index of the images in a folder, on disk, and the search in it."""

from .index import FolderIndex, Hit, Report
from .shards import Entry, Shards

__all__ = ["Entry", "FolderIndex", "Hit", "Report", "Shards"]
