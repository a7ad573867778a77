"""The errors that users meet: each says what is wrong, where, and what to do next."""


class EncacheError(Exception):
    """Anything a user can repair; the command line prints it without a traceback."""


class CheckpointError(EncacheError):
    """A checkpoint is missing, corrupt, unsafe to read, or not what was asked for."""


class PlanError(EncacheError):
    """Key calls, solver and blend do not fit together."""


class EngineError(EncacheError):
    """An engine folder is incomplete, altered, or built for something else."""
