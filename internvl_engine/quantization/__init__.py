"""Gives the weights of a model in memory the forms of a scheme, says so, and takes it back.

    report = accelerate(model, quantize="int8")      with the fused modules, or
    report = quantize(model, "int8")                 alone

Weights of `nn.Linear` and `nn.Embedding` are quantized wherever they are, in known modules and in
others: a product with one goes to the form's operator whoever calls it. One at a time, so that the
model is never in memory twice. Tied weights are one weight in one form. A form that is slower than
the wide weight on a device is not used there (`slower_reason`).
"""

from ..schemes import FORMS, SCHEMES, Rule, Scheme, scheme_of
from .apply import quantize, quantized_state_dict
from .calibration import Run
from .changes import Source, Undone, widen
from .plan import slower_reason
from .report import Quantization, WeightEntry

__all__ = [
    "FORMS",
    "SCHEMES",
    "Quantization",
    "Rule",
    "Run",
    "Scheme",
    "Source",
    "Undone",
    "WeightEntry",
    "quantize",
    "quantized_state_dict",
    "scheme_of",
    "slower_reason",
    "widen",
]
