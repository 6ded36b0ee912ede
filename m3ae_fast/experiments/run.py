"""experiments(): every run, as many at a time as there are cores, each scored as soon as it is trained."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from m3ae_fast import _checks
from m3ae_fast._files import read_json, write_json
from m3ae_fast.data import ClutteredShapes, Sample, ShapesDataset
from m3ae_fast.data.samples import Some
from m3ae_fast.downstream.features import Features, extract
from m3ae_fast.downstream.scoring.auroc import auroc
from m3ae_fast.downstream.tasks.ood import Mahalanobis, max_softmax
from m3ae_fast.downstream.tasks.probe import fit_probe
from m3ae_fast.downstream.tasks.probe import probe as linear_probe
from m3ae_fast.experiments.plan import IMAGE_SIZE, TABLES, UNTRAINED, Scale, config_of, runs_of
from m3ae_fast.experiments.report import write_report
from m3ae_fast.train import RunConfig, load_run, pretrain
from m3ae_fast.train.run import build_model, create

TRAIN_SEED, TEST_SEED, FAR_SEED = 10**6, 10**6 + 1, 10**6 + 2  # of images that no run is trained on
KNOWN = 8  # classes of the twelve that an OOD classifier is fitted to


def experiments(
    out: str | Path,
    *,
    tables: Sequence[str] = tuple(TABLES),
    seeds: int = 3,
    scale: Scale | None = None,
    jobs: int | None = None,
    progress: bool = True,
) -> Path:
    """Train and score every run that the tables need, and write `out/experiments.md`, its figures beside it.

    Finished runs are not repeated, so an interrupted call continues where it stopped.

    Args:
        out: a folder, made if need be.
        tables: keys of TABLES.
        seeds: runs of each kind, from seed 0 on: of data, weights and masks.
        scale: None: `Scale()`.
        jobs: runs at a time, each on its share of the cores; None: as many as cores.
        progress: show a progress bar on stderr.
    Returns:
        The path of experiments.md.
    Raises:
        ValueError: a table that is not there, or runs in `out` of other settings. RuntimeError: a run was stopped.
        ChildProcessError: one was killed.
    """
    from tqdm import tqdm

    scale, out = scale or Scale(), Path(out)
    unknown = sorted(set(tables) - set(TABLES))
    if unknown or not tables:
        raise ValueError(f"tables must be of {', '.join(TABLES)}, got {', '.join(unknown) or 'none'}")
    _checks.integer("seeds", seeds, 1)
    names = runs_of(list(tables))
    todo = [(name, seed) for seed in range(seeds) for name in names]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = min(cores if jobs is None else jobs, len(todo))
    _checks.integer("jobs", jobs, 1)
    pool = ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(max(cores // jobs, 1),)
    )
    left, running = iter(todo), {}
    with pool, tqdm(total=len(todo), disable=not progress, desc="runs") as bar:
        while True:
            # no more than are run: what a pool has been given it would train, whatever happened meanwhile
            for name, seed in itertools.islice(left, jobs - len(running)):
                running[pool.submit(train_and_score, name, seed, scale, out)] = f"{name}-{seed}"
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                try:
                    future.result()
                except BrokenProcessPool:
                    raise ChildProcessError(
                        f"{out / name} or a run beside it was killed; the same command goes on"
                    ) from None
                bar.update()
    return write_report(out, list(tables), seeds, scale)


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A run whose parent was killed must not go on beside the same one started again."""
    multiprocessing.parent_process().join()
    os._exit(1)


def train_and_score(name: str, seed: int, scale: Scale, out: Path) -> dict[str, float]:
    """One run in `out/<name>-<seed>`: its scores in percent, also written as scores.json, and read from there if the
    run is done already.

    Args:
        name, seed, scale: as of `config_of`. out: a folder.
    Raises:
        ValueError: what is there is of other settings. RuntimeError: it was stopped by Ctrl-C.
    """
    folder = Path(out) / f"{name}-{seed}"
    path, config = folder / "scores.json", config_of(name, seed, scale)
    about = {"scale": dataclasses.asdict(scale), "run": config.identity()}
    if path.is_file():
        found = read_json(path)
        if found["about"] != about:
            raise ValueError(f"out must hold runs of the same settings, got others in {path}: {found['about']}")
        return found["scores"]
    encode = _pixels if name == "pixels" else functools.partial(extract, _model(name, config, folder))
    scores = score(encode, scale, ood=any(row.run == name for row in TABLES["ood"].rows))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {"about": about, "scores": scores})
    return scores


def _model(name: str, config: RunConfig, folder: Path) -> nn.Module:
    if name in UNTRAINED:
        return build_model(create(folder, config)[0])
    summary = pretrain(config, folder, resume="auto", progress=False)
    if summary.interrupted:
        raise RuntimeError(f"{folder} was stopped after {summary.step} steps; the same command goes on")
    return load_run(folder).model


def _pixels(samples: Sequence[Sample], labeled: bool = True) -> Features:
    """Averages of 4 x 4 pixels, in place of features."""
    samples = list(samples)  # drawn once
    images = torch.stack([torch.from_numpy(sample.image) for sample in samples]).permute(0, 3, 1, 2)
    labels = [sample.labels[0] if labeled else -1 for sample in samples]
    return Features(F.avg_pool2d(images / 255, 4).flatten(1), torch.tensor(labels, device="cpu"))


def score(encode: Callable[..., Features], scale: Scale, *, ood: bool) -> dict[str, float]:
    """Linear classification of frozen features of whole images without a word; with `ood` the AUROCs, too.

    Args:
        encode: encode(samples, labeled=True) -> Features. scale: how many images. ood: see above.
    """
    train = encode(Some(ClutteredShapes(IMAGE_SIZE, TRAIN_SEED), scale.train))
    test = encode(Some(ClutteredShapes(IMAGE_SIZE, TEST_SEED), scale.test))
    classes = len(ClutteredShapes.classes)
    scores = {"linear": 100 * linear_probe(train, test, classes=classes).value}
    if not ood:
        return scores
    fitted = _part(train, train.labels < KNOWN)
    probe, distance = fit_probe(fitted, classes=KNOWN), Mahalanobis(fitted)
    far = encode(Some(ShapesDataset(IMAGE_SIZE, FAR_SEED), scale.test // 2), labeled=False)
    inside, near = _part(test, test.labels < KNOWN), _part(test, test.labels >= KNOWN)
    with torch.no_grad():
        ways = {"softmax": lambda x: max_softmax(probe(x.cls)), "Mahalanobis": lambda x: distance.score(x.cls)}
        for way, of in ways.items():
            for kind, outside in (("near", near), ("far", far)):
                scores[f"{kind} {way}"] = 100 * auroc(of(inside), of(outside))
    return scores


def _part(features: Features, chosen: torch.Tensor) -> Features:
    return Features(features.cls[chosen], features.labels[chosen])
