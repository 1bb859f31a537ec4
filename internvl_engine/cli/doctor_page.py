"""The page that `internvl doctor` prints."""

from typing import Any

from .console import print_table, print_title, show
from .doctor import OPTIONAL


def show_page(found: dict[str, Any]) -> None:
    """Prints what `examine` found."""
    show(f"internvl_engine {found['internvl_engine']}, Python {found['python']}")
    show(", ".join(f"{name} {version}" for name, version in found["packages"].items()))
    _show_machine(found)
    _show_what_runs(found)
    print_title("\nInternVL-14B here: gigabytes of weights, * where they do not fit in memory")
    _show_14b(found["internvl_14b"])
    for device, advice in found["advice"].items():
        if advice is not None:
            instead = "read from disk at every use" if device == "cpu" else "takes device_map"
            show(f"  {device}: {advice} (what does not fit is {instead})")
    if any(not row["fits"] for row in found["internvl_14b"]):
        show(
            "  int8 and int4: from_pretrained(..., quantize=) quantizes while it loads; `internvl "
            "convert --quantize` writes a checkpoint once that is mapped in seconds"
        )
    print_title("\nOptional packages")
    print_table(
        ("package", "version", "for"),
        [(name, _state(found, name), OPTIONAL[name]) for name in found["optional"]],
        indent="  ",
    )
    print_title("\nProblems" if found["problems"] else "\nNo problems")
    for problem in found["problems"]:
        show(f"  {problem['what']}\n    -> {problem['do']}")


def _state(found: dict[str, Any], package: str) -> str:
    """The version of a package; - where it is not there."""
    version = found["optional"][package] or "-"
    return "broken" if package.replace("-", "_") in found["broken"] else version


def _show_14b(rows: list[dict[str, Any]]) -> None:
    """A line for every part, a column for every dtype on every device."""
    columns = list(dict.fromkeys((row["device"], row["dtype"]) for row in rows))
    lines: dict[str, list[str]] = {}
    for row in rows:
        line = lines.setdefault(row["parts"], [row["parts"], f"{row['parameters'] / 1e9:.1f}e9"])
        line.append(f"{row['weights_gb']}{'' if row['fits'] else ' *'}")
    head = ["parts", "parameters", *(f"{dtype} on {device}" for device, dtype in columns)]
    print_table(head, lines.values(), indent="  ")


def _show_machine(found: dict[str, Any]) -> None:
    cpu, memory_gb = found["cpu"], found["memory_gb"]
    print_title("\nMachine")
    show(f"  {cpu['name']}: {cpu['cores']} cores, {cpu['threads']} threads, {cpu['capability']}")
    show(f"  memory {memory_gb['total']} GB, {memory_gb['available']} GB available")
    for gpu in found["gpus"]:
        show(
            f"  {gpu['name']} (sm_{gpu['capability'].replace('.', '')}), {gpu['memory_gb']} GB, "
            f"{gpu['free_gb']} GB free"
        )
    if not found["gpus"]:
        show("  no GPU")


def _show_what_runs(found: dict[str, Any]) -> None:
    print_title("\nWhat runs")
    native, cuda, limits = found["native"], found["native_cuda"], found["cpu"]["limits"]
    built = f"built, running {native['instruction_set']}" if native["built"] else "not built"
    show(f"  native CPU kernels: {built}; PyTorch: {found['cpu']['capability']}")
    if limits:
        show("  held back by " + ", ".join(f"{name}={value}" for name, value in limits.items()))
    show(f"  native CUDA kernels: {'built' if cuda['built'] else 'not built'}")
    for device, dtype in found["dtype_auto"].items():
        show(f"  dtype=auto on {device} is {dtype}: {found['dtype_reasons'][device]}")
    if "error" not in found["operators"]:
        kinds = ["CPU", "CUDA"] if found["gpus"] else ["CPU"]
        rows = [(name, *(on.get(k, "") for k in kinds)) for name, on in found["operators"].items()]
        print_table(("operator", *kinds), rows, indent="  ")
