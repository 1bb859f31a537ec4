"""Small cases for the tests of the benchmarks."""

import pytest
import torch

from internvl_engine.benchmarks import cases, report, timing
from internvl_engine.configuration import InternVisionConfig

ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU times")
PEAKS = timing.Peaks(copy=1e10, product=1e11)
SHORT = timing.Effort(milliseconds=0.1, rounds=2)


def tiny_vision(**changes) -> InternVisionConfig:
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 160}
    sizes |= {"num_hidden_layers": 3, "image_size": 28, "patch_size": 7}
    return InternVisionConfig(**(sizes | changes))


def some_case(**providers) -> cases.Case:
    x = torch.ones(4, 8)
    runs = {"eager": lambda: x * 2} | providers
    made = {
        name: run if isinstance(run, cases.Provider) else cases.Provider(run)
        for name, run in runs.items()
    }
    return cases.Case("double", "small", (4, 8), torch.float32, made, bytes=256)


def measured(*some: cases.Case, **options) -> report.Report:
    return report.measure({"some": lambda device: some}, effort=SHORT, **options)
