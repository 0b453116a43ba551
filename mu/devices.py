"""Choose the precision of the UNet's passes for the device at hand."""

import functools
import platform
import time
from pathlib import Path

import torch

PRECISIONS = ("auto", "no", "bf16", "fp16")


def cpu_name():
    """Return the name of the CPU, as the system reports it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def half(device):
    """Return the half precision of a device: bfloat16, or float16 on a GPU without it."""
    if torch.device(device).type != "cuda":
        return torch.bfloat16
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float16


def resolve_precision(precision, device):
    """Return the precision for accelerate: no (float32), bf16 or fp16; "auto" is decided here.

    auto: on a GPU bf16, or fp16 where the GPU lacks it; on a CPU bf16 if the CPU has instructions
    for it (AMX, AVX512-BF16) and they pay (`bf16_gain`), else float32: emulated
    bfloat16 is many times slower. Raises ValueError for an unknown precision and for fp16 on a
    CPU.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: choose {', '.join(PRECISIONS)}")
    on_cpu = torch.device(device).type == "cpu"
    if precision == "fp16" and on_cpu:
        raise ValueError("precision 'fp16' needs a GPU: choose auto, no or bf16 on a CPU")
    if precision != "auto":
        return precision
    if on_cpu:
        return cpu_precision()
    return "bf16" if half(device) == torch.bfloat16 else "fp16"


def decide_cpu_precision():
    """Return the faster precision of this CPU, and print it with the reason."""
    name = torch.backends.cpu.get_cpu_capability()
    claims_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if not claims_bf16 or name in ("DEFAULT", "AVX2"):
        print(f"precision auto: no (float32), for this CPU ({name}) has no fast bfloat16")
        return "no"
    gain = bf16_gain()
    chosen = "bf16" if gain > 1 else "no"
    print(
        f"precision auto: {chosen}, for bfloat16 is {gain:.1f} times as fast on this CPU ({name})"
    )
    return chosen


cpu_precision = functools.cache(decide_cpu_precision)  # once per process


def bf16_gain(rows=4, repetitions=3):
    """Return how many times faster a small forward and backward pass is in bfloat16.

    Measured as CPU time of one thread, which other processes do not change.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images = torch.randn(rows, 64, 16, 16)
        layers = (torch.nn.Conv2d(64, 64, 3, padding=1), torch.nn.SiLU(), torch.nn.Flatten(2))
        network = torch.nn.Sequential(*layers, torch.nn.Linear(256, 256))

    def seconds(enabled):
        began = time.thread_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = network(images).float().pow(2).mean()
        torch.autograd.grad(loss, list(network.parameters()))
        return time.thread_time() - began

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = [(seconds(False), seconds(True)) for _ in range(repetitions + 1)][1:]
    finally:
        torch.set_num_threads(threads)
    single, half_precision = (min(column) for column in zip(*times, strict=True))
    return single / half_precision


def loss_scale(precision):
    """Return the factor of losses before their gradient is taken; 1 except in float16."""
    return 1024.0 if precision == "fp16" else 1.0
