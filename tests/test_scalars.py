"""Scalar arguments: whatever torch makes of them, a result or an error, and the same one."""

import math

import pytest
import torch
import torch.nn.functional as F
from operations import DTYPES, assert_same, kept_by

import relu_ext

# Each has torch's function of the same arguments.
FUNCTIONS = {
    "hardtanh": (relu_ext.hardtanh, F.hardtanh),
    "threshold": (relu_ext.threshold, F.threshold),
    "leaky_relu": (relu_ext.leaky_relu, F.leaky_relu),
    "elu": (relu_ext.elu, F.elu),
    "celu": (relu_ext.celu, F.celu),
}
ONE = [-2.5, -1, -0.0, 0, 1, 1.5, 3, math.inf, -math.inf, math.nan, 1e-30, 1e-300, 7e4, 1e39, 1e300, 2**53 + 1, 2**70]
ONE += [2**54 + 2**30 + 1]  # as a double it is halfway between two floats, which it is not
ONE += [True, False, torch.tensor(0.5), torch.tensor([0.5]), "0.5", None, 1j]
TWO = [(-1, 1), (1, 1), (1, -1), (-math.inf, math.inf), (math.nan, 1.0), (0.0, math.nan), (-1e300, 1e300), (0, 7e4)]
TWO += [(0.3, 0.3), (-0.0, 0.0), (True, 2), (torch.tensor(-0.5), 1), ("0", 1), (2**53 + 1, 2**54)]
CASES = [(name, (scalar,)) for name in ("leaky_relu", "elu", "celu") for scalar in ONE]
CASES += [(name, scalars) for name in ("hardtanh", "threshold") for scalars in TWO]


EXAMPLES = torch.tensor([-3, -0.25, -0.0, 0, 0.25, 0.3, 1, 3, 1e4], dtype=torch.float64)


def described(function, dtype, *arguments, **keywords):
    """Output and gradient, or the error."""
    input = EXAMPLES.to(dtype).requires_grad_()
    try:
        output = function(input, *arguments, **keywords)
        (grad,) = torch.autograd.grad(output, input, torch.full_like(output, 0.5))
    except Exception as error:
        return type(error), str(error).removeprefix("_")  # F.threshold's own name is _threshold
    return output.detach(), grad


def assert_alike(ours, theirs, exact):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        if not isinstance(b, torch.Tensor):
            assert a == b
        elif exact:
            assert_same(a, b)
        else:  # exponentials, of both sides a few units in the last place from the truth
            torch.testing.assert_close(a, b, rtol=8 * torch.finfo(b.dtype).eps, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, scalars", CASES, ids=str)
def test_any_scalar(name, scalars, dtype):
    ours, theirs = (described(f, dtype, *scalars) for f in FUNCTIONS[name])
    if name == "celu" and dtype == torch.float64 and isinstance(ours[0], torch.Tensor):
        ours, theirs = ours[:1], [F.celu(EXAMPLES.to(dtype), *scalars)]  # its gradient divides by alpha in float32
    assert_alike(ours, theirs, name not in ("elu", "celu"))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_keywords(name):
    names = {"hardtanh": ("min_val", "max_val"), "threshold": ("threshold", "value")}.get(name)
    names = names or ("negative_slope" if name == "leaky_relu" else "alpha",)
    keywords = dict(zip(names, (0.25, 0.75), strict=False))
    ours, theirs = FUNCTIONS[name]
    assert_alike(*(described(f, torch.float32, **keywords) for f in (ours, theirs)), name not in ("elu", "celu"))
    assert_alike(*(described(f, torch.float32, wrong=1) for f in (ours, theirs)), True)


def test_threshold_has_no_defaults():
    ours, theirs = (described(f, torch.float32) for f in FUNCTIONS["threshold"])
    assert ours == theirs and ours[0] is TypeError


@pytest.mark.parametrize("build", [torch.nn.Hardtanh, relu_ext.Hardtanh])
def test_deprecated_names(build):
    with pytest.warns(FutureWarning, match="`min_value` is deprecated"):
        module = build(min_value=-2.0)
    assert module.min_val == -2


@pytest.mark.parametrize("arguments", [(1.0, 1.0), (2.0, 1.0)])
def test_module_refuses_an_empty_range(arguments):
    with pytest.raises(AssertionError):
        torch.nn.Hardtanh(*arguments)
    with pytest.raises(AssertionError):
        relu_ext.Hardtanh(*arguments)


@pytest.mark.parametrize("alpha", [-0.5, -2])
def test_elu_in_place_has_no_gradient_for_negative_alpha(alpha):
    def error(function_):
        output = function_(torch.randn(9, requires_grad=True) * 1, alpha)
        with pytest.raises(RuntimeError) as error:
            output.sum().backward()
        return str(error.value)

    assert error(relu_ext.elu_) == error(F.elu_)
    input = torch.linspace(-2, 2, 9)
    torch.testing.assert_close(relu_ext.elu_(input.clone(), alpha), F.elu(input, alpha))


@pytest.mark.parametrize("slope", [-0.5, -2.0])
def test_leaky_relu_in_place_has_a_gradient_for_negative_slopes(slope):
    """Where torch raises in the backward pass: the bits say what the output does not."""
    input = torch.linspace(-2, 2, 9, requires_grad=True)
    output, kept = kept_by(relu_ext.leaky_relu_, input * 1, slope)
    output.sum().backward()
    assert_same(input.grad, torch.where(input > 0, 1.0, slope))
    assert kept[-1].dtype == torch.uint8


def test_celu_of_negative_alpha_is_torchs():
    output = relu_ext.celu(torch.ones(3, requires_grad=True), -1.5)
    assert output.grad_fn.name() == "CeluBackward0"
