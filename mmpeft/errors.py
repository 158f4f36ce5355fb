"""Every error that mmpeft raises on purpose.

MmpeftError
├── ConfigError        a recipe or an argument says something that cannot be done
├── DataError          images, captions or conversations cannot be used as they are
├── AdapterError       an adapter file or folder cannot be used
│   ├── FormatError    it is broken, or in no format that is known
│   └── BaseMismatch   it belongs to another base
├── BaseError          a base model cannot be found or opened
├── MethodError        a method cannot be attached, composed or fused as asked
├── BankError          the live mix cannot be changed as asked
├── TrainingError      training had to stop
└── MissingDependency  an optional package is needed

Each message says what was given, what is needed, and what to do next.
"""


class MmpeftError(Exception):
    """The root: the command line prints its message in one line and exits with 2."""


class ConfigError(MmpeftError, ValueError):
    """A recipe or an argument says something that cannot be done."""


class DataError(MmpeftError):
    """Images, captions or conversations cannot be used as they are."""


class AdapterError(MmpeftError):
    """An adapter file or folder cannot be used."""


class FormatError(AdapterError):
    """An adapter file is broken, or in no format that is known."""


class BaseMismatch(AdapterError):
    """An adapter belongs to another base."""


class BaseError(MmpeftError):
    """A base model cannot be found or opened."""


class MethodError(MmpeftError):
    """A method cannot be attached, composed or fused as asked."""


class BankError(MmpeftError):
    """The live mix cannot be changed as asked."""


class TrainingError(MmpeftError):
    """Training had to stop; what was saved before stands."""


class MissingDependency(MmpeftError, ImportError):
    """An optional package is needed."""

    def __init__(self, package: str, needed_for: str, install: str) -> None:
        super().__init__(f"{needed_for} needs {package}, which is not installed; install it with: {install}")
