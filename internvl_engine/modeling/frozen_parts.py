"""What `freeze` set, as a table: the parts of a model, and how many of their values train."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A part: how many of its parameters train, how many are frozen, and the mode of a tower."""

    name: str
    trainable: int
    frozen: int
    mode: str = ""


@dataclass(frozen=True, repr=False)
class Freezing:
    """What `freeze` set; `print` it.

    Args:
        rows: the parts that the model has. Every parameter is counted once.
        notes: what else there is to know, a sentence each.
    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def trainable(self) -> int:
        """Number of parameters that train."""
        return sum(row.trainable for row in self.rows)

    @property
    def frozen(self) -> int:
        """Number of parameters that do not."""
        return sum(row.frozen for row in self.rows)

    @property
    def parts(self) -> dict[str, Row]:
        """The rows by the names of their parts."""
        return {row.name: row for row in self.rows}

    def __getitem__(self, part: str) -> Row:
        return self.parts[part]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __str__(self) -> str:
        total = self.trainable + self.frozen
        share = self.trainable / max(total, 1)
        cells = [("part", "trains", "frozen", "mode")]
        cells += [(r.name, f"{r.trainable:,}", f"{r.frozen:,}", r.mode) for r in self.rows]
        wide = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [f"{self.trainable:,} of {total:,} parameters train ({share:.2%})"]
        for name, trains, frozen, mode in cells:
            row = f"  {name:{wide[0]}}  {trains:>{wide[1]}}  {frozen:>{wide[2]}}  {mode}"
            lines.append(row.rstrip())
        return "\n".join(lines + [f"  {note}" for note in self.notes])

    __repr__ = __str__
