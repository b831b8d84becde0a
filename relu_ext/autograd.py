"""The operations as ``torch.autograd.Function`` over the registered operators, for those who build on them.

``relu_ext.relu`` takes the same kernels through a node in C++, at a small part of the host time, and composes with
everything (functorch's transforms, for instance) that a Function with hidden intermediates does not.
"""

from typing import Any

import torch
from torch import Tensor


class ReLUFunction(torch.autograd.Function):
    """``ReLUFunction.apply(input)``: :func:`relu_ext.relu` over ``torch.ops.relu_ext``.

    input: float32, float64, float16 or bfloat16 (else TypeError), any shape and strides. The output is dense. One bit
    an element is kept for backward, in the memory order of the output. Differentiable twice. It has no forward mode:
    Dynamo does not trace a Function with a ``jvp``; ``relu_ext.relu`` has both.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        output, bits = torch.ops.relu_ext.relu_forward(input)
        ctx.save_for_backward(bits)
        ctx.stride = output.stride()
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (bits,) = ctx.saved_tensors
        return torch.ops.relu_ext.relu_backward(grad, bits, ctx.stride)
