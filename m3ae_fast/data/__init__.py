"""Data sets of images with captions, a WordPiece tokenizer, and the loader that packs them into batches."""

try:
    import PIL  # noqa: F401
    import tokenizers  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"m3ae_fast.data needs {error.name}: pip install '.[train]'", name=error.name) from error

from m3ae_fast.data.sample import BadSample, Sample
from m3ae_fast.data.shapes import Scene, SceneObject, ShapesDataset
from m3ae_fast.data.text import Tokenizer

__all__ = [
    "BadSample",
    "Sample",
    "Scene",
    "SceneObject",
    "ShapesDataset",
    "Tokenizer",
]
