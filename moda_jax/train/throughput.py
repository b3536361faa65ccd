"""Tokens per second and model FLOPs utilisation."""

import time

import jax

from moda_jax.config import ModelConfig
from moda_jax.model.flops import count_flops

# Dense bfloat16 / float16 peak of one device, FLOP/s, from the vendors' data sheets; by a part of
# jax.Device.device_kind, the more specific one first.
_PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "TPU v6 lite": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
}


def peak_flops(device: jax.Device, compute_dtype: str) -> float | None:
    """FLOP/s of `device` in `compute_dtype`; None where no peak is on record."""
    if compute_dtype == "float32":
        return None
    return next((peak for kind, peak in _PEAK_FLOPS.items() if kind in device.device_kind), None)


class Throughput:
    """Speed of the training steps since the last reading; pauses and compilation do not count."""

    def __init__(
        self, config: ModelConfig, *, compute_dtype: str, seq_len: int, devices: list[jax.Device]
    ) -> None:
        peak = peak_flops(devices[0], compute_dtype)
        self._peak = None if peak is None else peak * len(devices)
        self._flops_per_token = count_flops(config, seq_len).train_per_token
        self._tokens = self._seconds = 0.0
        self._last: float | None = None

    def step_done(self, tokens: float) -> None:
        """Counts a step that has just ended; the first one after a pause only starts the clock."""
        now = time.perf_counter()
        if self._last is not None and now > self._last:  # a suspended machine's clock may stand
            self._tokens += tokens
            self._seconds += now - self._last
        self._last = now

    def pause(self) -> None:
        """Other work follows: the time until the next step's end is not counted."""
        self._last = None

    def read(self) -> dict[str, float]:
        """Target tokens per second and, where the peak is known, MFU; empty if nothing counted."""
        if not self._seconds:
            return {}
        rate = self._tokens / self._seconds
        self._tokens = self._seconds = 0.0
        if self._peak is None:
            return {"tokens_per_second": rate}
        return {"tokens_per_second": rate, "mfu": rate * self._flops_per_token / self._peak}
