"""Train a small UNet2DModel on the shipped digits with diffusers' own classes, to try refining with such a teacher.

python scripts/diffusers/train_digits.py --dest=ddpm-digits --minutes=25
python refine.py --network=stylegan2-digits.pkl --teacher=ddpm-digits --kimg=36
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel

from di_refine.files.datasets import ImageDataset
from di_refine.files.registry import resolve

BATCH, LEARNING_RATE = 48, 1e-3


def main() -> None:
    """Train for the minutes that are given, and write the average as a diffusers folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dest", default="ddpm-digits", help="write this folder")
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    dataset = ImageDataset(resolve("digits-16x16.zip", "data"))
    images = torch.from_numpy(dataset.images(range(len(dataset)))).float() / 127.5 - 1
    classes = torch.from_numpy(dataset.labels(range(len(dataset)))).argmax(dim=1)
    net = UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 48),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=24,
        num_class_embeds=10,
    )
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    optimizer = torch.optim.AdamW(net.parameters(), LEARNING_RATE, weight_decay=1e-4)
    average = EMAModel(net.parameters(), decay=0.999)
    start, step = time.monotonic(), 0
    while (done := (time.monotonic() - start) / (60 * options.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, step / 200) * max(0.02, 1 - done)
        drawn = torch.randint(len(images), (BATCH,))
        noise, times = torch.randn_like(images[drawn]), torch.randint(1000, (BATCH,))
        noisy = scheduler.add_noise(images[drawn], noise, times)
        loss = F.mse_loss(net(noisy, times, classes[drawn]).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        average.step(net.parameters())
        step += 1
        if step % 200 == 0:
            print(f"{step * BATCH / 1000:.0f} kimg, {done:.0%} of the time, loss {loss.item():.4f}", flush=True)
    average.copy_to(net.parameters())
    DDPMPipeline(net, scheduler).save_pretrained(options.dest)
    print(f"wrote {options.dest} after {step * BATCH / 1000:.0f} kimg")


if __name__ == "__main__":
    main()
