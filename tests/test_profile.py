"""Traces of training steps: which steps, and what they hold.

Each in a process of its own: JAX's profiler ended one that had compiled hundreds of programs.
"""

import gzip
import json
import subprocess
import sys
import textwrap

import pytest

from moda_jax.train.profile import WARM_UP, ProfiledStep

SCRIPT = """
    import sys
    import jax, jax.numpy as jnp
    from pathlib import Path
    from moda_jax.train.profile import ProfiledStep

    @jax.jit
    def step(x):
        with jax.named_scope("attention"):
            return jnp.sin(x) @ x

    folder, num_steps, steps_left, calls = Path(sys.argv[1]), *map(int, sys.argv[2:])
    profiled = ProfiledStep(step, folder, num_steps=num_steps, steps_left=steps_left, say=print)
    for number in range(1, calls + 1):
        profiled(jnp.ones((8, 8)))
        print(number)
    profiled.close()
"""


def traced_steps(folder):
    """The numbers of the traced steps, and whether their operations carry their scopes."""
    (trace,) = folder.rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    (xplane,) = folder.rglob("*.xplane.pb")  # what TensorBoard reads
    numbers = [int(e["args"]["step_num"]) for e in events if e.get("name") == "train_step"]
    return numbers, b"jit(step)/attention/" in xplane.read_bytes()


@pytest.mark.parametrize(
    ("num_steps", "steps_left", "calls", "traced"),
    [
        (2, 20, 20, [WARM_UP + 1, WARM_UP + 2]),
        (2, 5, 5, [4, 5]),
        (9, 2, 2, [1, 2]),
        pytest.param(5, 5, 1, [1], id="stopped"),  # what was traced is written
    ],
)
def test_the_steps_after_the_first_ones_are_traced(tmp_path, num_steps, steps_left, calls, traced):
    arguments = map(str, (tmp_path, num_steps, steps_left, calls))
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert traced_steps(tmp_path) == (traced, True)
    lines = done.stdout.splitlines()
    said = f"profile: tensorboard --logdir {tmp_path}, or open {tmp_path}"
    (at,) = (i for i, line in enumerate(lines) if line.startswith(said))
    assert lines[at].endswith("perfetto_trace.json.gz in Perfetto")
    assert lines[at + 1 :] == [str(n) for n in range(traced[-1], calls + 1) if calls == steps_left]


def test_nothing_is_traced_unless_asked_for(tmp_path):
    profiled = ProfiledStep(lambda x: x, tmp_path, num_steps=0, steps_left=20, say=pytest.fail)
    for _ in range(12):
        profiled(0)
    profiled.close()
    assert not list(tmp_path.iterdir())
