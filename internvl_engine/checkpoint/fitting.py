"""Which parts of a model fit into memory, and in which dtypes. Numbers in, text out.

    bytes = parameters * size of the dtype * 1.1

The tenth is what activations of a small batch take, roughly.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from .families import INTERNVL_14B
from .parts import needs

SPARE = 1.1
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Parameters of InternVL-14B at 224 px, so that nobody has to build it to know them.
PARAMETERS_14B = {
    "image": 5_936_000_768,
    "text": 6_684_028_928,
    "c": 12_620_029_697,
    "g": 13_630_355_969,
    "caption": 13_745_099_648,
    "all": 13_834_975_747,
}


class Fit(NamedTuple):
    """Some parts of a model in one dtype.

    Args:
        parts: as `from_pretrained` takes them.
        dtype: the name of the dtype.
        parameters: how many.
        nbytes: of the weights.
        fits: whether they and a small batch's activations go into the memory.
    """

    parts: str
    dtype: str
    parameters: int
    nbytes: int
    fits: bool

    def __str__(self) -> str:
        return f"parts={self.parts!r} in {self.dtype} ({self.nbytes / 1e9:.1f} GB)"


def parameters_by_parts(sizes: Mapping[str, int], held: str = "all") -> dict[str, int]:
    """The parameters of every part of a model.

    Args:
        sizes: published name to number of values, of all weights that the model holds.
        held: the parts that these are; what lies outside of them is left out.
    """
    within = [
        parts
        for parts, patterns in INTERNVL_14B.parts.items()
        if held in ("all", parts) or set(patterns) <= set(INTERNVL_14B.parts[held])
    ]
    return {
        parts: sum(size for name, size in sizes.items() if needs(parts)(name)) for parts in within
    }


def fitting(
    available: int,
    parameters: Mapping[str, int] = PARAMETERS_14B,
    dtypes: Iterable[str] = ("float32", "bfloat16"),
) -> list[Fit]:
    """Every part in every dtype, and whether it fits.

    Args:
        available: bytes of memory.
        parameters: parts to parameters.
        dtypes: names of dtypes that are worth a line.
    """
    return [
        Fit(parts, dtype, count, count * BYTES[dtype], count * BYTES[dtype] * SPARE <= available)
        for dtype in dtypes
        for parts, count in parameters.items()
    ]


def advice(
    available: int,
    parts: str = "all",
    dtype: str = "float32",
    parameters: Mapping[str, int] = PARAMETERS_14B,
) -> str | None:
    """What to load in place of parts that do not fit; None where they do.

    Args:
        available: bytes of memory.
        parts, dtype: what was asked for.
        parameters: parts to parameters.
    """
    table = fitting(available, parameters, dict.fromkeys((dtype, "float32", "bfloat16")))
    asked = next(each for each in table if (each.parts, each.dtype) == (parts, dtype))
    if asked.fits:
        return None
    text = f"{asked} and a small batch do not fit into {available / 1e9:.1f} GB"
    fits = [each for each in table if each.fits and each.parameters <= asked.parameters]
    if not fits:
        return f"{text}; no part of it does, in any dtype"
    # The most of the model first, and of what is as large, the wider dtype.
    fits.sort(key=lambda each: (-each.parameters, -each.nbytes))
    return f"{text}; these do: {', '.join(map(str, fits))}"
