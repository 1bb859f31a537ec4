"""The page that `internvl doctor` prints."""

from typing import Any

import typer

from .console import print_table, print_title
from .doctor import OPTIONAL


def show(found: dict[str, Any]) -> None:
    """Prints what `examine` found."""
    typer.echo(f"internvl_engine {found['internvl_engine']}, Python {found['python']}")
    typer.echo(", ".join(f"{name} {version}" for name, version in found["packages"].items()))
    _show_machine(found)
    _show_what_runs(found)
    print_title("\nInternVL-14B here")
    print_table(
        ("parts", "parameters", "on", "dtype", "weights", "fit in memory"),
        [
            (row["parts"], f"{row['parameters'] / 1e9:.1f}e9", row["device"], row["dtype"],
             f"{row['weights_gb']} GB", "yes" if row["fits"] else _instead(row["device"]))
            for row in found["internvl_14b"]
        ],
        indent="  ",
    )  # fmt: skip
    print_title("\nOptional packages")
    print_table(
        ("package", "version", "for"),
        [(name, version or "-", OPTIONAL[name]) for name, version in found["optional"].items()],
        indent="  ",
    )
    print_title("\nProblems" if found["problems"] else "\nNo problems")
    for problem in found["problems"]:
        typer.echo(f"  {problem['what']}\n    -> {problem['do']}")


def _instead(device: str) -> str:
    return "no: read from disk in every pass" if device == "cpu" else "no: needs device_map"


def _show_machine(found: dict[str, Any]) -> None:
    cpu, memory_gb = found["cpu"], found["memory_gb"]
    print_title("\nMachine")
    typer.echo(
        f"  {cpu['name']}: {cpu['cores']} cores, {cpu['threads']} threads, {cpu['capability']}"
    )
    typer.echo(f"  memory {memory_gb['total']} GB, {memory_gb['available']} GB available")
    for gpu in found["gpus"]:
        typer.echo(
            f"  {gpu['name']} (sm_{gpu['capability'].replace('.', '')}), {gpu['memory_gb']} GB, "
            f"{gpu['free_gb']} GB free"
        )
    if not found["gpus"]:
        typer.echo("  no GPU")


def _show_what_runs(found: dict[str, Any]) -> None:
    print_title("\nWhat runs")
    native, cuda = found["native"], found["native_cuda"]
    built = f"built, running {native['instruction_set']}" if native["built"] else "not built"
    typer.echo(f"  native CPU kernels: {built}")
    typer.echo(f"  native CUDA kernels: {'built' if cuda['built'] else 'not built'}")
    for device, dtype in found["dtype_auto"].items():
        why = "computes" if found["bfloat16_in_hardware"][device] else "does not compute"
        typer.echo(f"  dtype=auto on {device} is {dtype}: it {why} in bfloat16")
    kinds = ["CPU", "CUDA"] if found["gpus"] else ["CPU"]
    rows = [(name, *(on.get(k, "") for k in kinds)) for name, on in found["operators"].items()]
    print_table(("operator", *kinds), rows, indent="  ")
