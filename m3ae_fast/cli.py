"""m3ae-fast: the command line. `m3ae-fast pretrain` alone trains a tiny model on synthetic scenes.

Exit status: 0 done; 2 a mistake in the call, the data or a file, or another process of torchrun's lost, told in one
line; 130 stopped by Ctrl-C; 141 the reader of its output is gone.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import os
import re
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

from m3ae_fast._explain import __version__, explain
from m3ae_fast._settings import add_options, given, name_and_value, natural, path, positive
from m3ae_fast._warning import M3AEFastWarning
from m3ae_fast.downstream import TASKS
from m3ae_fast.downstream.commands.arguments import add_captions, add_device, add_picture, add_run, check_captions

INTERRUPTED, BROKEN_PIPE = 130, 141  # as shells say it: 128 + SIGINT, 128 + SIGPIPE
EXAMPLES = {  # of each command, shown by its --help
    "pretrain": (
        "pretrain --data photos --model small --steps 10000 --batch-size 64 --out runs/mine",
        "pretrain --out runs/mine --resume",
    ),
    "reconstruct": (
        "reconstruct runs/mine --data photos --out picture.png",
        'reconstruct runs/mine cat.jpg --caption "a cat on a sofa"',
    ),
    "probe": ("probe runs/mine --data imagenet/val --train imagenet/train", "probe runs/mine --method lars --crops 8"),
    "finetune": (
        "finetune runs/mine --data imagenet/val --train imagenet/train --save classifier.safetensors",
        "finetune runs/mine --steps 2000 --lr 0.01",
    ),
    "ood": (
        "ood runs/mine --data photos/val --train photos/train --out-data drawings",
        "ood runs/mine --out-data shapes",
    ),
    "attend": (
        'attend runs/mine cat.jpg --caption "a cat on a sofa"',
        "attend runs/mine --rollout --out attention.png",
    ),
    "project": ("project runs/mine --data photos/val --out features.png", "project runs/mine --perplexity 10"),
    "retrieve": ("retrieve runs/mamo --data pairs.jsonl", "retrieve runs/mamo --samples 1000 --out retrieval.json"),
    "vqa": ("vqa runs/mamo --steps 1800 --save vqa.safetensors", "vqa runs/mamo --load vqa.safetensors"),
    "reason": ("reason runs/mamo --steps 3500 --lr 4e-4", "reason runs/mamo --data statements.jsonl"),
    "ground": ("ground runs/mamo --picture where.png", "ground runs/mamo --data phrases.jsonl"),
    "imagine": (
        'imagine runs/mine --caption "a large red star in the center on a white background"',
        "imagine runs/mine cat.jpg --words 7",
    ),
    "demo": ("demo runs/first --seed 7", "demo runs/mamo --vqa vqa.safetensors --out mamo.png"),
    "experiments": ("experiments --out runs/tables", "experiments --only objectives --seeds 1"),
    "info": ("info", "--version"),
    "convert": (
        "convert mae_pretrain_vit_base.pth mae.safetensors",
        "convert runs/mine vitmae --to vitmae",
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; `argv` without the program's name, None: sys.argv. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if hasattr(sys.stdout, "reconfigure"):  # a terminal that cannot show a character shows another, and lives
        sys.stdout.reconfigure(errors="replace")
        sys.stderr.reconfigure(errors="replace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            args = _parser(*argv[:1]).parse_args(argv)
            status = args.command(args)
            sys.stdout.flush()
            return status
    except KeyboardInterrupt:
        print("m3ae-fast: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the program that reads the output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still to be flushed goes nowhere
        return BROKEN_PIPE
    except Exception as error:
        if not _is_the_callers(error):
            raise
        message = " ".join(str(error).split())
        if isinstance(error, ModuleNotFoundError) and "pip install" not in message:
            message += ": pip install '.[train]'"
        if _is_out_of_memory(error):
            message += "; --checkpoint-blocks needs less memory, for the same numbers"
        if type(error).__name__ != "FailedElsewhere":  # the first process says what it was
            print(f"{_process()}m3ae-fast {argv[0]}: error: {message}", file=sys.stderr)
        return 2


def _is_the_callers(error: Exception) -> bool:
    """Whether a line that names the argument or the file says all there is to say; anything else is our bug."""
    if isinstance(error, ModuleNotFoundError):  # of the train extra; none of our own modules is ever missing
        return not (error.name or "m3ae_fast").startswith("m3ae_fast")
    kinds = (ValueError, TypeError, OSError, FloatingPointError)
    names = ("BadSample", "FailedElsewhere")  # of what is imported late
    return isinstance(error, kinds) or type(error).__name__ in names or _is_out_of_memory(error)


def _is_out_of_memory(error: Exception) -> bool:
    """Python's, torch's on a GPU, or torch's on a CPU, which has no type of its own."""
    return "Memory" in type(error).__name__ or "DefaultCPUAllocator" in str(error)


def _process() -> str:
    """What a line on stderr begins with, of any process but the first that torchrun started."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"process {rank}: "


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    if issubclass(category, M3AEFastWarning):
        print(f"\n{_process()}warning: {message}", file=sys.stderr)  # below the progress bar
    elif not _process():  # what every process would say, once
        print(warnings.formatwarning(message, category, filename, lineno, line), file=sys.stderr, end="")


def _pretrain(args: argparse.Namespace) -> int:
    from m3ae_fast.data.specs import listed, refuse_streamed
    from m3ae_fast.train import RECIPES, RunConfig, pretrain
    from m3ae_fast.train.distributed import is_first
    from m3ae_fast.train.recipes import describe
    from m3ae_fast.train.summary import print_summary

    recipe = getattr(args, "recipe", None)
    if recipe == "list":
        print(describe())
        return 0
    if recipe is not None and recipe not in RECIPES:
        raise ValueError(f"recipe must be list or one of {', '.join(RECIPES)}, got {recipe}")
    values = RECIPES.get(recipe, {}) | given(RunConfig, args)
    config = RunConfig(**values)
    objective = [config.objective] if config.objective != RunConfig.objective else []
    out = getattr(args, "out", Path("runs") / "-".join([_name_of(config.data), *objective, config.model]))
    resumed = args.resume and (out / "run.json").is_file()
    if resumed:
        config = dataclasses.replace(RunConfig.load(out), **values)
        if "data" not in values:
            refuse_streamed(config.data, out / "run.json", "to allow it, name them by --data, too")
    shown = " + ".join(listed(config.data))
    doing = "going on with" if resumed else "training"
    if is_first():
        print(
            f"{doing} {config.objective} {config.model} on {shown} into {out} (Ctrl-C saves and stops)",
            file=sys.stderr,
        )
    summary = pretrain(config, out, resume=args.resume, stop_after=getattr(args, "stop_after", None))
    if is_first():
        print_summary(summary)
    return INTERRUPTED if summary.interrupted else 0


def _name_of(data: str | list[str]) -> str:
    """A short one, for the run's folder: "cc12m" of "/data/cc12m-{00..11}.tar=3", "cc12m-texts" of two."""
    from m3ae_fast.data.specs import absolute, listed, split_weight

    names = (Path(split_weight(absolute(spec))[0]).name for spec in listed(data))
    return "-".join(re.sub(r"(\.(h5|hdf5|jsonl|ndjson|tar))?([{*?:&].*)?$", "", name).strip("-_.") for name in names)


def _reconstruct(args: argparse.Namespace) -> int:
    from m3ae_fast.data.specs import refuse_streamed
    from m3ae_fast.models import objectives_offering
    from m3ae_fast.train import load_run
    from m3ae_fast.train.pictures import batch_of_files, draw_reconstruction, held_out

    if args.images and args.data:
        raise ValueError("give images or --data, not both")
    check_captions(args)
    objectives = objectives_offering("reconstruct")
    run = load_run(args.run, args.device, objectives=objectives, image_size=args.image_size)
    if args.images:
        batch = batch_of_files(args.images, args.captions, run.model.config, run.tokenizer)
    else:
        if args.data is None:
            refuse_streamed(run.config.data, args.run, "give images or --data")
        batch = held_out(run.model.config, run.tokenizer, run.config, data=args.data, count=args.samples)
    seed = run.config.seed if args.seed is None else args.seed
    draw_reconstruction(run.model, run.tokenizer, batch, args.out, seed=seed, device=args.device)
    print(f"{args.out}: {len(batch)} samples, the model after {run.step:,} steps")
    return 0


def _experiments(args: argparse.Namespace) -> int:
    from m3ae_fast.experiments import TABLES, Scale, experiments

    scale = Scale.smoke() if args.smoke else Scale(steps=args.steps)
    page = experiments(args.out, tables=args.only or list(TABLES), seeds=args.seeds, scale=scale, jobs=args.jobs)
    print(page.read_text(encoding="utf-8"))
    print(f"tables: {page}")
    return 0


def _info(args: argparse.Namespace) -> int:
    print(explain())
    return 0


def _convert(args: argparse.Namespace) -> int:
    from m3ae_fast import convert
    from m3ae_fast.convert.torch_files import SAFETENSORS, is_torch

    if not args.source.exists():
        raise FileNotFoundError(f"there is no file or folder {args.source}")
    options = dict(args.options or ())
    published = args.source.is_dir() or args.source.suffix == SAFETENSORS or is_torch(args.source)
    for name, given_to in (("--set", options), ("--text", args.text), ("--text-vocab", args.text_vocab)):
        if given_to and args.to is not None:
            raise ValueError(f"{name} must be given for weights that become ours alone, got it beside --to {args.to}")
    if args.text_vocab is not None:
        options["text_vocab"] = args.text_vocab
    if args.to is not None:
        from m3ae_fast.train import load_run

        run = load_run(args.source, objectives=("mae", "m3ae"))
        write = {"vitmae": convert.write_vitmae, "timm": convert.write_timm}[args.to]
        write(run.model, args.target)
        config = run.model.config.to_dict()
    elif args.text is not None:
        config = convert.convert_mamo(args.source, args.text, args.target, **options).to_dict()
    elif published:
        if args.text_vocab is not None:
            raise ValueError(f"--text-vocab must be given for models that read words, {args.source} does not")
        config = convert.convert_vit(args.source, args.target, **options).to_dict()
    else:
        config = convert.convert_flax_checkpoint(args.source, args.target, **options).to_dict()
    shown = ", ".join(f"{name} {value}" for name, value in config.items())
    print(f"{args.target}: {shown}")
    return 0


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=110)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Paragraphs stay apart, and lines that are indented stay as they are."""
        return "\n".join(
            line if line.startswith(" ") else super(_Formatter, self)._fill_text(line, width, indent)
            for line in text.splitlines()
        )


class _Parser(argparse.ArgumentParser):
    """A mistake is one line, which names the option or the value that is nearest to what was given."""

    def __init__(self, *args, **settings):
        super().__init__(*args, allow_abbrev=False, formatter_class=_Formatter, **settings)

    def parse_known_args(self, args=None, namespace=None):
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:  # said here: only the command's own parser knows its options
            options = [each.partition("=")[0] for each in unknown if each.startswith("-")]
            self.error(f"unrecognized arguments: {' '.join(unknown)}{_nearest(options, self._option_string_actions)}")
        return namespace, unknown

    def _check_value(self, action, value):
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += _nearest([str(value)], action.choices)
            raise

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} ({self.prog} --help)\n")


def _nearest(given: list[str], known: Iterable[str]) -> str:
    near = dict.fromkeys(match for name in given for match in difflib.get_close_matches(name.lower(), known, 1))
    return f"; did you mean {', '.join(near)}?" if near else ""


def _parser(named: str | None = None) -> argparse.ArgumentParser:
    """Of all commands; `named` is the one called."""
    parser = _Parser("m3ae-fast", description="Masked multimodal autoencoders, fast.")
    parser.add_argument("--version", action="version", version=f"m3ae_fast {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, function, text: str, **settings) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, **settings)
        command.set_defaults(command=function, name=name)
        command.epilog = "\n".join(["examples:", *(f"  m3ae-fast {each}" for each in EXAMPLES[name])])
        return command

    # SUPPRESS: what was not given is not there, so that --resume can tell it from a default
    pretrain = add(
        "pretrain", _pretrain,
        "Train an M3AE, or another model. With no option: synthetic scenes, a tiny model, three minutes on two cores.",
        argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    if named == "pretrain":  # its settings need the train extra, as those of the tasks do
        _add_run_options(pretrain)

    reconstruct = add("reconstruct", _reconstruct, "Draw original | masked | reconstruction with a trained model.")
    add_run(reconstruct)
    reconstruct.add_argument(
        "images",
        nargs="*",
        type=path,
        metavar="IMAGE",
        help="an image file, with its caption in NAME.txt beside NAME.jpg",
    )
    reconstruct.add_argument(
        "--data", metavar="shapes|DIR", help="data to draw, instead of images (default: the run's own)"
    )
    add_captions(reconstruct)
    add_picture(reconstruct, "reconstruction.png")
    reconstruct.add_argument(
        "--samples", type=positive, default=6, metavar="N", help="how many of --data (%(default)s)"
    )
    reconstruct.add_argument("--seed", type=natural, metavar="S", help="seed of the masks (default: the run's)")
    add_device(reconstruct)

    for name, text in TASKS.items():
        command = add(name, None, text)
        if name == named:
            task = importlib.import_module(f"m3ae_fast.downstream.tasks.{name}")
            task.add_arguments(command)
            command.set_defaults(command=task.main)

    experiments = add(
        "experiments", _experiments,
        "Train and score the papers' tables in miniature: 42 tiny models on synthetic images, an hour on two cores.",
    )  # fmt: skip
    if named == "experiments":
        _add_experiments_options(experiments)

    add("info", _info, "Say what runs here and why: versions, instruction set, backends.")

    convert = add("convert", _convert, "Turn published weights into ours, or ours into those of Transformers or timm.")
    convert.add_argument(
        "source", type=path, metavar="IN",
        help="mae_*.pth, a Vision Transformer of timm (.pth, .safetensors), a ViTMAE folder, or model.pkl of the "
        "public JAX code; with --to, a run of m3ae-fast or a checkpoint",
    )  # fmt: skip
    convert.add_argument(
        "target",
        type=path,
        metavar="OUT",
        help="a .safetensors file; for a model that reads text, and with --to vitmae, a folder",
    )
    convert.add_argument(
        "--to", choices=("vitmae", "timm"), help="write a ViTMAE for Transformers, or the encoder for timm"
    )
    convert.add_argument(
        "--text", type=path, metavar="BERT",
        help="make a MAMO from the image encoder IN (CLIP or DeiT) and this BERT, as text and fusion encoder",
    )  # fmt: skip
    convert.add_argument(
        "--text-vocab", metavar="FILE|NAME",
        help="vocabulary of a model that reads text, as in pretrain (default: that in the folder BERT, or "
        "bert-base-uncased)",
    )  # fmt: skip
    convert.add_argument(
        "--set", dest="options", type=name_and_value, action="append", metavar="NAME=VALUE",
        help="a field of the configuration that the weights do not show, such as heads=3, or norm_pix=false; "
        "may be repeated",
    )  # fmt: skip
    return parser


def _add_experiments_options(command: argparse.ArgumentParser) -> None:
    from m3ae_fast.experiments import TABLES, Scale

    command.add_argument(
        "--out", type=path, default=Path("runs/experiments"), metavar="DIR", help="folder of the results (%(default)s)"
    )
    names = ", ".join(TABLES)
    command.add_argument(
        "--only", nargs="+", metavar="TABLE", choices=tuple(TABLES), help=f"tables to make: {names} (default: all)"
    )
    command.add_argument("--seeds", type=positive, default=3, metavar="N", help="runs of each model (%(default)s)")
    command.add_argument(
        "--steps", type=positive, default=Scale.steps, metavar="N", help="steps of each run (%(default)s)"
    )
    command.add_argument("--jobs", type=positive, metavar="N", help="runs at a time (default: one per core)")
    command.add_argument("--smoke", action="store_true", help="three steps per run, to check that everything works")


def _add_run_options(command: argparse.ArgumentParser) -> None:
    """One option for each setting of RunConfig, named alike, and those of a call alone."""
    from m3ae_fast.train.config import FILES, RUN, RunConfig

    command.epilog += (
        "\nSeveral processes: torchrun --nproc-per-node 8 -m m3ae_fast pretrain ..., on GPUs or CPUs; batches are "
        "split among them, and a run may go on with another number of them (docs/scale.md)."
    )
    groups = add_options(command, RunConfig)
    groups[RUN].add_argument(
        "--recipe", metavar="NAME|list",
        help="the options of a paper's run, such as m3ae-cc12m-large; options given as well override them; "
        "list: print all recipes",
    )  # fmt: skip
    files = groups[FILES]
    files.add_argument("--out", type=path, metavar="DIR", help="folder of the run; default: runs/DATA-MODEL")
    files.add_argument(
        "--resume", nargs="?", choices=("auto",), const=True, default=False,
        help="continue the run in --out, bitwise identical, or a finished one with more --steps; auto: start it if "
        "there is none yet",
    )  # fmt: skip
    files.add_argument("--stop-after", type=positive, metavar="K", help="stop after step K; --resume continues")
