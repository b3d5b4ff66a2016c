"""The errors that a user can cause. Each message is one line: what was found, what was needed, what
to do.

Everything else that goes wrong is a bug in puna and surfaces as an ordinary exception.
"""


class PunaError(Exception):
    """Base of all errors that the user can mend; the command line prints it and exits with 2."""


class ConfigError(PunaError):
    """Options that contradict each other, the model or the machine."""


class CheckpointError(PunaError):
    """A checkpoint that is missing, damaged, or of a kind that puna does not read."""


class TokenizerError(PunaError):
    """A tokenizer or chat template that is missing, damaged or unsupported."""


class EngineError(PunaError):
    """An engine directory that is missing, damaged, or built for something else."""


class RequestError(PunaError):
    """A prompt or sampling parameter that cannot be served."""


class LaunchError(PunaError):
    """Ranks that were started in a way that does not fit the engine."""
