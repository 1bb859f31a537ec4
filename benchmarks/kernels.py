"""Runs the operators' benchmarks: tables, JSON, plots, and what got slower since a stored result.

python -m internvl_engine.benchmarks [OPERATOR ...] [--json FILE] [--plot DIR] [--compare FILE]
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path

import torch

from .harness import Row, as_json, machine
from .harness import run as run_cases


def operators() -> list[str]:
    """Every operator that has a bench_<operator>.py."""
    folder = Path(__file__).parent
    return sorted(path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py"))


def run(
    only: Sequence[str] = (),
    *,
    json_file: Path | None = None,
    plot: Path | None = None,
    compare: Path | None = None,
    quick: bool = False,
) -> list[Row]:
    """Benchmarks operators on this machine and prints a table.

    Args:
        only: names of operators; all where empty.
        json_file: where to store the rows, with the machine and versions.
        plot: a folder for one picture per operator.
        compare: a stored result; prints what is slower now, beyond its noise.
        quick: a tenth of the samples, to see that everything runs.

    Raises:
        ValueError: there is no such operator, or the stored result is of another machine.
    """
    unknown = set(only) - set(operators())
    if unknown:
        raise ValueError(
            f"bench: no benchmark of {', '.join(sorted(unknown))}; there are "
            f"{', '.join(operators())}"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    head = machine(device)
    stored = json.loads(compare.read_text()) if compare else None
    if stored and stored["machine"] != head:
        raise ValueError(f"bench: stored on {stored['machine']}; this machine is {head}")
    print(head)
    rows: list[Row] = []
    with torch.no_grad():
        for operator in only or operators():
            cases = import_module(f".bench_{operator}", __package__).cases(device)
            title = None
            for row in run_cases(cases, device, 30.0 if quick else 300.0):
                if title != (title := f"{row.operator}: {row.label}, {row.shape}, {row.dtype}"):
                    print(f"\n{title}")
                print(row.line(), flush=True)
                rows.append(row)
    if stored:
        print(f"\n{comparison(rows, stored)}")
    if json_file:
        result = {"machine": head, "rows": [as_json(row) for row in rows]}
        json_file.write_text(json.dumps(result, indent=1) + "\n")
    if plot:
        draw(rows, head, plot)
    return rows


def comparison(rows: Iterable[Row], stored: dict) -> str:
    """What of ours got slower than a stored result: its median beyond the stored p80 and 5 %.

    A machine that is slower today is slower for PyTorch too, so times are divided by how much eager
    PyTorch changed on the same case.
    """
    key = ("operator", "label", "dtype", "device")
    before = {(*(old[k] for k in key), old["provider"]): old for old in stored["rows"]}
    now = {(*(getattr(row, k) for k in key), row.provider): row for row in rows}
    slower, compared = [], 0
    for name, row in now.items():
        eager = (*name[:-1], "eager")
        if name not in before or eager not in before or not row.provider.startswith("ours"):
            continue
        compared += 1
        drift = now[eager].median_ms / before[eager]["median_ms"]
        old, ratio = before[name], row.median_ms / drift / before[name]["median_ms"]
        if ratio > 1.05 and row.p20_ms / drift > old["p80_ms"]:
            slower.append(f"  {' '.join(name)}: {ratio:.2f} x {old['median_ms']:.4f} ms")
    return "\n".join([f"{len(slower)} of {compared} got slower", *slower])


def draw(rows: Sequence[Row], head: str, folder: Path) -> None:
    """One picture per operator: how much faster than eager each provider is on each case."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'internvl-engine[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    for operator in dict.fromkeys(row.operator for row in rows):
        mine = [row for row in rows if row.operator == operator]
        names = list(dict.fromkeys(f"{row.label}\n{row.dtype}" for row in mine))
        providers = list(dict.fromkeys(row.provider for row in mine))
        eager = {f"{r.label}\n{r.dtype}": r.median_ms for r in mine if r.provider == "eager"}
        figure, axes = pyplot.subplots(figsize=(9, 1 + 0.25 * len(names) * len(providers)))
        height = 0.8 / len(providers)
        for index, provider in enumerate(providers):
            found = [(f"{r.label}\n{r.dtype}", r) for r in mine if r.provider == provider]
            places = [names.index(name) + index * height for name, _ in found]
            speed = [eager[name] / row.median_ms for name, row in found]
            bars = axes.barh(places, speed, height, label=provider)
            axes.bar_label(bars, [f"{row.median_ms:.3g} ms" for _, row in found], fontsize=6)
        axes.set_yticks([i + 0.4 - height / 2 for i in range(len(names))], names, fontsize=7)
        axes.invert_yaxis()
        axes.axvline(1, color="black", linewidth=0.5)
        axes.set_xlabel("speed, eager PyTorch = 1")
        axes.set_title(f"{operator}\n{head}", fontsize=8)
        axes.legend(fontsize=7)
        figure.tight_layout()
        figure.savefig(folder / f"{operator}.png", dpi=150)
        pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m internvl_engine.benchmarks", description="Benchmark the operators."
    )
    parser.add_argument("operators", nargs="*", help="which; all by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="store the rows here")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw one picture per operator")
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="say what got slower than FILE"
    )
    parser.add_argument("--quick", action="store_true", help="few samples: does everything run?")
    options = parser.parse_args(arguments)
    try:
        run(
            options.operators, json_file=options.json, plot=options.plot,
            compare=options.compare, quick=options.quick,
        )  # fmt: skip
    except (ValueError, ImportError, FileNotFoundError) as error:
        parser.error(str(error))
    return 0
