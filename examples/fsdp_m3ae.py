"""M3AE sharded by FSDP2: torchrun --nproc-per-node 2 examples/fsdp_m3ae.py --steps 50 [--bf16]

The losses are those of `m3ae-fast pretrain` with the samples of all. `--stop-after 20` ends early, and `--resume` goes
on, in as many processes as you like (`python examples/fsdp_m3ae.py` is one).
"""

import argparse

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from m3ae_fast.data import Loader, Tokenizer, open_dataset
from m3ae_fast.models import M3AE, M3AEConfig
from m3ae_fast.nn import Block, checkpoint_blocks
from m3ae_fast.train import learning_rate, make_optimizer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name, default in {"--steps": 50, "--stop-after": 0, "--batch-size": 8, "--out": "runs/fsdp"}.items():
    parser.add_argument(name, type=type(default), default=default)
for name in ("--bf16", "--resume"):
    parser.add_argument(name, action="store_true")
args = parser.parse_args()
alone = {} if dist.is_torchelastic_launched() else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
dist.init_process_group(**alone)
# a group of its own: DTensor's caches keep it alive, while the group that works last must be gone when Python ends
mesh = dist.DeviceMesh.from_group(dist.new_group(), "cuda" if torch.cuda.is_available() else "cpu")
dataset = open_dataset("shapes", image_size=64, seed=0)
tokenizer = Tokenizer.train(dataset.captions(), vocab_size=8192)
torch.manual_seed(0)  # the same weights in every process
model = M3AE(M3AEConfig.tiny(vocab_size=tokenizer.vocab_size)).to(mesh.device_type)
checkpoint_blocks(model)
for module in (*(m for m in model.modules() if isinstance(m, Block)), model):  # the model last: what is left
    fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16 if args.bf16 else None, torch.float32))
optimizer = make_optimizer(model, lr=2e-3, weight_decay=0.05)
state = {"step": 0}
if args.resume:
    state["model"], state["optimizer"] = get_state_dict(model, optimizer)
    dcp.load(state, checkpoint_id=args.out)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
loader = Loader(
    dataset, tokenizer, image_size=64, max_text_length=model.config.max_text_length, batch_size=args.batch_size,
    start_step=state["step"], rank=dist.get_rank(), world_size=dist.get_world_size(),
)  # fmt: skip
for step in range(state["step"], args.stop_after or args.steps):
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, steps=args.steps, warmup=args.steps // 10, peak=2e-3)
    loss = model(next(loader)[1].to(mesh.device_type), seed=0, step=step).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    dist.all_reduce(total := loss.detach() / dist.get_world_size())
    if dist.get_rank() == 0:
        print(f"step {step + 1} loss {total:.6f}")
step, states = max(state["step"], args.stop_after or args.steps), get_state_dict(model, optimizer)
dcp.save({"step": step, "model": states[0], "optimizer": states[1]}, checkpoint_id=args.out)
dist.destroy_process_group()
