"""Pictures of what was measured: for every case the time of each provider, on a logarithmic axis.

A mark is a median, its whisker p20 to p80; the black tick is the least time that the machine's
measured peak allows. Where cases differ in one quantity, a second picture shows how time grows with
it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .timing import Row

try:
    import matplotlib
except ImportError as error:
    raise ImportError("plots need matplotlib: pip install 'internvl-engine[bench]'") from error
matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter, LogLocator

OURS = ("#c1121f", "#f77f00", "#8f2d56", "#fcbf49")
THEIRS = ("#1d6fa5", "#2a9d8f", "#6a4c93", "#7f5539", "#90be6d", "#577590", "#b5838d")
EAGER = "#8a8a8a"
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
ROW = 0.17  # inches of height a provider


def draw(rows: Sequence[Row], machine: str, folder: Path) -> list[Path]:
    """Writes <operator>.png for every operator of the rows; returns the files.

    Args:
        rows: of a report.
        machine: on which they were measured, for the head of each picture.
        folder: made where it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for operator in dict.fromkeys(row.operator for row in rows):
        mine = [row for row in rows if row.operator == operator]
        files.append(folder / f"{operator}.png")
        figure = picture(operator, mine, machine)
        figure.savefig(files[-1], dpi=150)
        pyplot.close(figure)
        if len({row.varies for row in mine if row.varies}) > 1:
            files.append(folder / f"{operator}_growth.png")
            figure = growth(operator, mine, machine)
            figure.savefig(files[-1], dpi=150)
            pyplot.close(figure)
    return files


def growth(operator: str, rows: Sequence[Row], head: str) -> Any:
    """One figure with a line a provider: time of a call by what varies, p20 to p80 shaded."""
    rows = [row for row in rows if row.varies]
    providers = sorted(dict.fromkeys(row.provider for row in rows), key=_rank)
    colors = _colors(providers)
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for provider in providers:
        mine = sorted((r for r in rows if r.provider == provider), key=_amount)
        amounts, color = [_amount(row) for row in mine], colors[provider]
        axes.plot(amounts, [row.median_ms for row in mine], "o-", color=color, label=provider,
                  markersize=4, linewidth=1.8 if provider.startswith("ours") else 1.0)  # fmt: skip
        low, high = [row.p20_ms for row in mine], [row.p80_ms for row in mine]
        axes.fill_between(amounts, low, high, color=color, alpha=0.15, linewidth=0)
    ticks = sorted({_amount(row) for row in rows})
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter(FuncFormatter(_duration))
    axes.yaxis.set_minor_formatter("")
    axes.set_xlabel(next(row.varies[0] for row in rows if row.varies), fontsize=8)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
    title = f"{operator}: time of one call, lower is better"
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    axes.set_title(head, loc="left", fontsize=6, color="#555555")
    return figure


def _amount(row: Row) -> float:
    return row.varies[1] if row.varies else 0.0


def picture(operator: str, rows: Sequence[Row], head: str) -> Any:
    """One figure with all cases of an operator."""
    cases = list(dict.fromkeys(_name(row) for row in rows))
    providers = sorted(dict.fromkeys(row.provider for row in rows), key=_rank)
    colors = _colors(providers)
    inches = 1.7 + len(cases) * (len(providers) + 1.5) * ROW
    figure, axes = pyplot.subplots(figsize=(10, inches), layout="constrained")
    for case, name in enumerate(cases):
        mine = sorted((r for r in rows if _name(r) == name), key=lambda r: _rank(r.provider))
        top = case - (len(mine) - 1) / 2 * (step := 0.8 / len(providers))
        for place, row in enumerate(mine):
            _mark(axes, row, top + place * step, colors[row.provider])
        _least_time(axes, mine, case)
        if case % 2:
            axes.axhspan(case - 0.5, case + 0.5, color="#f4f4f4", zorder=0)
    axes.set_yticks(range(len(cases)), cases, fontsize=8)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    _scale(axes, rows)
    handles = [
        axes.plot([], [], "o", color=colors[provider], label=provider)[0] for provider in providers
    ]
    handles += axes.plot(
        [], [], "|", color="black", markersize=12, label="least that the peaks allow"
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    title = f"{operator}: time of one call, left is better"
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    axes.set_title(head, loc="left", fontsize=7.5, color="#555555")
    return figure


def _mark(axes: Any, row: Row, y: float, color: str) -> None:
    ours = row.provider.startswith("ours")
    axes.plot([row.p20_ms, row.p80_ms], [y, y], color=color, linewidth=1.2, alpha=0.6)
    axes.plot(row.median_ms, y, "o", color=color, markersize=6 if ours else 4, zorder=3)
    if ours:
        share = "" if row.share_of_peak is None else f", {row.share_of_peak:.0%} of peak"
        text = f"{row.speed:.2f} × {row.baseline}{share}"
        axes.annotate(
            text, (row.p80_ms, y), (6, 0), textcoords="offset points", fontsize=6.5,
            va="center", color=color,
        )  # fmt: skip


def _least_time(axes: Any, rows: Sequence[Row], case: int) -> None:
    best = next((r.share_of_peak * r.median_ms for r in rows if r.share_of_peak), None)
    if best is not None:
        axes.plot([best, best], [case - 0.45, case + 0.45], color="black", linewidth=1.5)


def _scale(axes: Any, rows: Sequence[Row]) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(_duration))
    axes.xaxis.set_minor_formatter("")
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * (high / low) ** 0.25)  # room for the words beside our marks
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _duration(milliseconds: float, _: object) -> str:
    if milliseconds < 0.9995:
        return f"{milliseconds * 1e3:.3g} µs"
    return f"{milliseconds:.3g} ms" if milliseconds < 999.5 else f"{milliseconds / 1e3:.3g} s"


def _name(row: Row) -> str:
    return f"{row.label}\n{' × '.join(map(str, row.shape))}, {DTYPES.get(row.dtype, row.dtype)}"


def _rank(provider: str) -> tuple[int, str]:
    return (0 if provider.startswith("ours") else 1 if provider == "eager" else 2), provider


def _colors(providers: Sequence[str]) -> dict[str, str]:
    mine = [provider for provider in providers if provider.startswith("ours")]
    rivals = [provider for provider in providers if provider not in (*mine, "eager")]
    colors = {name: OURS[i % len(OURS)] for i, name in enumerate(mine)} | {"eager": EAGER}
    return colors | {name: THEIRS[i % len(THEIRS)] for i, name in enumerate(rivals)}
