"""Why a run ends early, and the exit status of each reason."""

EXIT_FINISHED = 0
EXIT_SOME_FAILED = 1
"""Of a sweep: the others were run."""
EXIT_BAD_INPUT = 2
"""As argparse and tyro."""
EXIT_DIVERGED = 3
EXIT_NOT_SAVED = 74
"""EX_IOERR of sysexits.h."""
EXIT_STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: stopped by a signal; the same command goes on."""
EXIT_INTERRUPTED = 130
"""As a shell reports a process ended by SIGINT."""
EXIT_PIPE = 141
"""And by SIGPIPE: nobody reads the output any more."""


class RunError(ValueError):
    """A run could not go on, whatever its settings say; its newest checkpoint stays."""

    exit_status: int


class DivergenceError(RunError):
    """A loss, gradient or parameter is not finite."""

    exit_status = EXIT_DIVERGED


class SaveError(RunError):
    """A checkpoint or the metrics could not be written."""

    exit_status = EXIT_NOT_SAVED
