"""A run's folder, which is all that is needed to resume it or to use its model:

run.json            the RunConfig
tokenizer.json      unless the data has no captions
checkpoints/        step-00000500.safetensors, or step-00000500/ of a sharded model, the newest two
metrics.jsonl       a row a step, of some with val_... of validation; the same numbers in tensorboard/
pictures/           loss curves and reconstructions
bad_steps/          the batches of steps that were not finite and were skipped, if there were any: load_bad_step
lock                empty; locked while a process trains there
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import itertools
import json
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout

from m3ae_fast._files import naming
from m3ae_fast._warning import M3AEFastWarning
from m3ae_fast.data import Loader, StreamedDataset, Tokenizer, open_dataset
from m3ae_fast.data.coverage import warn_of_words
from m3ae_fast.models import OBJECTIVES, Model
from m3ae_fast.models.config import RENAMED, ModelConfig
from m3ae_fast.nn.positions import resample_positions
from m3ae_fast.train import checkpoint, distributed
from m3ae_fast.train.config import RunConfig

LEARN_WORDS_FROM = 10_000  # captions; a data set may be endless
VOCAB_SIZE = 8192  # at most: a small data set has fewer words


class Run(NamedTuple):
    """A run read back from its folder."""

    config: RunConfig  # with everything resolved
    model: Model  # config.model_class
    tokenizer: Tokenizer | None  # None: a model of images alone
    step: int  # steps taken by the checkpoint


def load_run(
    path: str | Path,
    device: str | None = "cpu",
    *,
    objectives: Collection[str] = OBJECTIVES,
    averaged: bool = True,
    image_size: int | Sequence[int] | None = None,
) -> Run:
    """The model of a run's folder (its newest checkpoint), or of one checkpoint in it, ready for evaluation.

    Args:
        path: the folder, or the checkpoint's file (or folder, of a sharded one).
        device: where the model goes; None: cuda if there is one, else cpu.
        objectives: those that are accepted; by default all.
        averaged: with the moving average of the weights, where the run keeps one (RunConfig.ema); False: as they are.
        image_size: pixels a side, or (height, width), that the model is to take; None: those it was trained on. For
            others its position tables are resampled, with a warning.
    Raises:
        FileNotFoundError: no such folder or checkpoint. ValueError: one of its files is damaged, or it is a run of
            another objective; an image size that is no multiple of the patches'.
    """
    given, path, device = path, Path(path), pick_device(device)
    if path.is_dir() and not checkpoint.is_folder(path):
        folder, path = path, checkpoint.latest(path / "checkpoints")
    else:
        folder = path.parent.parent
    saved = checkpoint.load(path)
    config = RunConfig.from_dict(saved.config, path)
    if config.objective not in objectives:
        raise ValueError(f"{given} must be a run of the objective {' or '.join(objectives)}, got {config.objective}")
    model = build_model(config)
    checkpoint.restore(saved, model)
    if averaged:
        model.load_state_dict(saved.average, strict=False)  # the parameters that are trained
    if image_size is not None:
        model = at_size(model, image_size)
    return Run(config, model.to(device).eval(), load_tokenizer(folder, config), saved.step)


def at_size(model: Model, image_size: int | Sequence[int]) -> Model:
    """The same weights in a model of another image size."""
    wanted = _changed(model.config, image_size=image_size)
    if wanted.grid == model.config.grid:
        return model
    resized = type(model)(wanted)
    resized.load_state_dict(fitted_state(model, resized))
    return resized


def _changed(saved: ModelConfig, **changes: Any) -> ModelConfig:
    """The configuration of the same weights with changes: positions of another grid are resampled, and so given, unless
    the model was trained on images of mixed sizes, whose positions are computed for every grid."""
    wanted = dataclasses.replace(saved, **changes)
    if wanted.grid != saved.grid and saved.max_patches is None:
        wanted.positions = "given"
    return wanted


def fitted_state(start: Model, model: Model) -> dict[str, torch.Tensor]:
    """The weights of `start` for a model of another grid: given tables of patches are resampled, with a warning."""
    state, grids = start.state_dict(), (start.config.grid, model.config.grid)
    tables = dict(start.named_buffers())  # those that no state dict holds, too
    given = [name for name in model.state_dict() if name.endswith("position") and "text" not in name]
    state |= {name: resample_positions(tables[name], *grids) for name in given}
    if grids[0] != grids[1] and distributed.is_first():
        (rows, columns), (wanted_rows, wanted_columns) = grids
        became = "resampled to" if given else "computed anew for"
        message = f"positions of {rows} x {columns} patches are {became} {wanted_rows} x {wanted_columns}"
        warnings.warn(message, M3AEFastWarning, stacklevel=3)
    return state


def pick_device(name: str | None) -> torch.device:
    """None: cuda if there is one, else cpu. ValueError: torch knows or sees no such device, or it holds no numbers."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.empty(0, device=name).is_meta:
            raise ValueError(f"device must be one that computes, got {name!r}")
    except (RuntimeError, AssertionError) as error:  # "not compiled with CUDA" is an AssertionError
        reason = str(error).splitlines()[0].partition(". ")[0]  # what follows lists all that torch was built with
        raise ValueError(f"device must be one that torch can use, got {name!r}: {reason}") from None
    return torch.device(name)


def build_model(config: RunConfig) -> Model:
    """With weights drawn from the run's seed, the same on every device."""
    torch.manual_seed(config.seed)
    model, model_config = OBJECTIVES[config.objective]
    return model(model_config.from_dict(config.model_config))


def exists(folder: Path) -> bool:
    """Whether the folder holds a run that can be resumed: run.json is written after the first checkpoint."""
    return (folder / "run.json").is_file()


def open_run(folder: Path, config: RunConfig | None, *, resume: bool):
    """What `reopen` or `create` returns, in all processes: the first alone looks at the folder and learns the words."""
    dataset = None

    def open_it():
        nonlocal dataset
        found, dataset, tokenizer = reopen(folder, config) if resume else create(folder, config)
        return found, tokenizer

    config, tokenizer = distributed.on_first(open_it)
    if dataset is None:
        dataset = open_data(config, config.images)
    if len(sizes := set(distributed.gather(len(dataset)))) > 1:
        raise ValueError(f"data must be the same in all processes, got {sorted(sizes)} samples in {config.data}")
    return config, dataset, tokenizer


def create(folder: Path, config: RunConfig):
    """Everything a new run needs, in memory: (config with its model_config, data set, tokenizer). Writes nothing."""
    refuse_used(folder)
    names = ("image_size", "max_patches", "image_mask_ratio", "text_mask_ratio", "masking")
    taken = sorted({*names, "vocab_size", "classes"} & set(config.options or {}))
    if taken:
        raise ValueError(
            f"options must not hold {', '.join(taken)}: {', '.join(names)} are settings of their own, vocab_size and "
            "classes follow from the data"
        )
    changes = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    changes |= config.options or {}
    start = None
    if config.init is not None:
        start = load_run(config.init, objectives=(config.objective,))
        if config.model != start.config.model:
            raise ValueError(f"model must be {start.config.model}, as init has it, got {config.model}")
        if config.text_vocab is not None:
            raise ValueError(f"text_vocab must be None, for init has a vocabulary, got {config.text_vocab}")
        changes = _changes_of_started(start.model.config, changes)
    model_config = _model_config(config, changes)
    dataset = open_data(config, model_config.images)
    config = config.resolved(_samples(dataset))
    tokenizer = None
    if config.model_class.LABELS:
        if not dataset.classes:
            beside = getattr(dataset, "no_classes", "")
            why = f": {beside} lies beside them" if beside else ""
            raise ValueError(
                f"data must have classes, a subfolder for each, to train {config.objective}, got {config.data}{why}"
            )
        changes["classes"] = len(dataset.classes)
    if config.model_class.CAPTIONS != "unused":
        tokenizer = start.tokenizer if start else make_tokenizer(dataset, config)
        if tokenizer is None and config.model_class.CAPTIONS == "required":
            raise ValueError(f"data must have captions to train {config.objective}, got {config.data} without any")
    changes["vocab_size"] = tokenizer.vocab_size if tokenizer else 0
    model_config = _model_config(config, changes)
    if tokenizer is not None:
        warn_of_words(tokenizer, dataset.captions(), model_config.max_text_length)
    chosen = {name: getattr(model_config, name, None) for name in names}
    as_json = json.loads(json.dumps(model_config.to_dict()))  # tuples become lists, as they will be when read back
    return dataclasses.replace(config, **chosen, model_config=as_json), dataset, tokenizer


def _changes_of_started(saved: ModelConfig, changes: dict) -> dict:
    """What to change in the preset for the configuration of a model that is started from, with changes of its own."""
    channels = changes.get("channels", saved.channels)
    if channels != saved.channels:
        raise ValueError(f"channels must be {saved.channels}, as init has it, got {channels}")
    if "activation" in changes:  # the forms hold one each, and follow as in a model of its own
        forms = {n: getattr(saved, n) for n in ("image_form", "text_form") if hasattr(saved, n)}
        of_all = {"activation": changes["activation"]}
        changes = {name: dataclasses.asdict(form) | of_all for name, form in forms.items()} | changes
    wanted = _changed(saved, **{n: v for n, v in changes.items() if hasattr(saved, n)})
    return wanted.to_dict() | changes  # unknown ones are refused where all are


def start_from(model: Model, init: str) -> None:
    """Give a new model the weights of a run; position tables of another grid are resampled, with a warning."""
    state = fitted_state(load_run(init).model, model)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"init must be of a model of these sizes, got {init}: {str(error).splitlines()[1]}") from None


def refuse_used(folder: Path) -> None:
    """FileExistsError where a folder holds a run, or what is left of one."""
    if exists(folder):
        raise FileExistsError(f"{folder} holds a run already: --resume continues it, another --out starts a new one")
    # the first one may be there: of a run that could not even write its run.json
    if any(path.stem != checkpoint.step_path(folder, 0).stem for path in checkpoint.all_in(folder / "checkpoints")):
        raise FileExistsError(f"{folder} holds checkpoints, but no run.json: put it back, or choose another --out")


def open_data(config: RunConfig, images: dict[str, Any]):
    """The run's data set, of images that the model takes: `ModelConfig.images`."""
    return open_dataset(
        config.data, seed=config.seed, strict=config.strict, paired_share=config.paired_share,
        val_share=config.val_share, **images,
    )  # fmt: skip


def make_loader(dataset, tokenizer: Tokenizer | None, model: Model, config: RunConfig, **options) -> Loader:
    """Of this process's share of the samples, those that the model can use; options: more of a `Loader`'s arguments."""
    return Loader(
        dataset, tokenizer, image_size=model.config.image_size, max_text_length=model.config.max_text_length,
        max_patches=model.config.max_patches, patch_size=model.config.patch_size,
        rank=distributed.rank(), world_size=distributed.world_size(), strict=config.strict,
        pairs_only=model.CAPTIONS == "required", labeled_only=model.LABELS, **options,
    )  # fmt: skip


def _sources(dataset) -> list:
    """What is mixed in it, or itself."""
    return getattr(dataset, "sources", [dataset])


def _samples(dataset) -> int | None:
    """In an epoch; None for data without an end, or mixed with such."""
    endless = any(getattr(source, "endless", False) for source in _sources(dataset))
    return None if endless else len(dataset)


def _model_config(config: RunConfig, changes: dict):
    """The preset with changes; ValueError for one that this model has not."""
    kind = OBJECTIVES[config.objective][1]
    known = [field.name for field in dataclasses.fields(kind)]
    unknown = sorted(set(changes) - set(known))
    if unknown:
        near = [RENAMED.get(name) or match for name in unknown for match in difflib.get_close_matches(name, known, 1)]
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"{', '.join(unknown)}: the configuration of {config.objective} has no such field{hint}")
    return kind.preset(config.model, **changes)


def make_tokenizer(dataset, config: RunConfig) -> Tokenizer | None:
    """The vocabulary that the run names, or one made from the captions; None where there are none."""
    if config.text_vocab is not None:
        return Tokenizer.from_vocab(config.text_vocab)
    captions = list(itertools.islice(dataset.captions(), LEARN_WORDS_FROM))
    return Tokenizer.train(captions, vocab_size=VOCAB_SIZE) if captions else None


def lock(folder: Path) -> FileLock:
    """Hold the folder, made if need be, until `release()` or the end of this process, whichever comes first.

    Raises:
        BlockingIOError: another process trains in it.
    """
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder / "lock", mode=0o666)
    try:
        with naming(held.lock_file):
            held.acquire(blocking=False)
    except Timeout:
        raise BlockingIOError(f"{folder} is in use, another process trains in it: choose another --out") from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        message = f"{folder} is on a file system without locks: make sure that no other process trains in it"
        warnings.warn(message, M3AEFastWarning, stacklevel=2)
    return held


def prepare_folder(folder: Path, tokenizer: Tokenizer | None) -> None:
    """All but run.json, which comes last, after the first checkpoint: a folder with it can be resumed."""
    with naming(folder):
        (folder / "checkpoints").mkdir(exist_ok=True)
    checkpoint.keep_last(folder / "checkpoints", 0)  # at most the first one, see `create`
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer.json")


def reopen(folder: Path, wanted: RunConfig | None):
    """What `create` returned, read back. `wanted` may differ only in what does not change the numbers, such as the
    place of the data; its Nones stand for what the run has."""
    if not exists(folder):
        raise FileNotFoundError(
            f"{folder} holds no run to resume: there is no run.json in it; without --resume, or with --resume auto, "
            "the run starts"
        )
    saved = config = RunConfig.load(folder)
    if wanted is not None:
        given = {name: value for name, value in wanted.to_dict().items() if value is not None}
        wanted = dataclasses.replace(config, **given).resolved()
        last = checkpoint.step_path(Path(), config.steps).stem
        finished = any(path.stem == last for path in checkpoint.all_in(folder / "checkpoints"))
        refuse_differences(folder / "run.json", extended(config, wanted) if finished else config, wanted)
        config = wanted
    dataset = open_data(config, config.images)
    tokenizer = load_tokenizer(folder, config)
    if config.data != saved.data:
        refuse_other_data(dataset, config, tokenizer, folder)
    return config, dataset, tokenizer


def load_tokenizer(folder: Path, config: RunConfig) -> Tokenizer | None:
    """The run's vocabulary; None for a model of images alone."""
    if config.model_config["vocab_size"] == 0:
        return None
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size != config.model_config["vocab_size"]:
        raise ValueError(
            f"{path} has {tokenizer.vocab_size} words, the model has {config.model_config['vocab_size']}: "
            "it belongs to another run"
        )
    return tokenizer


def refuse_other_data(dataset, config: RunConfig, tokenizer: Tokenizer | None, folder: Path) -> None:
    """ValueError where data that are said to be the run's own, in another place, have other classes or other words."""
    difference = None
    if config.model_class.LABELS and (count := len(dataset.classes)) != config.model_config["classes"]:
        difference = f"they have {count} classes, the model has {config.model_config['classes']}"
    elif tokenizer is not None and config.text_vocab is None and config.init is None:
        made = make_tokenizer(dataset, config)
        if made is None or made.tokens(range(made.vocab_size)) != tokenizer.tokens(range(tokenizer.vocab_size)):
            difference = "their captions make another vocabulary"
    if difference:
        raise ValueError(f"data must be those of {folder} in another place, got {config.data}: {difference}")


def extended(finished: RunConfig, wanted: RunConfig) -> RunConfig:
    """A run that has taken all of its steps, with the steps of `wanted` where those are more."""
    return dataclasses.replace(finished, steps=max(finished.steps, wanted.steps))


def refuse_differences(path: Path, saved: RunConfig, wanted: RunConfig) -> None:
    """ValueError that lists what two runs disagree about, where it changes what is computed."""
    found = checkpoint.differences(saved.identity(), wanted.identity())
    if found:
        raise ValueError(f"{path} is of another configuration: {'; '.join(found)}")


def warn_of_other_readers(saved: RunConfig, wanted: RunConfig, dataset) -> None:
    """With streamed shards another number of workers makes other batches: the run continues, but not exactly."""
    streamed = any(isinstance(source, StreamedDataset) for source in _sources(dataset))
    if streamed and max(1, saved.workers) != max(1, wanted.workers) and distributed.is_first():
        warnings.warn(
            f"workers: {saved.workers} there, {wanted.workers} asked for: streamed shards are dealt out to them, so "
            "other batches follow than without the stop",
            M3AEFastWarning,
            stacklevel=2,
        )
