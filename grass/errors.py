"""Exception classes. Every message states what is wrong, where, and what to do about it."""


class GrassError(Exception):
    """Base class of all exceptions that GRASS raises."""


class ConfigError(GrassError, ValueError):
    """Invalid setting, or settings that cannot be combined."""


class LayerDiscoveryError(GrassError, ValueError):
    """Layers of the model that cannot be determined unambiguously; the message lists the candidates."""


class ModelError(GrassError, ValueError):
    """A model that cannot be loaded, or built from its configuration."""


class ParameterError(GrassError, ValueError):
    """Parameters that do not belong to the model, or an empty list of parameters."""


class StateMismatchError(GrassError, ValueError):
    """State dict of a different model, layer map or configuration."""


class OffloadError(GrassError, RuntimeError):
    """Optimizer states that cannot be kept in host memory as requested."""


class BackwardError(GrassError, RuntimeError):
    """Backward pass that is not allowed while layers are updated inside backward."""


class DataError(GrassError, ValueError):
    """Training or evaluation data that is missing, empty or malformed."""


class RunFolderError(GrassError):
    """Output folder that was not created by `grass finetune`, or a run that cannot be resumed."""
