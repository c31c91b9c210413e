"""The errors a person can do something about: what was wrong, the value found, the remedy, in one line.

One class a stage, all under `ArrieroError`, which the command line prints without a traceback and exits with 2.
"""


class ArrieroError(Exception):
    """Something outside the program is not as it must be; the message says what, what was found, and the remedy."""


class CheckpointError(ArrieroError):
    """A checkpoint's files are missing, damaged, or not those of a Llama 4 that Arriero knows."""


class ExportError(ArrieroError):
    """A checkpoint could not be turned into a model folder."""


class DataError(ArrieroError):
    """The text given as data cannot be read, or is too little."""


class CalibrationError(ArrieroError):
    """A model could not be quantised with the text and the recipe given."""


class FolderError(ArrieroError):
    """A model or bundle folder cannot be read or written as it stands."""


class BuildError(ArrieroError):
    """A model folder could not be lowered or built for its target."""


class AccuracyError(ArrieroError):
    """Two models cannot be compared, or one of them computes no numbers."""


class SessionError(ArrieroError):
    """A running session was asked for something it cannot do."""
