"""Check before a run whether it fits a device, how long it takes, and what to change to fit."""

import math
import time
from dataclasses import dataclass
from typing import NamedTuple

import psutil
import torch

from mu.devices import half, resolve_precision
from mu.models import predict
from mu.notebooks.cost import DEFAULTS, GIB, Estimate, estimate
from mu.notebooks.trace import Tracker, blank


class Gpu(NamedTuple):
    """Data sheet of a GPU."""

    memory: float  # GiB that a program sees
    half: float  # peak in half precision, dense, TFLOP/s
    single: float  # peak in single precision, TFLOP/s
    has_bf16: bool


GPUS = {
    "T4": Gpu(14.56, 65, 8.1, False),
    "L4": Gpu(22.0, 121, 30, True),
    "A10G": Gpu(22.0, 70, 31, True),
    "RTX 3090": Gpu(23.6, 71, 36, True),
    "RTX 4090": Gpu(23.5, 165, 83, True),
    "A100-40": Gpu(39.4, 312, 19.5, True),
    "A100-80": Gpu(79.1, 312, 19.5, True),
    "H100": Gpu(79.1, 989, 67, True),
}
UNKNOWN = Gpu(0, math.nan, math.nan, True)
# share of the peak that small batches of these networks reach: a guess, right within a factor of 3
UTILISATION = 0.15
# share of a CPU's free memory for tensors: kernels and heap fragmentation take half as much again
CPU_SHARE = 0.65
RESERVE = 0.75  # GiB of a GPU for CUDA, library workspaces and fragmentation


@dataclass(frozen=True)
class Device:
    """The device that a training is checked for."""

    name: str
    usable: float  # GiB
    sheet: Gpu  # nan where a speed is unknown
    is_gpu: bool
    at_hand: bool  # else one of `GPUS`

    def resolve(self, precision):
        """Return a precision as it is, and for "auto" the one that this device would use."""
        if precision != "auto":
            return precision
        if self.at_hand:
            return resolve_precision("auto", "cuda" if self.is_gpu else "cpu")
        return self.half_precision

    @property
    def half_precision(self):
        """Return the half precision of this device."""
        return "bf16" if self.sheet.has_bf16 else "fp16"

    def guessed_speed(self, precision):
        """Return FLOP/s from the data sheet; nan for a CPU and for an unknown GPU."""
        if not self.is_gpu:
            return math.nan
        precision = self.resolve(precision)
        is_half = precision == "fp16" or (precision == "bf16" and self.sheet.has_bf16)
        peak = self.sheet.half if is_half else self.sheet.single
        return peak * 1e12 * UTILISATION


def find_device(gpu=None):
    """Return the `Device` of one of `GPUS`, or for None the device at hand.

    Raises ValueError for an unknown GPU.
    """
    if gpu is not None:
        if gpu not in GPUS:
            raise ValueError(
                f"unknown GPU {gpu!r}: choose {', '.join(GPUS)}, or None for the device at hand"
            )
        sheet = GPUS[gpu]
        return Device(gpu, sheet.memory - RESERVE, sheet, is_gpu=True, at_hand=False)
    if not torch.cuda.is_available():
        free = psutil.virtual_memory().available + psutil.Process().memory_info().rss
        return Device("this CPU", CPU_SHARE * free / GIB, UNKNOWN, is_gpu=False, at_hand=True)
    name = torch.cuda.get_device_name()
    known = (sheet for key, sheet in GPUS.items() if key.split("-")[0] in name)
    sheet = next(known, UNKNOWN)._replace(has_bf16=half("cuda") == torch.bfloat16)
    free = (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()) / GIB
    return Device(name, free - RESERVE, sheet, is_gpu=True, at_hand=True)


def guessed_speed(precision, gpu=None):
    """Return FLOP/s of one of `GPUS` or the GPU at hand, as `Device.guessed_speed` does."""
    return find_device(gpu).guessed_speed(precision)


def speed(pipe, rows=4):
    """Return the FLOP/s of the pipeline's UNet on its device.

    Times three passes without gradient, after one to warm up, and takes the fastest.
    """
    device, side = pipe.unet.device, pipe.unet.config.sample_size
    inputs = blank(pipe.unet.config, rows, side, pipe.tokenizer.model_max_length, device).inputs

    def synchronize():
        if device.type == "cuda":
            torch.cuda.synchronize()

    seconds = []
    with torch.no_grad():
        with Tracker() as tracker:
            predict(pipe.unet, *inputs)
        for _ in range(3):
            synchronize()
            began = time.perf_counter()
            predict(pipe.unet, *inputs)
            synchronize()
            seconds.append(time.perf_counter() - began)
    return tracker.flops / min(seconds)


def changes(p, device):
    """Yield changes of parameters that save memory, the cheapest first.

    First those that keep the result, then those of its precision, then those of the experiment.
    """
    if device.is_gpu:
        yield {"offload": True}
    yield {"gradient_checkpointing": True}
    if device.is_gpu:
        yield {"snapshot": "cpu"}
    if p["precision"] == "no":
        yield {"precision": device.half_precision}
    for factor in (2, 3, 5):
        yield {"accumulation": p["accumulation"] * factor}
    if p["frozen_dtype"] == "same":
        yield {"frozen_dtype": "half"}
    if p["optimizer"] in ("adam", "adamw"):
        yield {"optimizer": "adamw8bit"}
    if p["inner_optimizer"] == "adam":
        yield {"inner_optimizer": "adam8bit"}
    batches = ("batch_size", "inner_batch_size", "retain_batch_size")
    yield {name: max(1, p[name] // 2) for name in batches}
    yield {"subset": "lora", "frozen_dtype": "none"}
    if p["subset"] == "lora":
        yield {"weights_dtype": "half"}


class Need(NamedTuple):
    """What a training needs after a change and all changes before it."""

    change: dict  # {}: as asked
    gib: float
    minutes: float  # nan if the speed is unknown


@dataclass(frozen=True)
class Preflight:
    """Whether a training fits a device, and what it needs."""

    device: str
    usable: float  # GiB
    timed: bool  # minutes come from a timed pass, else from the data sheet
    needs: list  # of `Need`, the first as asked
    estimate: Estimate  # as asked

    @property
    def fits(self):
        """Return whether the training fits as asked."""
        return self.needs[0].gib <= self.usable

    def duration(self, minutes):
        """Return minutes as text."""
        if math.isnan(minutes):
            return "time unknown"
        digits = 0 if minutes > 10 else 1
        return f"about {minutes:.{digits}f} minutes" + ("" if self.timed else " (a guess)")

    def __str__(self):
        asked, *changed = self.needs
        verdict = "fits" if self.fits else "does not fit"
        lines = [
            f"{verdict} {self.device}: {asked.gib:.1f} GiB at most, {self.usable:.1f} are usable; "
            f"{self.duration(asked.minutes)}"
        ]
        if changed:
            lines.append("to make it fit, one after the other:")
        for need in changed:
            change = ", ".join(f"{name} = {value!r}" for name, value in need.change.items())
            lines.append(f"  {change}: {need.gib:.1f} GiB, {self.duration(need.minutes)}")
        if self.needs[-1].gib > self.usable:
            lines.append("that is still too much: take a smaller resolution, or a larger GPU")
        return "\n".join(lines)


def next_change(model, p, device, gib):
    """Return the first change that saves memory, and the estimate after it; None if none does."""
    for change in changes(p, device):
        try:
            found = estimate(model, p | change, device.is_gpu)
        except ValueError:  # batches that do not divide evenly
            continue
        if found.gib < 0.99 * gib:
            return change, found
    return None


def preflight(model, parameters=None, gpu=None):
    """Check whether a training fits one of `GPUS` or the device at hand; returns a `Preflight`.

    Minutes count the UNet's passes; a pipeline on the device at hand is timed, others are guessed.
    model, parameters: as in `estimate`. Raises ValueError as `estimate` does, and for an unknown
    GPU.
    """
    device = find_device(gpu)
    timed = speed(model) if device.at_hand and not isinstance(model, str) else None
    p = DEFAULTS | (parameters or {})
    p["precision"] = device.resolve(p["precision"])

    def minutes(found):
        return found.flops * found.steps / (timed or device.guessed_speed(p["precision"])) / 60

    first = estimate(model, p, device.is_gpu)
    needs = [Need({}, first.gib, minutes(first))]
    while needs[-1].gib > device.usable:
        change, found = next_change(model, p, device, needs[-1].gib) or (None, None)
        if change is None:
            break
        p |= change
        needs.append(Need(change, found.gib, minutes(found)))
    return Preflight(device.name, device.usable, timed is not None, needs, first)
