"""`m3ae-fast retrieve | vqa | reason | ground`: a pre-trained run put to use, results as a table and as JSON."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

SHAPES_TRAINING = 50_000  # scenes to fine-tune on: more than are ever read


def add_commands(add: Callable[..., argparse.ArgumentParser], natural: Callable, positive: Callable) -> None:
    """Register the commands. add: makes a parser of (name, function, text)."""
    retrieve = add("retrieve", _retrieve, "Find captions for images and images for captions: recall at 1, 5 and 10.")
    _common(retrieve, natural, positive, "shapes|DIR|FILE.jsonl", '{"image": PATH, "caption": TEXT or [TEXT, ...]}')
    retrieve.add_argument("--rerank", type=natural, default=16, metavar="K", help="of ITC's best, by ITM (%(default)s)")
    retrieve.add_argument(
        "--finetune", type=natural, default=0, metavar="STEPS", help="with ITC and ITM first (default: zero-shot)"
    )
    retrieve.add_argument("--train", metavar="SPEC", help="data to fine-tune on; like --data (default: new shapes)")
    _lr(retrieve)

    vqa = add("vqa", _vqa, "Learn to answer questions about images, from a fixed list of answers.")
    _common(vqa, natural, positive, "shapes|FILE.jsonl", '{"image": PATH, "question": TEXT, "answer": TEXT}')
    _trained(vqa, positive)
    vqa.add_argument(
        "--answers", type=Path, metavar="FILE", help="an answer a line (default: those of the training data)"
    )

    reason = add("reason", _reason, "Learn to tell whether a sentence is true of two images.")
    rows = '{"left": PATH, "right": PATH, "sentence": TEXT, "label": true|false}'
    _common(reason, natural, positive, "shapes|FILE.jsonl", rows)
    _trained(reason, positive)

    ground = add("ground", _ground, "Find phrases in images, by Grad-CAM: no box is ever learned from.")
    rows = '{"image": PATH, "phrase": TEXT, "box": [x0, y0, x1, y1] if known}'
    _common(ground, natural, positive, "shapes|FILE.jsonl", rows)
    ground.add_argument("--block", type=natural, metavar="N", help="of the fusion encoder (default: the middle one)")
    ground.add_argument("--picture", type=Path, metavar="FILE", help="draw the first six there")


def _common(command: argparse.ArgumentParser, natural: Callable, positive: Callable, spec: str, rows: str) -> None:
    command.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or one of its checkpoints")
    command.add_argument(
        "--data", default="shapes", metavar=spec, help=f"scored on this (%(default)s); rows of a file: {rows}"
    )
    command.add_argument("--samples", type=positive, metavar="N", help="of the data (shapes: 500; others: all)")
    command.add_argument("--out", type=Path, metavar="FILE", help="results as JSON")
    command.add_argument("--seed", type=natural, default=0, metavar="S", help="of scenes and training (%(default)s)")
    command.add_argument("--device", default="cpu", help="%(default)s")


def _trained(command: argparse.ArgumentParser, positive: Callable) -> None:
    command.add_argument("--train", metavar="SPEC", help="data to train on; like --data (default: new shapes)")
    _lr(command)
    command.add_argument("--steps", type=positive, default=600, metavar="N", help="of training (%(default)s)")
    command.add_argument("--batch-size", type=positive, default=32, metavar="B", help="of training (%(default)s)")
    command.add_argument("--save", type=Path, metavar="FILE", help="the trained model, as safetensors")


def _lr(command: argparse.ArgumentParser) -> None:
    command.add_argument("--lr", type=float, default=5e-4, help="of training, at its peak (%(default)s)")


def _open(args: argparse.Namespace, *objectives: str):
    """The run, and (open the data to score on, open the data to train on) by an opener of downstream.files."""
    from m3ae_fast.train import load_run

    for name in ("out", "save", "picture"):
        path = getattr(args, name, None)
        if path and (path.is_dir() or not path.parent.is_dir()):  # or hours of training would end here
            raise ValueError(f"--{name} must name a file in a folder that exists, got {path}")
    run = load_run(args.run, args.device, objectives=objectives)
    size = run.model.config.image_shape[0]

    def scored(opener: Callable):
        count = args.samples or (500 if args.data == "shapes" else None)
        return opener(args.data, image_size=size, seed=args.seed + run.config.seed + 1, count=count)

    def trained(opener: Callable):
        spec = args.train or args.data
        if not args.train and args.data != "shapes":
            raise ValueError(f"--train must name data to train on, beside --data {args.data}, got none")
        seed = args.seed + run.config.seed + 2  # scenes that are not scored
        return opener(spec, image_size=size, seed=seed, count=SHAPES_TRAINING if spec == "shapes" else None)

    return run, scored, trained


def _finish(args: argparse.Namespace, run, results: list) -> int:
    from m3ae_fast.downstream import report

    print(report.table(results))
    if args.out:
        about = {"command": args.name, "run": str(args.run), "step": run.step, "data": args.data, "seed": args.seed}
        report.write(args.out, results, about)
        print(f"results: {args.out}")
    return 0


def _save(args: argparse.Namespace, model) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from m3ae_fast._files import replacing

    if args.save:
        tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
        with replacing(args.save) as temporary:
            try:
                save_file(tensors, temporary)
            except SafetensorError as error:  # a full disk
                raise OSError(f"{args.save} cannot be written: {error}") from None
        print(f"model: {args.save}")


def _retrieve(args: argparse.Namespace) -> int:
    from m3ae_fast.downstream.files import open_pairs
    from m3ae_fast.downstream.retrieve import finetune_retrieval, retrieve

    if args.train and not args.finetune:
        raise ValueError(f"--train must come with --finetune STEPS, got --train {args.train} alone")
    run, scored, trained = _open(args, "mamo", "clip")
    pairs = scored(open_pairs)
    if args.finetune:
        options = {"steps": args.finetune, "lr": args.lr, "seed": args.seed}
        finetune_retrieval(run.model, trained(open_pairs), run.tokenizer, **options)
    return _finish(args, run, retrieve(run.model, pairs, run.tokenizer, rerank=args.rerank))


def _vqa(args: argparse.Namespace) -> int:
    from m3ae_fast.downstream.files import open_questions, read_answers
    from m3ae_fast.downstream.vqa import score_vqa, train_vqa
    from m3ae_fast.models.vqa import VQA

    run, scored, trained = _open(args, "mamo")
    questions, training = scored(open_questions), trained(open_questions)
    answers = read_answers(args.answers) if args.answers else training.answers()
    model = VQA(run.model).to(args.device)
    options = {"steps": args.steps, "batch_size": args.batch_size, "lr": args.lr, "seed": args.seed}
    train_vqa(model, training, run.tokenizer, **options)
    _save(args, model)
    return _finish(args, run, score_vqa(model, questions, answers, run.tokenizer))


def _reason(args: argparse.Namespace) -> int:
    from m3ae_fast.downstream.files import open_statements
    from m3ae_fast.downstream.reason import score_reason, train_reason
    from m3ae_fast.models.reason import Reason

    run, scored, trained = _open(args, "mamo")
    statements, training = scored(open_statements), trained(open_statements)
    model = Reason(run.model).to(args.device)
    options = {"steps": args.steps, "batch_size": args.batch_size, "lr": args.lr, "seed": args.seed}
    train_reason(model, training, run.tokenizer, **options)
    _save(args, model)
    return _finish(args, run, score_reason(model, statements, run.tokenizer))


def _ground(args: argparse.Namespace) -> int:
    from m3ae_fast.downstream.files import open_phrases
    from m3ae_fast.downstream.ground import draw_ground, score_ground

    run, scored, _ = _open(args, "mamo")
    phrases = scored(open_phrases)
    if args.picture:
        first = [phrases[i] for i in range(min(6, len(phrases)))]
        draw_ground(run.model, first, run.tokenizer, args.picture, block=args.block)
        print(f"picture: {args.picture}")
    if all(phrases[i].box is None for i in range(len(phrases))):
        print("no phrase has a box: nothing to score" + (f", {args.out} is not written" if args.out else ""))
        return 0
    return _finish(args, run, score_ground(run.model, phrases, run.tokenizer, block=args.block))
