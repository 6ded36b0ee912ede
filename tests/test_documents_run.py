"""The Python in the documents runs: each block in an empty folder, on small sizes.

PREPARED has the names and files that the text around a block presupposes, by document; SMALLER what is run in place of
large sizes, downloads and a GPU. A comment `<!-- not run: REASON -->` stands before a block that cannot run: only its
imports are run.
"""

import ast
import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import m3ae_fast
from m3ae_fast import ImageTextBatch

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^(?:<!-- not run: (.+?) -->\n)?```python\n(.*?)^```", re.M | re.S)
OPTIONAL = {"PIL", "accelerate", "datasets", "h5py", "safetensors", "timm", "transformers"}  # may be missing

SMALLER = {
    "README.md": {"M3AEConfig.small()": "M3AEConfig.tiny()", "256, 256)": "64, 64)"},
    "docs/images.md": {"M3AEConfig.small()": "M3AEConfig.tiny()"},
    "docs/quickstart.md": {"256, 256)": "32, 32)"},
    "docs/trainers.md": {
        "RunConfig(steps=200)": "RunConfig(steps=4, batch_size=2, image_size=32, device='cpu')",
        "trainer.done < 200": "trainer.done < 4",
        "trainer.done % 50": "trainer.done % 2",
        "dynamic=True)\n": "dynamic=True, backend='eager')\n",
        '"cuda"': '"cpu"',
        "Loader(..., rank": "Loader(dataset, tokenizer, image_size=64, batch_size=2, rank",
    },
    "docs/integrations/timm.md": {"vit_base_patch16_224": "vit_tiny_patch16_224"},
    "docs/integrations/transformers.md": {'.from_pretrained("facebook/vit-mae-base")': "(config)"},
}


def test_what_is_made_smaller_is_in_the_documents():
    for name, parts in SMALLER.items():
        blocks = [found[2] for found in BLOCK.finditer((ROOT / name).read_text(encoding="utf-8"))]
        assert not [shown for shown in parts if not any(shown in block for block in blocks)], name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_block_is_found(path):
    text = path.read_text(encoding="utf-8")
    found = list(BLOCK.finditer(text))
    assert len(re.findall(r"``` *py", text)) == len(found), "a block must be marked python and not be indented"
    assert text.count("<!-- not run") == sum(match[1] is not None for match in found), "a reason must precede a block"


def blocks() -> list:
    found = []
    for path in DOCUMENTS:
        text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
        for match in BLOCK.finditer(text):
            line = 1 + text.count("\n", 0, match.start(2))
            marks = [pytest.mark.exhaustive] if "torch.compile(" in match[2] else []
            found.append(pytest.param(name, *match.groups(), id=f"{name}:{line}", marks=marks))
    return found


@pytest.fixture
def run(tmp_path, monkeypatch, threads):
    """run(code, names): in a folder of its own; skips where a package that it needs is not installed."""
    monkeypatch.chdir(tmp_path)
    threads(1)
    precision = torch.get_float32_matmul_precision()

    def execute(code, prepare):
        try:
            exec(compile(code, "block", "exec"), prepare())
        except ModuleNotFoundError as error:
            if error.name not in OPTIONAL:
                raise
            pytest.skip(f"needs {error.name}")

    yield execute
    torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize(("name", "reason", "code"), blocks())
def test_a_block_runs(name, reason, code, run):
    if reason:
        assert all((ROOT / path).exists() for path in re.findall(r"examples/\w+\.py", reason))
        imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)]
        return run(ast.Module(imports, []), dict)
    for shown, smaller in SMALLER.get(name, {}).items():
        code = code.replace(shown, smaller)
    run(code, PREPARED.get(name, dict))


def tiny() -> dict:
    """An M3AE and two of its batches."""
    from m3ae_fast.models import M3AE, M3AEConfig

    images, words = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8), torch.randint(0, 100, (12,))
    return {
        "torch": torch, "m3ae_fast": m3ae_fast, "model": M3AE(M3AEConfig.tiny(vocab_size=100)),
        "batch": ImageTextBatch(images, words, [7, 5]), "other": ImageTextBatch(images, words.flip(0), [7, 5]),
        "step": 0, "number": 0, "attention": torch.rand(2, 64),
    }  # fmt: skip


def tiny_vit_mae() -> dict:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
    )  # fmt: skip
    return {"ViTMAEForPreTraining": ViTMAEForPreTraining, "config": config, "pixel_values": torch.randn(2, 3, 32, 32)}


def readme() -> dict:
    model = timm()["timm"].create_model("vit_tiny_patch16_224", depth=1)
    return {"model": model, "qkv": torch.randn(2, 5, 3, 4, 32), "attention_mask": torch.ones(2, 5, dtype=torch.bool)}


def timm() -> dict:
    from benchmarks.models import timm_alone

    return {"timm": timm_alone.load()}


def data() -> dict:
    """Photos, and a list of them with their captions."""
    from PIL import Image

    Path("photos").mkdir()
    paths = [f"photos/{i}.jpg" for i in range(3)]
    for path in paths:
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    return {"paths": paths, "captions": ["a photo"] * 3}


def finished_run() -> dict:
    """A run of one step in runs/mine, with a step that was not finite."""
    from m3ae_fast.train import RunConfig, Trainer, bad_steps

    Path("vocab.txt").write_text("[UNK]\na\nred\ncircle\n", encoding="utf-8")
    config = RunConfig(steps=1, batch_size=2, image_size=32, device="cpu")
    with Trainer(config, "runs/mine") as trainer:
        trainer.step()
        trainer.save()
        config = trainer.config
    batch = ImageTextBatch(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([4, 5]), [1, 1])
    path = Path("runs/mine/bad_steps/step-00000005.safetensors")
    path.parent.mkdir()
    bad_steps.save_bad_step(path, 5, config, "loss nan", [batch])
    return {}


def trainers() -> dict:
    from m3ae_fast.data import Loader, Tokenizer, open_dataset

    names = tiny()
    return names | {
        "optimizer": torch.optim.AdamW(names["model"].parameters()), "folder": "checkpoint", "Loader": Loader,
        "dataset": open_dataset("shapes", image_size=64, seed=0),
        "tokenizer": Tokenizer.train(["a photo"], vocab_size=100),
    }  # fmt: skip


def nested() -> dict:
    def made(*shape):
        return torch.nested.nested_tensor([torch.randn(n, *shape) for n in (3, 5)], layout=torch.jagged)

    return {"nested": made(32), "q": made(2, 32), "k": made(2, 32), "v": made(2, 32)}


def mae() -> dict:
    """The mixin of examples/mae_recipe.py and a module with the class that it goes before."""
    spec = importlib.util.spec_from_file_location("mae_recipe", ROOT / "examples/mae_recipe.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    models_mae = SimpleNamespace(MaskedAutoencoderViT=torch.nn.Module)
    return {"Packed": recipe.Packed, "models_mae": models_mae}


PREPARED = {
    "README.md": readme,
    "docs/data.md": data,
    "docs/masking.md": tiny,
    "docs/quickstart.md": finished_run,
    "docs/survival.md": finished_run,
    "docs/trainers.md": trainers,
    "docs/integrations/mae.md": mae,
    "docs/integrations/nested.md": nested,
    "docs/integrations/timm.md": timm,
    "docs/integrations/transformers.md": tiny_vit_mae,
}
