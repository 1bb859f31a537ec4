"""Runs cases: a table, JSON rows, pictures, and what got slower than a stored result."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .cases import Case, Finding
from .timing import Effort, Peaks, Row, failures, machine, peaks, rows

# By name: what gives its cases on a device.
Suites = Mapping[str, Callable[[str], Iterable[Case | Finding]]]


@dataclass
class Report:
    """What a run found; it grows while the run goes on.

    Attributes:
        machine: and versions.
        peaks: of the machine in this run, by dtype.
        rows: of all providers that computed what eager does.
        failed: what broke or was wrong, a line each.
        findings: what was measured once.
    """

    machine: str
    peaks: dict[str, Peaks] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """The form in which a result is stored."""
        return asdict(self)


def measure(
    suites: Suites,
    *,
    effort: Effort | None = None,
    json_file: Path | None = None,
    plot: Path | None = None,
    compare: Path | None = None,
) -> Report:
    """Checks and times the cases of all suites on this machine, and prints a table.

    What breaks or computes something else than eager is left out of the times and listed in the
    end; it stops nothing else.

    Args:
        suites: by name.
        effort: how long to time.
        json_file: where to store the rows, after every suite, with machine, versions and peaks.
        plot: a folder for one picture per operator.
        compare: a stored result; prints what is slower now, beyond its noise.

    Raises:
        ValueError: the stored result is of another machine.
        ImportError: pictures are wanted and there is no matplotlib.
    """
    if plot is not None:
        from .plots import draw
    effort = effort or Effort()
    if effort.processor_time:
        torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = Report(machine(device))
    stored = json.loads(compare.read_text()) if compare else None
    if stored and stored["machine"] != report.machine:
        raise ValueError(f"bench: stored on {stored['machine']}; this is {report.machine}")
    print(report.machine)
    for name, cases in suites.items():
        _run_suite(name, cases, device, effort, report)
        if json_file:
            json_file.write_text(json.dumps(report.document(), indent=1) + "\n")
    if stored:
        print(f"\n{comparison(report.rows, stored)}")
    if plot is not None:
        draw(report.rows, report.machine, plot)
    if report.failed:
        print("\n".join(["\nfailed:", *report.failed]))
    return report


def _run_suite(
    name: str, cases: Callable[[str], Iterable[Case | Finding]], device: str, effort: Effort,
    report: Report,
) -> None:  # fmt: skip
    try:
        with torch.no_grad():
            for case in cases(device):
                if isinstance(case, Finding):
                    print(f"\n{case.operator}: {case.label}\n{case.text}", flush=True)
                    report.findings.append(case)
                else:
                    _run(case, device, effort, report)
    except Exception as error:  # noqa: BLE001  the other suites are still worth their time
        _fail(report, f"{name}: {type(error).__name__}: {error}")


def _run(case: Case, device: str, effort: Effort, report: Report) -> None:
    dtype = str(case.dtype).removeprefix("torch.")
    if dtype not in report.peaks:
        report.peaks[dtype] = peaks(device, case.dtype, effort)
        print(f"{dtype} peaks: {report.peaks[dtype]}")
    print(f"\n{case.operator}: {case.label}, {case.shape}, {dtype}, speed over {case.baseline}")
    broken = failures(case)
    for name, reason in broken.items():
        _fail(report, f"{case.operator}, {case.label}, {name}: {reason}")
    for row in rows(case, device, report.peaks[dtype], effort, tuple(broken)):
        print(row.line(), flush=True)
        report.rows.append(row)


def _fail(report: Report, message: str) -> None:
    report.failed.append(f"  {message}")
    print(f"  FAILED {message}", flush=True)


def comparison(rows: Sequence[Row], stored: Mapping[str, Any]) -> str:
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
