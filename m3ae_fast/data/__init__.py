"""Data sets of images with captions, a WordPiece tokenizer, and the loader that packs them into batches."""

try:
    import PIL  # noqa: F401
    import tokenizers  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"m3ae_fast.data needs {error.name}: pip install '.[train]'", name=error.name) from error

from m3ae_fast.data.folder import FolderDataset
from m3ae_fast.data.hdf5 import HDF5Dataset
from m3ae_fast.data.images import EncodedDataset, EncodedImage
from m3ae_fast.data.loader import Loader
from m3ae_fast.data.rows import JSONLinesDataset
from m3ae_fast.data.sample import BadSample, Sample
from m3ae_fast.data.shapes import Scene, SceneObject, ShapesDataset
from m3ae_fast.data.shards import TarDataset
from m3ae_fast.data.text import Tokenizer


def open_dataset(spec: str, *, image_size: int, seed: int) -> ShapesDataset | FolderDataset:
    """The data set a command line names.

    Args:
        spec: "shapes", the built-in scenes; anything else is the path of a folder ("./shapes" for one of that name).
        image_size: pixels a side that `shapes` draws; a folder keeps its images' own sizes.
        seed: of the scenes.
    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: no such folder, or nothing in it.
    """
    return ShapesDataset(image_size, seed) if spec == "shapes" else FolderDataset(spec)


__all__ = [
    "BadSample",
    "EncodedDataset",
    "EncodedImage",
    "FolderDataset",
    "HDF5Dataset",
    "JSONLinesDataset",
    "Loader",
    "Sample",
    "Scene",
    "SceneObject",
    "ShapesDataset",
    "TarDataset",
    "Tokenizer",
    "open_dataset",
]
