"""The error of this package."""


class ExportError(RuntimeError):
    """A model, site or file cannot be exported or loaded as asked; the message names it."""
