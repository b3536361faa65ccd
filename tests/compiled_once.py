"""A fixture for test files that build the same model again and again."""

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Compiles each distinct program once for all the tests of such files in a worker.

    Workers do not share: JAX's cache lets one read what another has half written.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        yield
        return
    settings = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": str(tmp_path_factory.getbasetemp() / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
    }
    previous = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    reset_cache()  # JAX looks at the setting once
    yield
    for name, value in previous.items():
        jax.config.update(name, value)
    reset_cache()
