"""Which parts of a model fit into memory, in which dtypes and forms. Numbers in, text out.

    bytes = parameters * size of the dtype * 1.1

The tenth is what activations of a small batch take, roughly. Quantized weights take what their
scheme makes of them, beside those that stay wide, in bfloat16.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ..schemes import scheme_of
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


# Bytes of the same, quantized by the schemes of these names.
QUANTIZED_14B = {
    "int8": {
        "image": 5_984_820_736,
        "text": 6_698_842_384,
        "c": 12_683_663_122,
        "g": 13_750_111_506,
        "caption": 13_775_509_792,
        "all": 13_955_261_990,
    },
    "int4": {
        "image": 5_984_820_736,
        "text": 3_652_335_888,
        "c": 9_637_156_626,
        "g": 10_253_241_618,
        "caption": 10_278_639_904,
        "all": 10_458_392_102,
    },
}


class Fit(NamedTuple):
    """Some parts of a model in one dtype, or quantized.

    Args:
        parts: as `from_pretrained` takes them.
        dtype: the name of the dtype, or of the scheme.
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
        held = f"in {self.dtype}" if self.dtype in BYTES else f"with quantize={self.dtype!r}"
        return f"parts={self.parts!r} {held} ({self.nbytes / 1e9:.1f} GB)"


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


def quantized_by_parts(
    shapes: Mapping[str, tuple[int, ...]], held: str = "all"
) -> dict[str, dict[str, int]]:
    """The bytes of every part of a model in every scheme that has a use on a processor.

    Args:
        shapes: published name to shape, of all weights that the model holds.
        held: the parts that these are.
    """
    return {
        scheme: parameters_by_parts(
            {name: quantized_nbytes(scheme, name, shape) for name, shape in shapes.items()}, held
        )
        for scheme in QUANTIZED_14B
    }


def quantized_nbytes(scheme: str, name: str, shape: tuple[int, ...]) -> int:
    """The bytes of a weight in a scheme, bfloat16 where it stays wide."""
    rule = scheme_of(scheme).rule_for(name, shape)
    if rule.form == "wide":
        return BYTES["bfloat16"] * math.prod(shape)
    rows, columns = shape
    panels = -(-rows // 32) * 32
    if rule.form == "int4":  # half bytes, and float16 scales of groups
        return panels * (4 * -(-columns // 8) + 2 * -(-columns // rule.group))
    return panels * 4 * -(-columns // 4) + 8 * rows  # bytes, scales and sums of rows


def fitting(
    available: int,
    parameters: Mapping[str, int] = PARAMETERS_14B,
    dtypes: Iterable[str] = ("float32", "bfloat16"),
    quantized: Mapping[str, Mapping[str, int]] = QUANTIZED_14B,
) -> list[Fit]:
    """Every part in every dtype and scheme, and whether it fits.

    Args:
        available: bytes of memory.
        parameters: parts to parameters.
        dtypes: names of dtypes that are worth a line.
        quantized: name of a scheme to the bytes of the same parts.
    """
    sizes = {
        dtype: {parts: count * BYTES[dtype] for parts, count in parameters.items()}
        for dtype in dtypes
    }
    return [
        Fit(parts, kind, count, of_parts[parts], of_parts[parts] * SPARE <= available)
        for kind, of_parts in (*sizes.items(), *quantized.items())
        for parts, count in parameters.items()
    ]


def advice(
    available: int,
    parts: str = "all",
    dtype: str = "float32",
    parameters: Mapping[str, int] = PARAMETERS_14B,
    quantized: Mapping[str, Mapping[str, int]] = QUANTIZED_14B,
) -> str | None:
    """What to load in place of parts that do not fit; None where they do.

    Args:
        available: bytes of memory.
        parts, dtype: what was asked for.
        parameters: parts to parameters.
        quantized: name of a scheme to the bytes of the same parts.
    """
    dtypes = dict.fromkeys((dtype, "float32", "bfloat16"))
    table = fitting(available, parameters, dtypes, quantized)
    asked = next(each for each in table if (each.parts, each.dtype) == (parts, dtype))
    if asked.fits:
        return None
    text = f"{asked} and a small batch do not fit into {available / 1e9:.1f} GB"
    fits = [each for each in table if each.fits and each.parameters <= asked.parameters]
    if not fits:
        return f"{text}; no part of it does, in any dtype or form"
    # The most of the model first, and of what is as large, the most bits.
    fits.sort(key=lambda each: (-each.parameters, -each.nbytes))
    most: dict[str, Fit] = {}  # a scheme with the most that fits by it, and no smaller parts
    named = [
        each for each in fits if each.dtype in BYTES or most.setdefault(each.dtype, each) is each
    ]
    return f"{text}; these do: {', '.join(map(str, named))}"
