"""Traces of training steps: which steps, and what they hold."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from moda_jax.train.profile import WARM_UP, ProfiledStep


@jax.jit
def step(x):
    with jax.named_scope("attention"):
        return jnp.sin(x) @ x


def traced_steps(folder):
    """The numbers of the traced steps, and whether their operations carry their scopes."""
    (trace,) = folder.rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    (xplane,) = folder.rglob("*.xplane.pb")  # what TensorBoard reads
    numbers = [int(e["args"]["step_num"]) for e in events if e.get("name") == "train_step"]
    return numbers, b"jit(step)/attention/" in xplane.read_bytes()


@pytest.mark.parametrize(
    ("num_steps", "steps_left", "traced"),
    [(2, 20, [WARM_UP + 1, WARM_UP + 2]), (2, 5, [4, 5]), (9, 2, [1, 2])],
)
def test_the_steps_after_the_first_ones_are_traced(tmp_path, num_steps, steps_left, traced):
    said = []
    profiled = ProfiledStep(
        step, tmp_path, num_steps=num_steps, steps_left=steps_left, say=said.append
    )
    x = jnp.ones((8, 8))
    for number in range(1, steps_left + 1):
        profiled(x)
        assert bool(said) == (number >= traced[-1])
    profiled.close()
    assert traced_steps(tmp_path) == (traced, True)
    (line,) = said
    assert f"--logdir {tmp_path}," in line
    assert "perfetto_trace.json.gz in Perfetto" in line


def test_a_run_that_is_stopped_writes_what_it_traced(tmp_path):
    said = []
    profiled = ProfiledStep(step, tmp_path, num_steps=5, steps_left=5, say=said.append)
    profiled(jnp.ones((8, 8)))
    profiled.close()
    assert len(said) == 1
    assert traced_steps(tmp_path) == ([1], True)


def test_nothing_is_traced_unless_asked_for(tmp_path):
    profiled = ProfiledStep(step, tmp_path, num_steps=0, steps_left=20, say=pytest.fail)
    for _ in range(12):
        profiled(jnp.ones((8, 8)))
    profiled.close()
    assert not list(tmp_path.iterdir())
