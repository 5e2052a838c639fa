"""The diffusion process that the published U-ViTs are trained for. Pure torch."""

import torch
from torch import Tensor

TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.0120


def noise_levels(device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Amplitudes of signal and of noise at t = 1 ... 1000, each ``(1000,)``.

    x_t = signal_t x_0 + noise_t eps, where signal_t^2 is the product of 1 - beta up to t, noise_t^2
    = 1 - signal_t^2, and beta = linspace(sqrt(0.00085), sqrt(0.0120), 1000)^2.
    """
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, TIMESTEPS, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)
    return kept.sqrt().float().to(device), (1 - kept).sqrt().float().to(device)
