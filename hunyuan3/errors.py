"""Errors that a user can cause, each naming the file or the input and the way out."""


class Hunyuan3Error(ValueError):
    """Base of every error this package raises for bad input."""


class UnsupportedConfigError(Hunyuan3Error):
    """A known key of a checkpoint's configuration holds a value that this package does not implement."""


class CheckpointError(Hunyuan3Error):
    """A file of the checkpoint folder is missing, damaged, or does not hold what the configuration promises."""


class RequestError(Hunyuan3Error):
    """A request (prompt, size, steps, latent ...) that this checkpoint cannot serve."""


class OutOfBudgetError(Hunyuan3Error):
    """Something does not fit the memory that there is; the message says what was asked and what was free."""
