"""What comes out: stored rows, comparisons, pictures, and `internvl bench`."""

import json
from dataclasses import replace

import pytest
import torch
from benchmark_cases import PEAKS, measured, some_case, tiny_vision

from internvl_engine import reference
from internvl_engine.benchmarks import cases, encoder, report
from internvl_engine.cli import main
from internvl_engine.kernels import _library


def test_compare_says_what_got_slower_and_forgives_a_slow_machine():
    found = measured(some_case(ours=lambda: torch.full((4, 8), 2.0)))
    before = [replace(row, median_ms=1.0, p20_ms=0.99, p80_ms=1.01) for row in found.rows]
    stored = json.loads(json.dumps(replace(found, rows=before).document()))
    now = [replace(row, median_ms=2.0, p20_ms=1.99, p80_ms=2.01) for row in found.rows]
    now[1] = replace(now[1], median_ms=2.08, p20_ms=2.06)  # 4 % more than eager: noise
    assert report.comparison(now, stored) == "0 of 1 got slower"
    assert [row.provider for row in now] == ["eager", "ours"]
    slower = report.comparison([before[0], now[1]], stored).splitlines()
    assert slower == ["1 of 1 got slower", "  double small float32 cpu ours: 2.08 x 1.0000 ms"]


def test_a_result_of_another_machine_is_refused(tmp_path):
    file = tmp_path / "other.json"
    file.write_text(json.dumps({"machine": "a quicker one", "rows": []}))
    with pytest.raises(ValueError, match="stored on a quicker one; this is "):
        measured(some_case(), compare=file)


def test_the_pictures_show_every_provider_and_the_least_time(tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    from internvl_engine.benchmarks import plots

    double = cases.Provider(lambda: torch.full((4, 8), 2.0))
    found = measured(some_case(**{"ours (native)": double, "F.double": double}), plot=tmp_path)
    picture = Image.open(tmp_path / "double.png")
    assert picture.width > 1000 and len(picture.convert("L").getcolors()) > 50
    figure = plots.picture("double", found.rows, "a machine")
    axes = figure.axes[0]
    assert axes.get_xscale() == "log" and "double" in figure.get_suptitle()
    assert [t.get_text() for t in axes.get_yticklabels()] == ["small\n4 × 8, fp32"]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["ours (native)", "eager", "F.double", "least that the peaks allow"]
    least = 256 / PEAKS.copy * 1e3
    assert any(list(line.get_xdata()) == pytest.approx([least] * 2) for line in axes.lines)
    times = {plots._duration(t, None) for t in (0.005, 0.5, 20.0, 5000.0)}
    assert times == {"5 µs", "500 µs", "20 ms", "5 s"}
    plots.pyplot.close(figure)


def test_a_picture_shows_how_time_grows(tmp_path):
    pytest.importorskip("matplotlib")
    from internvl_engine.benchmarks import plots

    some = [
        replace(some_case(**{"ours, int8": lambda: torch.full((4, 8), 2.0)}), varies=("ids", ids))
        for ids in (16, 4)
    ]
    found = measured(*some, plot=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"double.png", "double_growth.png"}
    figure = plots.growth("double", found.rows, "a machine")
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert set(lines) == {"ours, int8", "eager"} and axes.get_xlabel() == "ids"
    rows = [row for row in found.rows if row.provider == "eager"]
    times = {row.varies[1]: row.median_ms for row in rows}
    assert list(lines["eager"].get_xdata()) == [4, 16]
    assert list(lines["eager"].get_ydata()) == [times[4], times[16]]
    plots.pyplot.close(figure)


def bench(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit:
        main(["bench", *arguments])
    return exit.value.code or 0


def test_the_command_line_stores_prints_and_compares(tmp_path, capsys):
    file = str(tmp_path / "rows.json")
    assert bench("kernels", "swiglu", "--quick", "--json", file) == 0
    assert "speed over eager" in capsys.readouterr().out
    assert bench("kernels", "swiglu", "--quick", "--json", "-", "--compare", file) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["rows"][0]["operator"] == "swiglu" and "got slower" in err
    assert bench("kernels", "nonsense") == 1
    assert "no benchmark of nonsense; there are add_layer_norm" in capsys.readouterr().err
    assert bench("layers", "nonsense") == 1
    assert "there are vision, vision_300m, qllama" in capsys.readouterr().err


@pytest.mark.skipif(_library.native is None, reason="nothing to compare: no native kernels")
def test_a_failed_benchmark_is_exit_code_1(monkeypatch, capsys):
    monkeypatch.setattr(reference, "swiglu", lambda x: x[..., ::2] + 1)
    assert bench("kernels", "swiglu", "--quick") == 1
    assert "of the benchmarks failed" in capsys.readouterr().err


def test_the_encoder_from_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(encoder, "InternVisionConfig", tiny_vision)
    arguments = "encoder --images 1 --images 2 --layers 2 --no-compile --quick --json -".split()
    assert bench(*arguments) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["label"] for row in rows} == {
        "1 image 28 px, 2 layers", "2 images 28 px, 2 layers",
    }  # fmt: skip
    assert {row["images"] for row in rows} == {1, 2}
