"""A class-conditional network of guided diffusion with a learned variance: a flat state dict."""

from pathlib import Path

import torch
from openai_layout import random_state

OPTIONS = {"codebase": "guided_diffusion", "image_size": 8, "num_head_channels": 32, "use_new_attention_order": False,
           "diffusion_steps": 1000, "noise_schedule": "cosine"}  # fmt: skip


def write(folder: Path) -> Path:
    torch.save(random_state(widths=(32, 64), attention=(False, True), resample="residual", classes=4, out_channels=6), folder / "ema.pt")
    return folder / "ema.pt"
