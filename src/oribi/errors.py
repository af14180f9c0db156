"""The errors that oribi raises on purpose. Each message says what was given, what is allowed and what to do."""


class OribiError(Exception):
    """Base of every error that a caller of oribi may want to catch."""


class ConfigError(OribiError, ValueError):
    """A setting is missing, unknown or out of range."""


class DataError(OribiError, ValueError):
    """A data set cannot be read or gives nothing to train on; the message names file, line and field."""


class ModelError(OribiError, ValueError):
    """A checkpoint cannot be loaded, or a model cannot do what was asked of it."""


class ChatTemplateError(DataError):
    """A chat template refuses a conversation, or fails on it."""


class TemplateLimitError(ModelError):
    """A chat template takes too long or makes too much, whichever conversation it is given."""


class ExportError(OribiError, RuntimeError):
    """A saved model could not be written, or does not say the same as the trained one."""


class TrainingError(OribiError, RuntimeError):
    """Training cannot continue: its numbers are no longer finite, or its checkpoints cannot be written."""


class EndedElsewhere(TrainingError):
    """Another process of the training failed, whose own message says why."""
