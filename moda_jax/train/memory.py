"""How much memory there is, and what to say when a run does not fit into that of its devices."""

import dataclasses
import re
from pathlib import Path

from jax.sharding import Mesh

from moda_jax.config import Config
from moda_jax.model.execution import Resolved, device_memory, saved_bytes_per_token
from moda_jax.model.flops import count_parameters

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


_MEMORY_FILE = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")


def available_memory() -> int | None:
    """Bytes of main memory that this process may still take; None where Linux does not say.

    The smaller one of what the machine has and what the process's control group (a container) may
    take beside the files that Linux would forget for it.
    """
    try:
        lines = _MEMORY_FILE.read_text().splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) * 2**10 for line in lines}
        found = sizes["MemAvailable"]
    except (OSError, ValueError, KeyError):
        return None
    try:
        limit = int((_GROUP / "memory.max").read_text())
        used = int((_GROUP / "memory.current").read_text())
        statistics = (_GROUP / "memory.stat").read_text().split()
        files = int(statistics[statistics.index("inactive_file") + 1])
    except (OSError, ValueError):  # no group, or one without a limit ("max")
        return found
    return min(found, limit - used + files)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether XLA found no memory, at compilation or in a step."""
    # The second: what a CPU says when a computation runs behind the program, as an internal error.
    return bool(re.search("RESOURCE_EXHAUSTED|out of memory", str(error), re.IGNORECASE))


def describe_out_of_memory(
    error: BaseException, config: Config, mesh: Mesh, resolved: Resolved
) -> str:
    """One line: what was asked for, what the run needs by estimate, and what would lower it."""
    device = mesh.devices.flat[0]
    there = device_memory(device)
    size = "" if there is None else f", which has {gib(there)}"
    asked = _asked_bytes(str(error))
    what = "" if asked is None else f" asked for {gib(asked)} and"
    saved = _saved_bytes(config, resolved)
    shards = config.mesh.fsdp * config.mesh.tensor
    state = 16 * count_parameters(config.model).total // shards
    return (
        f"out of memory on {device.device_kind} ({device.platform}){size}: the run{what} needs, by "
        f"estimate, {gib(state)} a device for parameters, moments and gradients, and "
        f"{gib(saved)} for what layers save for the backward (workspaces and logits come "
        f"on top); {'; '.join(_remedies(config, resolved, saved, state))}"
    )


def _remedies(config: Config, resolved: Resolved, saved: int, state: int) -> list[str]:
    rows, parts = _rows(config), config.accumulation_steps
    found = []
    if rows % 2 == 0:
        sums = state // 4 if parts == 1 else 0  # of the gradients, kept from part to part
        if saved // 2 > sums:
            less = gib(saved // 2 - sums)
            found.append(f"--accumulation-steps {2 * parts}: {less} less, the same training")
        found.append(f"--batch-size {config.batch_size // 2}: {gib(saved // 2)} less")
    remat = resolved.execution.remat
    if remat != "full":
        without = saved - _saved_bytes(config, resolved, remat="full")
        found.append(f"--execution.remat full instead of {remat}: {gib(without)} less, slower")
    found.append(f"--data.seq-len {max(config.data.seq_len // 2, 1)}: {gib(saved // 2)} less")
    found.append(f"twice the devices with --mesh.fsdp {2 * config.mesh.fsdp}: {gib(state // 2)} "
                 f"less for parameters")  # fmt: skip
    return found


def _rows(config: Config) -> int:
    """Rows that a device computes at a time."""
    return config.batch_size // (config.accumulation_steps * config.mesh.data * config.mesh.fsdp)


def _saved_bytes(config: Config, resolved: Resolved, remat: str | None = None) -> int:
    execution = resolved.execution
    if remat is not None:
        execution = dataclasses.replace(execution, remat=remat)  # type: ignore[arg-type]
    token = saved_bytes_per_token(config.model, execution, execution.remat)
    return _rows(config) * config.data.seq_len * token


def _asked_bytes(message: str) -> int | None:
    """Of XLA's messages: "allocating 1024 bytes", "allocate 16.5GiB", "Used 20.0G of 15.5G hbm"."""
    found = re.search(r"(?:allocat\w+|Used) ([\d.]+) ?([KMGT]?)(?:i?B|i?b|bytes|\b)", message)
    return None if found is None else int(float(found[1]) * _UNITS[found[2]])


def gib(size: int) -> str:
    """Bytes in words."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**28 else f"{size / 2**20:,.1f} MiB"
