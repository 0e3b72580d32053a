"""Errors that any package of flowalign may raise; this module imports none of them."""


class ConfigError(ValueError):
    """A configuration that cannot work; the message names the key, the value and what is allowed."""


class RunError(RuntimeError):
    """A run that cannot go on; the message says what was found and what to do. Its last checkpoint stands."""
