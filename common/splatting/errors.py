"""The error of everything that reads or makes scenes."""

__all__ = ["SceneError"]


class SceneError(ValueError):
    """Files, views or values that give no scene; the message says what, what was expected and what to do next."""
