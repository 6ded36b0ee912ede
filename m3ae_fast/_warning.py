"""The one category of warning, in a module that imports nothing, so that every module can import it."""


class M3AEFastWarning(UserWarning):
    """Something was cut, skipped or slower than it could be; the message says what and how often."""
