"""Runs of pytest on copies of the code: `python tests/forked_pytest.py`.

Each run is a fork of this process, which has imported the libraries below and nothing of this
repository: libraries cost a run no time, and all other code is its copy's. Starts no thread of JAX,
so computes nothing. Reads lines of JSON, [FOLDER, OUTPUT, ARGUMENT...], runs pytest with the
arguments in the folder, its output in a file, and answers with pytest's exit status.
"""

import gc
import importlib
import json
import os
import sys
import traceback
import warnings

import pytest

LIBRARIES = (
    *("chex", "flax.linen", "flax.nnx", "grain.python", "jax.experimental.pallas"),
    *("jax.experimental.pallas.tpu", "matplotlib.backends.backend_agg", "matplotlib.figure"),
    *("numpy.testing", "optax", "orbax.checkpoint", "rich.progress", "tensorboardX", "tokenizers"),
    *("tracemalloc", "tyro"),
)


def run(folder: str, output: str, *arguments: str) -> int:
    """pytest's exit status."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 70
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(file, stream)
        os.chdir(folder)
        sys.path.insert(0, folder)
        status = int(pytest.main([*arguments]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def main() -> None:
    warnings.filterwarnings("ignore", "os.fork")
    sys.path.pop(0)  # this file's folder
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.freeze()  # a fork's first collection would copy all that was imported
    for line in sys.stdin:
        print(run(*json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
