"""A folder of pictures, and what an index of it must hold."""

from pathlib import Path

import torch
from PIL import Image
from tiny_engine import pictures

from internvl_engine.index import FolderIndex

ROUNDING = 2e-6  # float32 sums of another batch shape, on unit vectors


def fill(folder: Path, count: int = 7, seed: int = 0) -> dict[str, Path]:
    """Pictures in a folder and one below it: name in the index -> file."""
    (folder / "below").mkdir(parents=True, exist_ok=True)
    names = [f"{'below/' if i % 3 == 0 else ''}{i:03}.png" for i in range(count)]
    for name, picture in zip(names, pictures(count, seed), strict=True):
        Image.fromarray(picture).save(folder / name)
    return {name: folder / name for name in sorted(names)}


def everything(index: FolderIndex) -> dict[str, torch.Tensor]:
    return {
        path: row
        for paths, rows in index.shards.live()
        for path, row in zip(paths, rows, strict=True)
    }


def assert_holds(index: FolderIndex, engine, files: dict[str, Path], mode: str = "c") -> None:
    found = everything(index)
    assert sorted(found) == sorted(files) and len(index) == len(files)
    expected = engine.encode_image([files[name] for name in files], mode).cpu()
    actual = torch.stack([found[name] for name in files])
    torch.testing.assert_close(actual, expected, atol=ROUNDING, rtol=0)
