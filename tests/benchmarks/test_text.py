"""Prompts through QLLaMA: every way computes the same, and does the work that it says."""

import torch

from internvl_engine.benchmarks import encoder, text, timing


@torch.no_grad()
def test_prompts_are_timed_padded_and_shared(device):
    rows = text.prompts(640, templates=80)
    assert len(set(rows)) == 640 and 13 < sum(map(len, rows)) / 640 < 15
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 96}
    (case,) = text.cases(device, 40, layers=2, dtypes=[torch.float32], **sizes)
    assert set(case.providers) == {"shared prefix", "unpadded", text.PADDED, "eager"}
    assert case.baseline == text.PADDED and not timing.failures(case)
    flops = {name: encoder.counted(case.providers[name].run)[0] for name in case.providers}
    assert flops["eager"] > 4 * case.flops > 5 * flops["shared prefix"]
