"""The papers' runs by name: RunConfig's fields, for `RunConfig(**{**RECIPES[name], ...})` and `--recipe`.

Sources: arXiv:2205.14204, appendix, and the README of the authors' public code, for both of its models on CC12M. What
is not said here is RunConfig's default, which is the papers', too: AdamW (.9, .95), a learning rate of 1.5e-4 for every
256 samples of a step (2.4e-3), random crops of .2 to 1 of the area and mirroring, 256 pixels in patches of 16, .75 of
the patches and of the words masked, image loss + 0.5 text loss, and a tenth of all steps to warm up (5 epochs of 50).

Where we differ from the public code: masks are drawn for every sample over its real words (`--masking shared` is
theirs), and words are WordPiece trained on the captions unless bert-base-uncased's `vocab.txt` is given (`text_vocab`).
"""

from __future__ import annotations

_PAPER = {
    "epochs": 50,
    "batch_size": 4096,
    "weight_decay": 0.05,
    "grad_clip": 0.0,  # none: the public code's flag is 1e9
    "precision": "bf16",
}
RECIPES = {
    f"{objective}-cc12m-{size}": {"objective": objective, "model": size, **_PAPER}
    for objective in ("m3ae", "mae")
    for size in ("small", "base", "large", "huge")
}


def describe() -> str:
    """Every recipe on a line, as the options of `m3ae-fast pretrain` that it stands for."""
    rows = []
    for name, fields in RECIPES.items():
        options = (f"--{field.replace('_', '-')} {value}" for field, value in fields.items())
        rows.append(f"{name:17} {' '.join(options)}")
    return "\n".join(rows)
