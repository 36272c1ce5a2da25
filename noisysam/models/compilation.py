"""Compiled networks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


@torch.library.custom_op("noisysam::once", mutates_args=())
def once(values: Tensor) -> Tensor:
    """``values`` as they are. The compiler for CPUs writes what leads to a small tensor into every loop that reads it,
    roots and divisions for each pixel; past this call it reads the results."""
    return values.clone()


once.register_fake(torch.empty_like)


once.register_autograd(lambda context, gradient: once(gradient))


LANES = 32  # bfloat16 numbers in a vector of a CPU


COMPILED_FORMS = 1000  # shapes and the like, in a process; past torch's own limit of 8 the rest stays uncompiled


def compiled(module: nn.Module) -> Callable[[Tensor], Any]:
    """``module`` compiled for inputs of fixed shapes, each new shape anew.

    On a CPU the pixels of a layer with few channels fill half a vector or less. A kernel that writes into what it reads
    then takes up to three times as long (most likely each load waits for the store before it, whose vector reaches over
    it): such networks get memory of their own for results, which saves a tenth of a step of ResNet-32.
    """
    import torch._dynamo  # takes a second

    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = COMPILED_FORMS
    narrow = any(isinstance(m, nn.Conv2d) and m.out_channels < LANES for m in module.modules())
    on_cpu = next(module.parameters()).device.type == "cpu"
    options: dict[str, Any] | None = {"inplace_buffers": False} if narrow and on_cpu else None
    found: Callable[[Tensor], Any] = torch.compile(module, dynamic=False, options=options)
    return found


def _compiled_for_cpu(x: Tensor) -> bool:
    return torch.compiler.is_compiling() and x.device.type == "cpu"
