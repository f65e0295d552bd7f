"""The errors users meet. Each message says what is wrong, where, and what to do about it."""


class GrassError(Exception):
    """Base of every error this library raises on purpose."""


class ConfigError(GrassError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class LayerDiscoveryError(GrassError, ValueError):
    """The model's layers cannot be told without doubt; the message lists the candidates."""


class ModelError(GrassError, ValueError):
    """A model that cannot be loaded, or built from its configuration."""


class ParameterError(GrassError, ValueError):
    """Parameters that do not fit the model, or no parameters at all."""


class StateMismatchError(GrassError, ValueError):
    """A checkpoint of another model, another layer map or another configuration."""


class OffloadError(GrassError, RuntimeError):
    """States that cannot be kept in host memory, or not in the way that was asked for."""


class BackwardError(GrassError, RuntimeError):
    """A backward that came where an update inside backward forbids it."""


class DataError(GrassError, ValueError):
    """Training or evaluation data that is missing, empty or malformed."""


class RunFolderError(GrassError):
    """An output folder that is not a run of ours, or a run that cannot be resumed."""
