"""Where a vocabulary lies that is named as Hugging Face names its models: in a cache of theirs, which other programs
fill. Nothing is asked of a server."""

from __future__ import annotations

import os
import re
from pathlib import Path

FILES = ("tokenizer.json", "vocab.txt")  # the first one says more: whether letters are lower-cased, for instance
OWNER = "google-bert/"  # of BERT's models, which are named with it or without it


def find_vocab(named: str | os.PathLike) -> Path:
    """The file of a vocabulary: the file itself, one of FILES in a folder, or in the cache of the model of that name.

    Args:
        named: a path, or a name such as "bert-base-uncased"; what is there under that path comes first.
    Raises:
        FileNotFoundError: there is none, listing where it was looked for.
    """
    path = Path(named)
    if path.is_dir():
        places = [path]
    elif is_name(named):
        places = [place for folder in _folders(str(named)) for place in _snapshots(folder)]
    else:
        return path
    for place in places:
        for name in FILES:
            if (place / name).is_file():
                return place / name
    if path.is_dir():
        raise FileNotFoundError(f"{path} must hold {' or '.join(FILES)}, got a folder without them")
    looked = ", ".join(map(str, [path, *_folders(str(named))]))
    raise FileNotFoundError(
        f"there is no vocabulary {named}: looked for {looked}; 'hf download {named} {FILES[0]}' (pip install "
        f"huggingface_hub) puts it there where there is a network, or name a {FILES[0]} or a {FILES[1]}"
    )


def is_name(named: str | os.PathLike) -> bool:
    """Whether it is a name, "bert-base-uncased" or "owner/model", and not a path: nothing is there under that path, and
    it does not end as a file of a vocabulary does."""
    plain = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", os.fspath(named))
    return bool(plain) and not os.fspath(named).endswith((".txt", ".json")) and not os.path.exists(named)


def _folders(name: str) -> list[Path]:
    """Where the caches keep a model of that name."""
    names = [name]
    if "/" not in name:
        names.append(OWNER + name)
    elif name.startswith(OWNER):
        names.append(name.removeprefix(OWNER))
    return [cache / f"models--{each.replace('/', '--')}" for cache in _caches() for each in names]


def _caches() -> list[Path]:
    """Those of huggingface_hub and Transformers, as their environment variables say."""
    given = [os.environ.get(name) for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE")]
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return [Path(each).expanduser() for each in dict.fromkeys([*filter(None, given), os.path.join(home, "hub")])]


def _snapshots(folder: Path) -> list[Path]:
    """The versions of a model that are kept, that of the main branch first."""
    main = folder / "refs" / "main"
    newest = main.read_text(encoding="utf-8").strip() if main.is_file() else ""
    return sorted((folder / "snapshots").glob("*"), key=lambda path: (path.name != newest, path.name))
