"""Errors that any package of flowalign may raise; this module imports none of them."""


class ConfigError(ValueError):
    """A configuration that cannot work; the message names the key, the value and what is allowed."""
