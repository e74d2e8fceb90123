"""What the machine can do, the dtype that its matrix products are fast in and their rate; what this process holds of it."""

import time
from pathlib import Path

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
    """(dtype, why, with the rates): 'auto' is bfloat16, but float32 where products in bfloat16 are slower. The two are timed
    in turns and the best of many counts, so that other work on the machine does not decide."""
    if name != "auto":
        return name, "as asked"
    half = single = 0.0
    for _ in range(20):
        half = max(half, matmul_rate(torch.bfloat16, device, ((512, 512, 512),), 2))
        single = max(single, matmul_rate(torch.float32, device, ((512, 512, 512),), 2))
    rates = f"products: bfloat16 {half / 1e12:.2f}, float32 {single / 1e12:.2f} TFLOP/s"
    return ("float32" if half < single else "bfloat16"), rates


def resident(key: str) -> int:
    """VmRSS or VmHWM (the high-water mark of it), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit("error: peak memory on a CPU is read from /proc/self/status; Linux only")
