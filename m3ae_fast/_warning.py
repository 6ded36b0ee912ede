"""The one category of warning, in a module that imports nothing, so that every module can import it."""


class M3AEFastWarning(UserWarning):
    """Data were truncated or skipped, or something runs slower than it could; the message says what and how often."""
