"""Compiles the kernels for GPUs that are not there, and reads what the compiler made of them.

    python -m internvl_engine.kernels.triton._cross_compile [--targets sm90 ...] [--operator NAME]
                                                            [--dtypes bf16 fp16 fp32] [--sample]
                                                            [--markdown FILE] [--json FILE]

Every file of this folder contributes `cross_compile_cases(architecture)`, its default
configurations at the model's shapes in bf16; fp16 and fp32 are compiled for sm90. For each the
table has registers per thread, stack (spills), shared memory and matrix instructions. `problems()`
says what is wrong with a row: stack, shared memory beyond the chip's limit, or a product that does
not reach the matrix unit.
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from itertools import islice
from pathlib import Path

from ._tuning import ARCHITECTURES, OPTIONS, Config, target

# Of a program. An A100 has 163 KiB, but its defaults serve 8.6, 8.9 and 12.0 too, which have 99.
SHARED_LIMIT = {"sm80": 99 << 10, "sm90": 227 << 10, "sm100": 227 << 10, "gfx942": 64 << 10}
DTYPES = ("bf16", "fp16", "fp32")
MATRIX = {
    "sm80": r"\bmma\.sync",
    "sm90": r"\bwgmma\.mma_async",
    "sm100": r"\btcgen05\.mma",
    "gfx942": r"\bv_mfma",
}


@dataclass(frozen=True)
class Case:
    """One kernel at one configuration.

    Attributes:
        operator: the stem of its file.
        name: what tells it from the operator's other cases, as "forward C=3200 bf16".
        kernel: the @triton.jit function.
        arguments: every parameter by name. A string is the type of a run-time argument: "*bf16"
            (aligned to 16 bytes, as torch allocates), "i32", "fp32", and "i32:16" for an integer
            that is a multiple of 16 at the model's shapes. Anything else is the value of a
            tl.constexpr.
        config: the tunable tl.constexpr values with num_warps and num_stages, as DEFAULTS has them.
        matrix: whether it must use the architecture's matrix instructions.
        fp32: the configuration of float32, and the arguments that follow from it; None where they
            are the same.
    """

    operator: str
    name: str
    kernel: object
    arguments: Mapping[str, object]
    config: Config = field(default_factory=dict)
    matrix: bool = False
    fp32: tuple[Config, Mapping[str, object]] | None = None

    def of(self, dtype: str) -> "Case":
        """The same in another dtype than bf16, which IEEE float32 multiplies without the unit."""
        config, changes = self.fp32 if dtype == "fp32" and self.fp32 else (self.config, {})
        kinds = {name: f"*{dtype}" for name, kind in self.arguments.items() if kind == "*bf16"}
        return replace(
            self,
            name=self.name.replace("bf16", dtype),
            arguments={**self.arguments, **kinds, **changes},
            config=config,
            matrix=self.matrix and dtype != "fp32",
        )


@dataclass(frozen=True)
class Row:
    """What one case needs on one architecture: per thread, but shared bytes per program."""

    operator: str
    case: str
    architecture: str
    registers: int
    stack: int
    shared: int
    matrix: int
    needs_matrix: bool
    warps: int

    def resident(self) -> int:
        """How many programs a multiprocessor of NVIDIA's runs at once; registers come by eights."""
        registers = -(-self.registers // 8) * 8 * 32 * self.warps
        shared = (self.shared + 1024) * 65536 // (SHARED_LIMIT[self.architecture] + 1024)
        return 65536 // max(registers, shared, self.warps * 1024)

    def problems(self) -> list[str]:
        """What must not ship, in words."""
        limit = SHARED_LIMIT[self.architecture]
        wrong = {
            f"{self.stack} bytes of stack": self.stack > 0,
            f"{self.shared} bytes of shared memory, {limit} there are": self.shared > limit,
            "no matrix instruction": self.needs_matrix and self.matrix == 0,
        }
        label = f"{self.operator} {self.case} on {self.architecture}"
        return [f"{label}: {text}" for text, is_so in wrong.items() if is_so]


def compile_case(case: Case, architecture: str) -> Row:
    """Compiles one case; triton's disk cache makes the second time quick."""
    import triton
    from triton.compiler import ASTSource

    names = case.kernel.arg_names  # type: ignore[attr-defined]
    options = OPTIONS | {k: v for k, v in case.config.items() if k not in names}
    values = {**case.arguments, **{k: v for k, v in case.config.items() if k in names}}
    assert set(values) == set(names), (case.name, set(values) ^ set(names))
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(names):
        value = values[name]
        if not isinstance(value, str):
            signature[name], constants[(index,)] = "constexpr", value
            continue
        signature[name], _, multiple = value.partition(":")
        if value.startswith("*") or multiple == "16":
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(case.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target(architecture), options=options)
    registers, stack = _amd(compiled) if "amdgcn" in compiled.asm else _nvidia(compiled)
    assembly = compiled.asm["amdgcn" if "amdgcn" in compiled.asm else "ptx"]
    matrix = len(re.findall(MATRIX[architecture], assembly))
    return Row(
        case.operator, case.name, architecture, registers, stack, compiled.metadata.shared,
        matrix, case.matrix, compiled.metadata.num_warps,
    )  # fmt: skip


def _nvidia(compiled) -> tuple[int, int]:
    """(registers, stack) from the machine code. Spilled registers are on the stack."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tools / "cuobjdump"), "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return tuple(int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore


def _amd(compiled) -> tuple[int, int]:
    text = compiled.asm["amdgcn"]
    names = (r"\.vgpr_count:", r"\.private_segment_fixed_size:")
    return tuple(int(re.search(rf"{name}\s*(\d+)", text)[1]) for name in names)  # type: ignore


def cases(
    architecture: str, operator: str | None = None, one_each: bool = False, dtype: str = "bf16"
) -> Iterator[Case]:
    """The cases of every file of this folder, or of one.

    All of a file, or one: the first that needs the matrix unit, where there is such a case. In
    another dtype than bf16, those that have a part of it.
    """
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        if operator in (None, path.stem):
            module = import_module(f".{path.stem}", __package__)
            found = list(module.cross_compile_cases(architecture))
            if dtype != "bf16":
                found = [case.of(dtype) for case in found if "bf16" in case.name]
            if one_each:
                found = sorted(found, key=lambda case: not case.matrix)[:1]  # stable
            yield from found


Job = tuple[str, str | None, bool, str, int]


def compile_all(
    architectures: Sequence[str], operator: str | None = None, sample: bool = False,
    dtypes: Sequence[str] = DTYPES,
) -> list[Row]:  # fmt: skip
    """Every case on every architecture, on all cores; `sample`: one of each file but bf16 on sm90.

    Other dtypes than bf16 on sm90 only.
    """
    jobs: list[Job] = []
    for architecture in architectures:
        for dtype in dtypes if architecture == "sm90" else set(dtypes) & {"bf16"}:
            one_each = sample and (architecture, dtype) != ("sm90", "bf16")
            some = (architecture, operator, one_each, dtype)
            jobs += [(*some, index) for index, _ in enumerate(cases(*some))]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_compile_job, jobs))


def _compile_job(job: Job) -> Row:
    """One case by its number: kernels do not travel between processes."""
    architecture, operator, one_each, dtype, index = job
    found = cases(architecture, operator, one_each, dtype)
    return compile_case(next(islice(found, index, None)), architecture)


def markdown(rows: Iterable[Row]) -> str:
    """The table as the repository keeps it."""
    import triton

    lines = [
        f"# Cross-compiled kernels (triton {triton.__version__})",
        "",
        "Default configurations, compiled without a GPU: nothing here was run. Registers and stack "
        "bytes per thread, shared memory and warps per program, matrix instructions in the code.",
        "",
        "| operator | case | target | registers | stack | shared KiB | warps | matrix |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        shared = f"{r.shared / 1024:.1f}"
        names = (r.operator, r.case, r.architecture)
        values = (*names, r.registers, r.stack, shared, r.warps, r.matrix)
        lines.append("| " + " | ".join(map(str, values)) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile every kernel's defaults without a GPU.")
    parser.add_argument("--targets", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--operator", help="only this one")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument(
        "--sample",
        action="store_true",
        help="one case of each file but for bf16 on sm90",
    )
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 leaves nothing to compile; unset it")
    rows = compile_all(arguments.targets, arguments.operator, arguments.sample, arguments.dtypes)
    rows.sort(key=lambda row: (row.operator, row.case, ARCHITECTURES.index(row.architecture)))
    table = markdown(rows)
    if arguments.markdown:
        arguments.markdown.write_text(table)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    problems = [problem for row in rows for problem in row.problems()]
    sys.stdout.write("\n".join([table, *problems]) + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
