"""What can go wrong, as a tree.

GossamerError
├── ConfigError        an option, a file of settings or a data row is not usable
├── CheckpointError    a model directory or a GGUF file is damaged or incomplete
├── CalibrationError   the calibration data or the Hessian built from it will not do
├── FormatError        a .goss file is damaged, hostile or newer than this program
├── UnsupportedError   understood, but not something this version can do
└── EngineError        a request the engine cannot serve

Interrupted            Ctrl-C during work that can be resumed (a KeyboardInterrupt, exit code 130)

Every message says what was found, what was expected and what to do. All of them are the user's to mend
(exit code 2); the environment's failures stay Python's own `OSError` and `MemoryError` (exit code 1).
"""


class GossamerError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(GossamerError):
    """An option, a settings file or a data row is not usable."""


class CheckpointError(GossamerError):
    """A model directory or a GGUF file is damaged or incomplete."""


class CalibrationError(GossamerError):
    """The calibration data, or the Hessian built from it, will not do."""


class FormatError(GossamerError):
    """A .goss file is damaged, hostile or newer than this program."""


class UnsupportedError(GossamerError):
    """Understood, but not something this version can do."""


class EngineError(GossamerError):
    """A request the engine cannot serve."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during work that was saved first; the message says where."""
