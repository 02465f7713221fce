"""stylemuse: many styles in one forward pass, on masked generative transformers."""

from .adapters.canonical import Adapter
from .core import Branch, Guidance, Request, Result, Sampling, Style, StylemuseError
from .decoding.guidance import CFG, ObjectInStyle, StyleDrop
from .pipeline import Pipeline, Preview, load

__version__ = "0.1.0"

__all__ = [
    "CFG",
    "Adapter",
    "Branch",
    "Guidance",
    "ObjectInStyle",
    "Pipeline",
    "Preview",
    "Request",
    "Result",
    "Sampling",
    "Style",
    "StyleDrop",
    "StylemuseError",
    "load",
]
