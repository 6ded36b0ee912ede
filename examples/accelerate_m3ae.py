"""M3AE under Hugging Face Accelerate: accelerate launch examples/accelerate_m3ae.py --steps 50

The losses are those of `m3ae-fast pretrain`, for one process or many: a step is of processes * batch_size * accumulate
samples. `--stop-after 20` ends early, and the same command with `--resume` goes on from there.
"""

import argparse
import functools

import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LambdaLR

from m3ae_fast.data import Loader, Tokenizer, open_dataset
from m3ae_fast.models import M3AE, M3AEConfig
from m3ae_fast.train import learning_rate, make_optimizer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--stop-after", type=int)
parser.add_argument("--batch-size", type=int, default=8, help="samples of a process in a forward pass")
parser.add_argument("--accumulate", type=int, default=1)
parser.add_argument("--precision", choices=("no", "bf16"), default="no")
parser.add_argument("--out", default="runs/accelerate")
parser.add_argument("--resume", action="store_true")
args = parser.parse_args()

accelerator = Accelerator(mixed_precision=args.precision, gradient_accumulation_steps=args.accumulate)
dataset = open_dataset("shapes", image_size=64, seed=0)
tokenizer = Tokenizer.train(dataset.captions(), vocab_size=8192)
torch.manual_seed(0)  # the same weights in every process
config = M3AEConfig.tiny(vocab_size=tokenizer.vocab_size)
model = M3AE(config)
optimizer = make_optimizer(model, lr=2e-3, weight_decay=0.05)
schedule = LambdaLR(optimizer, functools.partial(learning_rate, steps=args.steps, warmup=args.steps // 10, peak=1.0))
model, optimizer = accelerator.prepare(model, optimizer)
accelerator.register_for_checkpointing(schedule)  # a prepared one would take a step for every process
if args.resume:
    accelerator.load_state(args.out)
loader = Loader(
    dataset, tokenizer, image_size=config.image_size, max_text_length=config.max_text_length,
    batch_size=args.batch_size, start_step=schedule.last_epoch * args.accumulate,
    rank=accelerator.process_index, world_size=accelerator.num_processes,
)  # fmt: skip
for step in range(schedule.last_epoch, args.stop_after or args.steps):
    total = 0.0
    for _ in range(args.accumulate):
        _, batch = next(loader)
        with accelerator.accumulate(model):
            loss = model(batch.to(accelerator.device), seed=0, step=step).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:  # the last pass of the step
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        total += accelerator.reduce(loss.detach(), "mean") / args.accumulate
    schedule.step()
    accelerator.print(f"step {step + 1} loss {total:.6f}")
accelerator.save_state(args.out)
accelerator.end_training()  # the processes part in order
