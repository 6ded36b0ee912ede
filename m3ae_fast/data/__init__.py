"""Data sets of images with captions, a WordPiece tokenizer, and the loader that packs them into batches."""

try:
    import PIL  # noqa: F401
    import tokenizers  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"m3ae_fast.data needs {error.name}: pip install '.[train]'", name=error.name) from error

from m3ae_fast.data.bad_sample import BadSample
from m3ae_fast.data.cluttered import ClutteredShapes
from m3ae_fast.data.folder import FolderDataset
from m3ae_fast.data.hdf5 import HDF5Dataset
from m3ae_fast.data.hf import HFDataset
from m3ae_fast.data.images import EncodedImage
from m3ae_fast.data.loader import Loader
from m3ae_fast.data.mixture import MixedDataset
from m3ae_fast.data.paired import PairedShare
from m3ae_fast.data.rows import JSONLinesDataset
from m3ae_fast.data.sample import EncodedDataset, Sample
from m3ae_fast.data.scenes import Scene, SceneObject
from m3ae_fast.data.shapes import ShapesDataset
from m3ae_fast.data.shards import TarDataset
from m3ae_fast.data.specs import DRAWN, open_dataset
from m3ae_fast.data.split import Split
from m3ae_fast.data.streamed import StreamedDataset
from m3ae_fast.data.text import Tokenizer

__all__ = [
    "DRAWN",
    "BadSample",
    "ClutteredShapes",
    "EncodedDataset",
    "EncodedImage",
    "FolderDataset",
    "HDF5Dataset",
    "HFDataset",
    "JSONLinesDataset",
    "Loader",
    "MixedDataset",
    "PairedShare",
    "Sample",
    "Scene",
    "SceneObject",
    "ShapesDataset",
    "Split",
    "StreamedDataset",
    "TarDataset",
    "Tokenizer",
    "open_dataset",
]
