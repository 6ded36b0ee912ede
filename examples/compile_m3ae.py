"""A compiled M3AE step: python examples/compile_m3ae.py --steps 50 [--precision bf16] [--eager]

The masks are drawn beforehand (`model.plan`), so the whole forward pass is one graph. It is compiled for each size of a
batch and each mix of kinds (pairs, images or texts alone), not for lengths: two or three times in a run.
"""

import argparse
import time

import torch

from m3ae_fast.data import Loader, Tokenizer, open_dataset
from m3ae_fast.models import M3AE, M3AEConfig
from m3ae_fast.train import learning_rate, make_optimizer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
parser.add_argument("--backend", default="inductor", help="of torch.compile")
parser.add_argument("--eager", action="store_true", help="for comparison")
args = parser.parse_args()

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
dataset = open_dataset("shapes", image_size=64, seed=0)
tokenizer = Tokenizer.train(dataset.captions(), vocab_size=8192)
torch.manual_seed(0)
config = M3AEConfig.tiny(vocab_size=tokenizer.vocab_size)
model = M3AE(config).to(device)
optimizer = make_optimizer(model, lr=2e-3, weight_decay=0.05)
step_loss = lambda batch, plan: model(batch, plan=plan).loss  # noqa: E731
if not args.eager:
    step_loss = torch.compile(step_loss, backend=args.backend, fullgraph=True, dynamic=True)
loader = Loader(
    dataset, tokenizer, image_size=config.image_size, max_text_length=config.max_text_length,
    batch_size=args.batch_size,
)  # fmt: skip
for step in range(args.steps):
    start = time.perf_counter()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, steps=args.steps, warmup=args.steps // 10, peak=2e-3)
    batch = next(loader)[1].to(device)
    plan = model.plan(batch, seed=0, step=step)
    with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        loss = step_loss(batch, plan)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1} loss {loss.item():.6f} ({time.perf_counter() - start:.3f} s)")
