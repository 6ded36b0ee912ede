"""Images a second of Loader with two workers, against a plain PyTorch DataLoader with torchvision-style transforms."""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks import measure
from m3ae_fast.data import EncodedImage, FolderDataset, Loader
from m3ae_fast.data.images import crop

SIZE, WORKERS, BATCH = 256, 2, 32  # pixels a side of what comes out
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CASES = {"500x375": (500, 375, 768), "1600x1200": (1600, 1200, 160)}  # width, height, images in a round


def photograph(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Detail at every scale, as photographs have: noise that grows with its wavelength, and a little grain."""
    pixels = rng.normal(0, 4, (height, width, 3))
    for octave in range(1, 8):
        side = 2**octave
        coarse = rng.normal(0, 1, (height // side + 2, width // side + 2, 3))
        planes = [Image.fromarray(plane.astype(np.float32)) for plane in np.moveaxis(coarse, -1, 0)]
        fine = np.stack([plane.resize((width, height), Image.Resampling.BICUBIC) for plane in planes], -1)
        pixels += 6 * 1.35**octave * fine
    return Image.fromarray((pixels + 120).clip(0, 255).astype(np.uint8))


class Plain(Dataset):
    """What a training script for images has: Pillow, and floats in [C, H, W] as torchvision's ToTensor makes them."""

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        with Image.open(self.paths[index]) as file:
            image = file.convert("RGB")
        image = self.resized(image, self.random_box(*image.size))
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        return pixels.sub_(mean).div_(std)

    @staticmethod
    def resized(image, box):
        return image.crop(box).resize((SIZE, SIZE), Image.Resampling.BICUBIC)

    @staticmethod
    def random_box(width, height, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3)):
        for _ in range(10):
            area = width * height * random.uniform(*scale)
            aspect = math.exp(random.uniform(math.log(ratio[0]), math.log(ratio[1])))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                x, y = random.randint(0, width - w), random.randint(0, height - h)
                return x, y, x + w, y + h
        return 0, 0, width, height


@pytest.mark.parametrize("case", CASES)
def bench_loader(benchmark, case, tmp_path):
    """Workers are started in each round: else one's would read ahead while the other is timed."""
    if measure.SETTINGS.gpu:
        pytest.skip("the CPU decodes")
    width, height, count = CASES[case]
    count = BATCH if measure.SETTINGS.smoke else count
    rng = np.random.default_rng(0)
    for i in range(min(count, 64)):
        photograph(rng, width, height).save(tmp_path / f"{i:03}.jpg", quality=85)
    dataset = FolderDataset(tmp_path)
    paths = [tmp_path / name for name in dataset.names]
    for i, path in enumerate(paths[:8]):
        box = Plain.random_box(width, height)
        ours = crop(EncodedImage(path, path.name), box, SIZE).astype(float)
        peers = np.asarray(Plain.resized(Image.open(path), box)).astype(float)
        assert abs(ours - peers).mean() < 2, f"image {i}, box {box}"
    moved = {}

    def loader(start):
        stream = Loader(dataset, None, image_size=SIZE, batch_size=BATCH, seed=start, workers=WORKERS)
        for _ in range(count // BATCH):
            images = next(stream)[1].images
        stream.close()
        moved["m3ae_fast"] = images.nbytes // BATCH

    def plain(start):
        everything = Plain([paths[i % len(paths)] for i in range(count + 2 * WORKERS * BATCH)])  # as far ahead as ours
        stream = iter(DataLoader(everything, BATCH, shuffle=True, num_workers=WORKERS))
        for _ in range(count // BATCH):
            images = next(stream)
        del stream
        moved["DataLoader, Pillow"] = images.nbytes // BATCH

    rows = measure.compare(benchmark, "loader", case, {"m3ae_fast": loader, "DataLoader, Pillow": plain}, inputs=8)
    kilobytes = sum(path.stat().st_size for path in paths) / len(paths) / 1e3
    for name, row in rows.items():
        rate = count / row.median_ms * 1e3
        row.extra = f"{rate:.0f} images/s of {kilobytes:.0f} kB, {moved[name]:,} bytes each"
    assert moved["DataLoader, Pillow"] == 4 * moved["m3ae_fast"]
