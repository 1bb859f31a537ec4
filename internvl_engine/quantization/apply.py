"""Quantizes the weights of a model in memory, one at a time."""

from math import isfinite

from torch import Tensor, nn

from ..schemes import Rule, Scheme, scheme_of
from ..weights import KINDS, Int4Tensor, QuantizedTensor, WeightTensor, quantized_entries
from .calibration import Run, record_inputs
from .changes import Change, checksum, form_checksum, prepare_fused, put_everywhere
from .plan import Found, is_in_form, parameters, rule_of
from .report import Quantization, WeightEntry

# -8 times the largest float16 that has 8 bits, as steps of int4 have.
LARGEST_INT4 = 8 * 65280.0


def quantize(
    model: nn.Module,
    scheme: str | Scheme,
    *,
    only_faster: bool = True,
    calibration: Run | Tensor | None = None,
    fused: frozenset[int] = frozenset(),
) -> Quantization:
    """Quantizes the weights of a model, in place.

    They stay parameters of their modules, frozen: a gradient reaches x and biases, and adapters
    beside them train.

    Args:
        model: any module.
        scheme: "int8", "int4", "fp8", or a Scheme.
        only_faster: keep weights wide on devices where their form is slower; False saves memory
            all the same.
        calibration: a function that runs the model on a few pictures and prompts, or pixel_values
            (B, 3, height, width): int4 weights are rounded for what their layers are given then.
        fused: ids of nn.MultiheadAttention modules whose weights are multiplied by a fused module;
            others read them as values, and keep them wide.

    Returns:
        Which weights are in which form, and what stayed wide and why.

    Raises:
        ValueError: there is no such scheme, or a weight has values that its form cannot have (NaN,
            infinite); the model is as it was.
        TypeError: calibration is neither.
    """
    report = Quantization(scheme_of(scheme), _model=model)
    report._names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    plan = [(found, *rule_of(found, report.scheme, only_faster))
            for found in parameters(model, fused)]  # fmt: skip
    _check_finite(plan)
    inputs = {} if calibration is None else _inputs(model, plan, calibration)
    try:
        for found, rule, reason in plan:
            parameter, name = found.parameter, found.name
            before = parameter.nbytes
            if rule.form != "wide":
                seen = inputs.pop(id(found.holders[0][0]), None)
                parameter, change = _quantize(found, rule, seen)
                report._changes.append(change)
            elif not is_in_form(parameter, report.scheme.rule_for(name, parameter.shape)):
                report.other[name] = parameter.FORM
            form = parameter.FORM if isinstance(parameter, QuantizedTensor) else "wide"
            report.weights.append(WeightEntry(name, form, reason, before, parameter.nbytes))
        prepare_fused(model)
    except BaseException:
        undone = report.take_back()
        undone.left.clear()  # they were so before
        undone.warn(stacklevel=2)
        raise
    return report


def _quantize(found: Found, rule: Rule, seen: Tensor | None) -> tuple[Tensor, Change]:
    """Puts a weight in its form everywhere; `seen` are rows of what its linear was given."""
    parameter = found.parameter
    values = _dense(parameter)
    if seen is not None:
        weight = Int4Tensor.calibrated(values, seen, **rule.options)
    else:
        weight = KINDS[rule.form].quantize(values, **rule.options)
    change = Change(found.name, found.holders, parameter.dtype, parameter.requires_grad,
                    checksum(values), form_checksum(weight))  # fmt: skip
    return put_everywhere(found.holders, weight, False), change


def _check_finite(plan: list[tuple[Found, Rule, str]]) -> None:
    """Before anything is changed: what was quantized may be in no checkpoint, and is not to be
    rounded for another weight's fault.

    Raises:
        ValueError: a weight that is to be quantized has values that its form cannot have.
    """
    for found, rule, _ in plan:
        if rule.form != "wide" and found.parameter.numel():
            least, most = map(float, _dense(found.parameter).aminmax())  # NaN where any is
            if not (isfinite(least) and isfinite(most)):
                raise ValueError(f"quantize: {found.name} has NaN or infinite values")
            if rule.form == "int4" and max(-least, most) > LARGEST_INT4:
                raise ValueError(f"quantize: {found.name} has values above {LARGEST_INT4:.0f}, "
                                 "which float16 scales of int4 do not reach")  # fmt: skip


def quantized_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model with its quantized weights as they are held.

    `load_state_dict` of a model that is quantized alike takes it bit for bit. The names are those
    of a quantized checkpoint: `<weight>`, `<weight>.scales` and so on.
    """
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, QuantizedTensor):
            state |= quantized_entries(name, value)
        else:
            state[name] = value.dense() if isinstance(value, WeightTensor) else value.detach()
    return state


def _inputs(
    model: nn.Module, plan: list[tuple[Found, Rule, str]], calibration: Run | Tensor
) -> dict[int, Tensor]:
    """What the linears are given whose weights become int4, by their ids."""
    modules = (found.holders[0][0] for found, rule, _ in plan if rule.form == "int4")
    return record_inputs(model, [m for m in modules if type(m) is nn.Linear], calibration)


def _dense(parameter: Tensor) -> Tensor:
    return parameter.dense() if isinstance(parameter, WeightTensor) else parameter.detach()
