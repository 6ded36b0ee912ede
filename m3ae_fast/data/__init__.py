"""Data sets of images with captions, a WordPiece tokenizer, and the loader that packs them into batches."""

try:
    import PIL  # noqa: F401
    import tokenizers  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"m3ae_fast.data needs {error.name}: pip install '.[train]'", name=error.name) from error

from m3ae_fast.data.cluttered import ClutteredShapes
from m3ae_fast.data.folder import FolderDataset
from m3ae_fast.data.loader import Loader
from m3ae_fast.data.paired import PairedShare
from m3ae_fast.data.sample import BadSample, Sample
from m3ae_fast.data.shapes import Scene, SceneObject, ShapesDataset
from m3ae_fast.data.text import Tokenizer

DRAWN = {"shapes": ShapesDataset, "cluttered": ClutteredShapes}


def open_dataset(spec: str, *, image_size: int, seed: int) -> ClutteredShapes | FolderDataset | ShapesDataset:
    """The data set a command line names.

    Args:
        spec: "shapes", the built-in scenes, or "cluttered", small shapes whose colour is the label; anything else is
            the path of a folder ("./shapes" for one of that name).
        image_size: pixels a side of what is drawn; a folder keeps its images' own sizes.
        seed: of what is drawn.
    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: no such folder, or nothing in it.
    """
    drawn = DRAWN.get(spec)
    return drawn(image_size, seed) if drawn else FolderDataset(spec)


__all__ = [
    "DRAWN",
    "BadSample",
    "ClutteredShapes",
    "FolderDataset",
    "Loader",
    "PairedShare",
    "Sample",
    "Scene",
    "SceneObject",
    "ShapesDataset",
    "Tokenizer",
    "open_dataset",
]
