"""The gradient of each sample, clipped on its own (DP-SGD): python examples/per_sample_gradients.py --steps 10

torch.func.grad over a whole model: losses are functions of the weights. Samples differ in length, so they come one
after the other: torch.func.vmap wants equal shapes. The sum of the clipped gradients gets noise (arXiv:1607.00133).
"""

import argparse
import functools

import torch
from torch.func import functional_call, grad_and_value

from m3ae_fast import ImageTextBatch
from m3ae_fast.data import Loader, Tokenizer, open_dataset
from m3ae_fast.models import M3AE, M3AEConfig

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--lr", type=float, default=0.1)
parser.add_argument("--clip", type=float, default=1.0, help="largest norm of a sample's gradient")
parser.add_argument("--noise", type=float, default=0.01, help="standard deviation, as a multiple of --clip")
args = parser.parse_args()

dataset = open_dataset("shapes", image_size=64, seed=0)
tokenizer = Tokenizer.train(dataset.captions(), vocab_size=8192)
torch.manual_seed(0)
config = M3AEConfig.tiny(vocab_size=tokenizer.vocab_size)
model = M3AE(config)
weights = {name: p.detach() for name, p in model.named_parameters()}
loader = Loader(
    dataset, tokenizer, image_size=config.image_size, max_text_length=config.max_text_length,
    batch_size=args.batch_size,
)  # fmt: skip


def loss_of(weights: dict, sample: ImageTextBatch, step: int) -> torch.Tensor:
    return functional_call(model, weights, (sample,), {"seed": 0, "step": step}).loss


def samples(batch: ImageTextBatch) -> list[ImageTextBatch]:
    texts = batch.text.split(batch.text_lengths.lengths)
    return [
        ImageTextBatch(batch.images[i : i + 1], texts[i], [len(texts[i])], sample_ids=batch.sample_ids[i : i + 1])
        for i in range(len(batch))
    ]


for step, batch in (next(loader) for _ in range(args.steps)):
    total, losses, norms = {name: args.noise * args.clip * torch.randn_like(w) for name, w in weights.items()}, [], []
    for sample in samples(batch):
        gradient, loss = grad_and_value(functools.partial(loss_of, sample=sample, step=step))(weights)
        norms.append(torch.stack([g.norm() for g in gradient.values()]).norm())
        for name, g in gradient.items():
            total[name] += g * (args.clip / norms[-1]).clamp(max=1)
        losses.append(loss)
    weights = {name: w - args.lr * total[name] / len(batch) for name, w in weights.items()}
    print(f"step {step + 1} loss {torch.stack(losses).mean():.6f} (largest gradient {torch.stack(norms).max():.3f})")
