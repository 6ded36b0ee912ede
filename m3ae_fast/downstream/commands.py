"""`m3ae-fast retrieve | vqa | reason | ground`, `probe | finetune | ood | attend | project`: a pre-trained run put to
use, results as a table and as JSON, pictures as PNG."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from m3ae_fast._settings import natural, positive

CLASSES = "cluttered"  # what is classified where no data is named: drawn, of one class each
TRAINING = 50_000  # drawn scenes to fine-tune on: more than are ever read
PROBED = 2000  # drawn scenes to fit a probe to, all of which are


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Register the commands. add: makes a parser of (name, function, text)."""
    retrieve = add("retrieve", _retrieve, "Find captions for images and images for captions: recall at 1, 5 and 10.")
    _common(retrieve, "shapes|DIR|FILE.jsonl", '{"image": PATH, "caption": TEXT or [TEXT, ...]}')
    retrieve.add_argument("--rerank", type=natural, default=16, metavar="K", help="of ITC's best, by ITM (%(default)s)")
    retrieve.add_argument(
        "--finetune", type=natural, default=0, metavar="STEPS", help="with ITC and ITM first (default: zero-shot)"
    )
    retrieve.add_argument("--train", metavar="SPEC", help="data to fine-tune on; like --data (default: new shapes)")
    _lr(retrieve)

    vqa = add("vqa", _vqa, "Learn to answer questions about images, from a fixed list of answers.")
    _common(vqa, "shapes|FILE.jsonl", '{"image": PATH, "question": TEXT, "answer": TEXT}')
    _trained(vqa)
    vqa.add_argument(
        "--answers", type=Path, metavar="FILE", help="an answer a line (default: those of the training data)"
    )

    reason = add("reason", _reason, "Learn to tell whether a sentence is true of two images.")
    rows = '{"left": PATH, "right": PATH, "sentence": TEXT, "label": true|false}'
    _common(reason, "shapes|FILE.jsonl", rows)
    _trained(reason)

    ground = add("ground", _ground, "Find phrases in images, by Grad-CAM: no box is ever learned from.")
    rows = '{"image": PATH, "phrase": TEXT, "box": [x0, y0, x1, y1] if known}'
    _common(ground, "shapes|FILE.jsonl", rows)
    ground.add_argument("--block", type=natural, metavar="N", help="of the fusion encoder (default: the middle one)")
    ground.add_argument("--picture", type=Path, metavar="FILE", help="draw the first six there")
    _add_class_commands(add)


def _add_class_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Those that read images of one class each."""
    probe = add("probe", _probe, "Classify images by a linear probe on frozen features.")
    _classes(probe)
    _fitted(probe)

    finetune = add("finetune", _finetune, "Fine-tune the image encoder to classify images.")
    _classes(finetune)
    _trained(finetune, batch_size=64, lr=1e-3, unit=", for 256 samples of a step")
    finetune.add_argument("--layer-decay", type=float, default=0.75, metavar="D", help="of the rate (%(default)s)")
    finetune.add_argument("--drop-path", type=float, default=0.1, metavar="P", help="in the last block (%(default)s)")
    finetune.add_argument("--mixup", type=float, default=0.8, metavar="A", help="0: none (%(default)s)")
    finetune.add_argument("--cutmix", type=float, default=1.0, metavar="A", help="0: none (%(default)s)")
    finetune.add_argument("--smoothing", type=float, default=0.1, metavar="S", help="of labels (%(default)s)")
    finetune.add_argument("--workers", type=natural, default=0, metavar="N", help="processes that load data (0)")

    ood = add("ood", _ood, "Tell images of unknown kinds from those of the training classes: AUROC of two scores.")
    _classes(ood)
    ood.add_argument("--out-data", required=True, metavar="shapes|DIR", help="images of other kinds; labels unread")
    _fitted(ood)
    ood.add_argument("--classifier", type=Path, metavar="FILE", help="of finetune --save, instead of a probe")

    attend = add("attend", _attend, "Draw where in an image CLS and each word of its caption look.")
    attend.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or one of its checkpoints")
    attend.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="none: four of the run's own data")
    attend.add_argument("--caption", dest="captions", action="append", metavar="TEXT", help="one for each image")
    attend.add_argument("--out", type=Path, default=Path("attention.png"), metavar="FILE", help="%(default)s")
    attend.add_argument("--layer", type=natural, metavar="N", help="block, from 0 (default: the last)")
    attend.add_argument("--rollout", action="store_true", help="through all blocks (arXiv:2005.00928)")
    attend.add_argument("--device", default="cpu", help="%(default)s")

    project = add("project", _project, "Draw features in two dimensions (t-SNE), coloured by class.")
    _classes(project, out=False)
    project.add_argument("--out", type=Path, default=Path("features.png"), metavar="FILE", help="%(default)s")
    project.add_argument("--text", action="store_true", help="encode each image beside its caption")
    project.add_argument("--perplexity", type=float, default=30.0, metavar="P", help="%(default)s")


def _classes(command: argparse.ArgumentParser, *, out: bool = True) -> None:
    spec = f"{CLASSES}|DIR"
    _common(command, spec, "a subfolder of DIR is a class", default=CLASSES, out=out)


def _fitted(command: argparse.ArgumentParser) -> None:
    command.add_argument("--train", metavar="SPEC", help="data to fit to; like --data (default: new scenes)")
    command.add_argument("--train-samples", type=positive, metavar="N", help=f"drawn: {PROBED}; others: all")
    command.add_argument(
        "--crops", type=positive, metavar="N", help="of every image to fit to, random (default: the middle)"
    )
    command.add_argument("--method", choices=("ridge", "lars", "sgd"), default="ridge", help="%(default)s")
    command.add_argument("--epochs", type=positive, default=90, metavar="N", help="lars, sgd (%(default)s)")
    command.add_argument("--batch-size", type=positive, default=256, metavar="B", help="lars, sgd (%(default)s)")
    command.add_argument("--lr", type=float, default=0.1, help="lars, sgd: at its peak, for 256 samples (%(default)s)")
    command.add_argument("--text", action="store_true", help="encode each image beside its caption")


def _common(
    command: argparse.ArgumentParser,
    spec: str,
    rows: str,
    *,
    default: str = "shapes",
    out: bool = True,
) -> None:
    command.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or one of its checkpoints")
    rows = f"rows of a file: {rows}" if "FILE" in spec else rows
    command.add_argument("--data", default=default, metavar=spec, help=f"scored on this (%(default)s); {rows}")
    command.add_argument("--samples", type=positive, metavar="N", help="of the data (drawn: 500; others: all)")
    if out:
        command.add_argument("--out", type=Path, metavar="FILE", help="results as JSON")
    command.add_argument("--seed", type=natural, default=0, metavar="S", help="of scenes and training (%(default)s)")
    command.add_argument("--device", default="cpu", help="%(default)s")


def _trained(command: argparse.ArgumentParser, batch_size: int = 32, **lr) -> None:
    command.add_argument("--train", metavar="SPEC", help="data to train on; like --data (default: new scenes)")
    _lr(command, **lr)
    command.add_argument("--steps", type=positive, default=600, metavar="N", help="of training (%(default)s)")
    command.add_argument(
        "--batch-size", type=positive, default=batch_size, metavar="B", help="of training (%(default)s)"
    )
    command.add_argument("--save", type=Path, metavar="FILE", help="the trained model, as safetensors")


def _lr(command: argparse.ArgumentParser, lr: float = 5e-4, unit: str = "") -> None:
    command.add_argument("--lr", type=float, default=lr, help=f"of training, at its peak{unit} (%(default)s)")


def _open(args: argparse.Namespace, *objectives: str):
    """The run, and (open the data to score on, open the data to train on) by an opener such as `open_pairs`."""
    from m3ae_fast.data import DRAWN
    from m3ae_fast.train import load_run

    for name in ("out", "save", "picture"):
        path = getattr(args, name, None)
        if path and (path.is_dir() or not path.parent.is_dir()):  # or hours of training would end here
            raise ValueError(f"--{name} must name a file in a folder that exists, got {path}")
    run = load_run(args.run, args.device, **({"objectives": objectives} if objectives else {}))
    size = run.model.config.image_shape[0]

    def scored(opener: Callable, spec: str | None = None):
        spec = spec or args.data
        count = args.samples or (500 if spec in DRAWN else None)
        seed = 2 * (args.seed + run.config.seed) + 1  # odd
        return opener(spec, image_size=size, seed=seed, count=count)

    def trained(opener: Callable, count: int | None = None, drawn: int = TRAINING):
        spec = args.train or args.data
        if not args.train and args.data not in DRAWN:
            raise ValueError(f"--train must name data to train on, beside --data {args.data}, got none")
        count = count or (drawn if spec in DRAWN else None)
        seed = 2 * (args.seed + run.config.seed) + 2  # even: of scenes that no --seed scores
        return opener(spec, image_size=size, seed=seed, count=count)

    return run, scored, trained


def _finish(args: argparse.Namespace, run, results: list, **about) -> int:
    """Print the results; write them beside the command's arguments, of which `about` names what they left open."""
    from m3ae_fast.downstream.scoring import report

    print(report.table(results))
    if args.out:
        given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        del given["name"], given["out"]
        report.write(args.out, results, given | {"command": args.name, "step": run.step} | about)
        print(f"results: {args.out}")
    return 0


def _save(args: argparse.Namespace, model, **metadata: str) -> None:
    from m3ae_fast._files import write_tensors

    if args.save:
        write_tensors(args.save, model.state_dict(), metadata)
        print(f"model: {args.save}")


def _retrieve(args: argparse.Namespace) -> int:
    from m3ae_fast.data.examples.files import open_pairs
    from m3ae_fast.downstream.tasks.retrieve import finetune_retrieval, retrieve

    if args.train and not args.finetune:
        raise ValueError(f"--train must come with --finetune STEPS, got --train {args.train} alone")
    run, scored, trained = _open(args, "mamo", "clip")
    pairs = scored(open_pairs)
    if args.finetune:
        options = {"steps": args.finetune, "lr": args.lr, "seed": args.seed}
        finetune_retrieval(run.model, trained(open_pairs), run.tokenizer, **options)
    return _finish(args, run, retrieve(run.model, pairs, run.tokenizer, rerank=args.rerank))


def _vqa(args: argparse.Namespace) -> int:
    from m3ae_fast.data.examples.files import open_questions, read_answers
    from m3ae_fast.downstream.tasks.vqa import train_vqa, vqa
    from m3ae_fast.models.vqa import VQA

    run, scored, trained = _open(args, "mamo")
    questions, training = scored(open_questions), trained(open_questions)
    answers = read_answers(args.answers) if args.answers else training.answers()
    model = VQA(run.model).to(args.device)
    options = {"steps": args.steps, "batch_size": args.batch_size, "lr": args.lr, "seed": args.seed}
    train_vqa(model, training, run.tokenizer, **options)
    _save(args, model)
    return _finish(args, run, vqa(model, questions, answers, run.tokenizer))


def _reason(args: argparse.Namespace) -> int:
    from m3ae_fast.data.examples.files import open_statements
    from m3ae_fast.downstream.tasks.reason import reason, train_reason
    from m3ae_fast.models.reason import Reason

    run, scored, trained = _open(args, "mamo")
    statements, training = scored(open_statements), trained(open_statements)
    model = Reason(run.model).to(args.device)
    options = {"steps": args.steps, "batch_size": args.batch_size, "lr": args.lr, "seed": args.seed}
    train_reason(model, training, run.tokenizer, **options)
    _save(args, model)
    return _finish(args, run, reason(model, statements, run.tokenizer))


def _ground(args: argparse.Namespace) -> int:
    from m3ae_fast.data.examples.files import open_phrases
    from m3ae_fast.downstream.tasks.ground import draw_ground, ground

    run, scored, _ = _open(args, "mamo")
    phrases = scored(open_phrases)
    if args.picture:
        first = [phrases[i] for i in range(min(6, len(phrases)))]
        draw_ground(run.model, first, run.tokenizer, args.picture, block=args.block)
        print(f"picture: {args.picture}")
    if all(phrases[i].box is None for i in range(len(phrases))):
        print("no phrase has a box: nothing to score" + (f", {args.out} is not written" if args.out else ""))
        return 0
    return _finish(args, run, ground(run.model, phrases, run.tokenizer, block=args.block))


def _pair_of_classes(scored: Callable, trained: Callable, **options):
    """(data to score on, data to train on), which must have the same classes."""
    from m3ae_fast.data.samples import open_classes

    test, training = scored(open_classes), trained(open_classes, **options)
    if test.classes != training.classes:
        raise ValueError(f"--train must have the classes of --data, {_few(test.classes)}, got {_few(training.classes)}")
    return test, training


def _fit(args: argparse.Namespace, training, run):
    """(features to fit to, options of `fit_probe`)."""
    from m3ae_fast.data.samples import Crops
    from m3ae_fast.downstream.features import extract

    size = run.model.config.image_shape[0]
    samples = Crops(training, args.crops, size, args.seed) if args.crops else training
    names = ("method", "epochs", "batch_size", "lr", "seed")
    options = {name: getattr(args, name) for name in names}
    options |= {"classes": len(training.classes), "crops": args.crops or 1}
    return extract(run.model, samples, run.tokenizer, text=args.text), options


def _classifier(path: Path, model, classes: tuple[str, ...]):
    from m3ae_fast.downstream.tasks.finetune import load_classifier

    classifier, theirs = load_classifier(path, model)
    if tuple(theirs) != classes:
        raise ValueError(f"{path} must be of the classes of --data, {_few(classes)}, got {_few(theirs)}")
    return classifier


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (f" ... ({len(names)})" if len(names) > 5 else "")


def _probe(args: argparse.Namespace) -> int:
    from m3ae_fast.downstream.features import extract
    from m3ae_fast.downstream.tasks.probe import probe

    run, scored, trained = _open(args)
    samples, training = _pair_of_classes(scored, trained, count=args.train_samples, drawn=PROBED)
    test = extract(run.model, samples, run.tokenizer, text=args.text)
    train, options = _fit(args, training, run)
    return _finish(args, run, [probe(train, test, **options)], train_samples=len(training))


def _finetune(args: argparse.Namespace) -> int:
    import json

    from m3ae_fast.downstream.tasks.finetune import Classifier, finetune, score_classifier

    run, scored, trained = _open(args)
    test, training = _pair_of_classes(scored, trained)
    model = Classifier(run.model, len(training.classes))
    names = ("steps", "batch_size", "lr", "layer_decay", "drop_path", "mixup", "cutmix", "smoothing", "seed", "workers")
    finetune(model, training, **{name: getattr(args, name) for name in names})
    _save(args, model, classes=json.dumps(training.classes))
    return _finish(args, run, [score_classifier(model, test)])


def _ood(args: argparse.Namespace) -> int:
    from m3ae_fast.data.samples import open_some
    from m3ae_fast.downstream.features import extract
    from m3ae_fast.downstream.tasks.ood import ood
    from m3ae_fast.downstream.tasks.probe import fit_probe

    if args.classifier and args.text:
        raise ValueError("--text must not be given with --classifier, which reads images alone")
    run, scored, trained = _open(args)
    samples, training = _pair_of_classes(scored, trained, count=args.train_samples, drawn=PROBED)
    strange = scored(open_some, args.out_data)
    model = _classifier(args.classifier, run.model, samples.classes) if args.classifier else None
    reading = {"tokenizer": run.tokenizer, "text": args.text}
    known, unknown = extract(run.model, samples, **reading), extract(run.model, strange, **reading, labelled=False)
    train, options = _fit(args, training, run)
    if model:
        results = ood(train, known, unknown, lambda cls: model.classify(cls.to(args.device)).cpu())
    else:
        results = ood(train, known, unknown, fit_probe(train, **options))
    return _finish(args, run, results, train_samples=len(training))


def check_captions(args: argparse.Namespace) -> None:
    """ValueError: captions were given, but not one for each image."""
    if args.captions and len(args.captions) != len(args.images):
        raise ValueError(
            f"--caption must be given once for each image, got {len(args.captions)} for {len(args.images)}"
        )


def _attend(args: argparse.Namespace) -> int:
    from m3ae_fast.downstream.features import reads_pairs
    from m3ae_fast.downstream.tasks.attend import draw_attention
    from m3ae_fast.train.pictures import batch_of_files, held_out

    check_captions(args)
    run, *_ = _open(args)
    if args.captions and not reads_pairs(run.model):
        kind = type(run.model).__name__
        raise ValueError(f"--caption must not be given: {kind} encodes no image beside its words, got {args.captions}")
    if args.images:
        batch = batch_of_files(args.images, args.captions, run.model.config, run.tokenizer)
    else:
        batch = held_out(run.model.config, run.tokenizer, run.config, count=4)
    options = {"layer": args.layer, "rollout": args.rollout}
    draw_attention(run.model, batch.to(args.device), run.tokenizer, args.out, **options)
    print(f"{args.out}: {len(batch)} images, the model after {run.step:,} steps")
    return 0


def _project(args: argparse.Namespace) -> int:
    from m3ae_fast.data.samples import open_classes
    from m3ae_fast.downstream.features import extract
    from m3ae_fast.downstream.tasks.project import draw_projection, project

    run, scored, _ = _open(args)
    samples = scored(open_classes)
    features = extract(run.model, samples, run.tokenizer, text=args.text)
    points = project(features.cls, perplexity=args.perplexity, seed=args.seed)
    draw_projection(points, features.labels, samples.classes, args.out)
    print(f"{args.out}: {len(points)} images of {len(samples.classes)} classes, the model after {run.step:,} steps")
    return 0
