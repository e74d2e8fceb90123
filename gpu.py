"""What a GPU has and a CPU has not: memory and kernels of its own, launches that can be captured."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def device_memory(device: torch.device) -> int:
    """Bytes of a GPU, 0 for a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def free_on_gpu(device: torch.device) -> int:
    """Bytes that a GPU has free, with what PyTorch keeps there unused."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def onto(x: Tensor, device: str | torch.device) -> Tensor:
    """The tensor there. From pinned memory, so that a GPU takes it when it comes to it and nothing waits."""
    x = x.pin_memory() if torch.device(device).type == "cuda" and not x.is_cuda else x
    return x.to(device, non_blocking=True)


def has_flash(device: torch.device) -> bool:
    """Whether `varlen_attn` runs there: on GPUs from compute capability 8.0, which is not that of a T4 or V100."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def has_graphs(device: torch.device) -> bool:
    """Whether what is launched there can be `captured`."""
    return device.type == "cuda"


def captured(step: Callable[[], Tensor]) -> Callable[[], Any]:
    """What does again all that `step` does, on the same memory, in one launch: a CUDA graph. Nothing is done yet."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL asks the GPU meanwhile
        step()
    return graph.replay


def has_wide_products(device: torch.device) -> bool:
    """Whether a product of bfloat16 or float16 can be given as it is summed, in float32."""
    return device.type == "cuda"


class MasterProduct(torch.autograd.Function):
    """x W^T of float32 master weights W [E, D] in the dtype of x [..., N, D]. W's gradient leaves its product in float32: in
    the dtype of x it would be rounded first, and then widened in another pass over memory."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        used = weight.to(x.dtype)
        ctx.save_for_backward(x, used)
        return F.linear(x, used)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (x, used), (g,) = ctx.saved_tensors, gradients
        return g @ used, torch.mm(g.flatten(0, -2).T, x.flatten(0, -2), out_dtype=torch.float32)
