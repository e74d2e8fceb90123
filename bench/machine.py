"""What the machine can do: the dtype that its matrix products are fast in, and their rate."""

import time

import torch


def matmul_rate(dtype: torch.dtype, device: str, sizes: tuple[tuple[int, int, int], ...], repeats: int = 10) -> float:
    """FLOP/s of the fastest of these products [n, k] x [k, m]."""
    best = 0.0
    for n, k, m in sizes:
        a, b = (torch.randn(shape, device=device, dtype=dtype) for shape in ((n, k), (k, m)))
        for _ in range(repeats):
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            began = time.perf_counter()
            a @ b
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            best = max(best, 2 * n * k * m / (time.perf_counter() - began))
    return best


def pick_dtype(name: str, device: str) -> tuple[str, str]:
    """(dtype, why): 'auto' is bfloat16, but float32 where the machine has no instructions for the other and is slower."""
    if name != "auto":
        return name, "as asked"
    half, single = (matmul_rate(d, device, ((512, 512, 512),), 2) for d in (torch.bfloat16, torch.float32))
    if half < single:
        return "float32", f"because bfloat16 products have {half / single:.2f} times its rate here"
    return "bfloat16", "the default"
