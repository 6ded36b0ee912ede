"""M3AE under Lightning: python examples/lightning_m3ae.py --steps 50 [--devices 2] [--precision bf16-mixed]

The losses are those of `m3ae-fast pretrain`, for one process or many: a step is of devices * batch_size * accumulate
samples. `--stop-after 20` ends early, and the same command with `--resume` goes on from there.
"""

import argparse

import lightning
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from m3ae_fast.data import Loader, Tokenizer, open_dataset
from m3ae_fast.models import M3AE, M3AEConfig
from m3ae_fast.train import learning_rate, make_optimizer


class Pretraining(lightning.LightningModule):
    def __init__(self, args: argparse.Namespace):
        super().__init__()
        self.args, self.dataset = args, open_dataset("shapes", image_size=64, seed=0)
        self.tokenizer = Tokenizer.train(self.dataset.captions(), vocab_size=8192)
        self.model = M3AE(M3AEConfig.tiny(vocab_size=self.tokenizer.vocab_size))

    def train_dataloader(self) -> Loader:
        return Loader(
            self.dataset, self.tokenizer, image_size=64, max_text_length=self.model.config.max_text_length,
            batch_size=self.args.batch_size, start_step=self.global_step * self.args.accumulate,
            rank=self.global_rank, world_size=self.trainer.world_size,
        )  # fmt: skip

    def training_step(self, item, index):
        loss = self.model(item[1], seed=0, step=self.global_step).loss
        self.print(f"step {self.global_step + 1} loss {self.all_gather(loss.detach()).mean():.6f}")
        return loss

    def on_before_optimizer_step(self, optimizer):  # Lightning's own clipping sums in the optimizer's order, not ours
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)

    def configure_optimizers(self):
        optimizer, steps = make_optimizer(self.model, lr=2e-3, weight_decay=0.05), self.args.steps
        rate = LambdaLR(optimizer, lambda step: learning_rate(step, steps=steps, warmup=steps // 10, peak=1.0))
        return [optimizer], [{"scheduler": rate, "interval": "step"}]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"steps": 50, "stop-after": None, "batch-size": 8, "accumulate": 1, "devices": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--out", default="runs/lightning")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    lightning.seed_everything(0)
    trainer = lightning.Trainer(
        max_steps=args.stop_after or args.steps, devices=args.devices, precision=args.precision,
        accumulate_grad_batches=args.accumulate, logger=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Pretraining(args), ckpt_path=f"{args.out}/last.ckpt" if args.resume else None)
    trainer.save_checkpoint(f"{args.out}/last.ckpt")
