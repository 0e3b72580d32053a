"""Errors that any floor may raise. They stand on the ground floor, so that raising one never points an arrow up."""


class ConfigError(ValueError):
    """A configuration that cannot work; the message names the key, the value and what is allowed."""
