"""Why a node stays as traced: kinds of tensors, devices and dtypes. Imports `graph.nodes`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from healpass.graph.nodes import is_floating, op_name, subclass_name


def why_not(operands: list[Tensor]) -> str | None:
    """Why a matmul of these operands cannot become a `heal::` operator; None if it can."""
    checks = (_why_not_kind, _why_not_device, _why_not_dtype)
    return next((reason for check in checks if (reason := check(operands))), None)


def why_not_here(node: Node) -> str | None:
    """Why nothing in the graph of a node becomes a `heal::` operator; None if it can."""
    if any(op_name(other) == "_enter_dual_level" for other in node.graph.nodes):
        return "forward-mode differentiation in this graph: heal operators carry no tangents"
    return None


def _why_not_kind(operands: list[Tensor]) -> str | None:
    for operand in operands:
        if torch._C._functorch.is_functorch_wrapped_tensor(operand):
            return "inside a torch.func transform (vmap, grad)"
        kind = subclass_name(operand)
        if kind:
            return f"operand is a {kind}: its own class defines its matmul"
        if operand.layout != torch.strided:
            return f"operand has the layout {str(operand.layout).removeprefix('torch.')}"
    return None


def _why_not_device(operands: list[Tensor]) -> str | None:
    for operand in operands:
        reason = device_reason(operand.device.type, torch.version.hip)
        if reason:
            return reason
    return None


def device_reason(device_type: str, hip: str | None) -> str | None:
    """Why nothing is rewritten on a device; None on CPU and on NVIDIA CUDA."""
    if device_type == "cuda":
        return "ROCm is not supported" if hip else None
    return None if device_type == "cpu" else f"device {device_type!r} is not supported"


def _why_not_dtype(operands: list[Tensor]) -> str | None:
    for operand in operands:
        if operand.dtype == torch.float64:
            return "float64 is wider than FP32 already"
        if not is_floating(operand) or operand.element_size() < 2:
            return f"{str(operand.dtype).removeprefix('torch.')} operands"
    return None
