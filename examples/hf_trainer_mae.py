"""Transformers' MAE pre-training, one line changed: python examples/hf_trainer_mae.py --data shapes --steps 50

The shape of transformers/examples/pytorch/image-pretraining/run_mae.py; what is new is `accelerate(model)`. The model
that it saves is Transformers' own: `ViTMAEForPreTraining.from_pretrained` reads it, with or without m3ae_fast.
"""

import argparse

import torch
from torch.utils.data import Subset
from transformers import Trainer, TrainingArguments, ViTImageProcessor, ViTMAEConfig, ViTMAEForPreTraining, set_seed

from m3ae_fast.data import open_dataset
from m3ae_fast.integrations.transformers import accelerate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="shapes", help="shapes, or a folder of images")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--save-steps", type=int, default=500)
    parser.add_argument("--out", default="runs/hf_mae")
    parser.add_argument("--resume", action="store_true", help="from the newest checkpoint in --out")
    args = parser.parse_args()

    set_seed(0)
    config = ViTMAEConfig(
        image_size=64, patch_size=8, hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=512, decoder_hidden_size=128, decoder_num_hidden_layers=2, decoder_num_attention_heads=4,
        decoder_intermediate_size=512,
    )  # fmt: skip
    model = ViTMAEForPreTraining(config)
    accelerate(model)

    dataset = open_dataset(args.data, image_size=config.image_size, seed=0)
    dataset = Subset(dataset, range(min(len(dataset), 4096)))  # shapes is endless
    processor = ViTImageProcessor(size={"height": config.image_size, "width": config.image_size})

    def collate_fn(samples):
        images = [sample.image for sample in samples if sample.image is not None]
        return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"]}

    training = TrainingArguments(
        output_dir=args.out, max_steps=args.steps, per_device_train_batch_size=args.batch_size, bf16=args.bf16,
        gradient_accumulation_steps=args.accumulate, learning_rate=1e-3, lr_scheduler_type="cosine", warmup_steps=2,
        weight_decay=0.05, logging_steps=1, save_steps=args.save_steps, remove_unused_columns=False, report_to="none",
        use_cpu=not torch.cuda.is_available(),  # bf16 on a CPU must be asked for
    )  # fmt: skip
    trainer = Trainer(model, training, data_collator=collate_fn, train_dataset=dataset, processing_class=processor)
    trainer.train(resume_from_checkpoint=args.resume)
    trainer.save_model()


if __name__ == "__main__":
    main()
