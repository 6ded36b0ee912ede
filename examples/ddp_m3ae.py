"""M3AE in PyTorch's DDP: torchrun --nproc-per-node 2 examples/ddp_m3ae.py --steps 50

The losses are those of `m3ae-fast pretrain` in one process with the samples of all; `python examples/ddp_m3ae.py` is
that process.
"""

import argparse
import gc
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from m3ae_fast.data import Loader, Tokenizer, open_dataset
from m3ae_fast.models import M3AE, M3AEConfig
from m3ae_fast.train import learning_rate, make_optimizer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--batch-size", type=int, default=8, help="samples of a process")
parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
args = parser.parse_args()

alone = {} if dist.is_torchelastic_launched() else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
dist.init_process_group(**alone)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu", int(os.environ.get("LOCAL_RANK", 0)))
if device.type == "cuda":
    torch.cuda.set_device(device)

dataset = open_dataset("shapes", image_size=64, seed=0)
tokenizer = Tokenizer.train(dataset.captions(), vocab_size=8192)
torch.manual_seed(0)
config = M3AEConfig.tiny(vocab_size=tokenizer.vocab_size)
model = DistributedDataParallel(M3AE(config).to(device))
optimizer = make_optimizer(model, lr=2e-3, weight_decay=0.05)
loader = Loader(
    dataset, tokenizer, image_size=config.image_size, max_text_length=config.max_text_length,
    batch_size=args.batch_size, rank=dist.get_rank(), world_size=dist.get_world_size(),
)  # fmt: skip
for step in range(args.steps):
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, steps=args.steps, warmup=args.steps // 10, peak=2e-3)
    _, batch = next(loader)
    with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        loss = model(batch.to(device), seed=0, step=step).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    total = loss.detach() / dist.get_world_size()
    dist.all_reduce(total)
    if dist.get_rank() == 0:
        print(f"step {step + 1} loss {total:.6f}")
del model
gc.collect()  # DDP is in a cycle: its hold on the group would keep gloo's threads running while Python ends
dist.destroy_process_group()
