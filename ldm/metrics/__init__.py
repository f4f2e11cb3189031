"""Metrics as small pure functions in float64. Inputs are (N, D) tensors or arrays unless said otherwise."""

from ldm.metrics.alignment import clip_score, cosine, retrieval
from ldm.metrics.frechet import GaussianMoments, frechet_distance
from ldm.metrics.reconstruction import psnr, ssim

__all__ = ["GaussianMoments", "clip_score", "cosine", "frechet_distance", "psnr", "retrieval", "ssim"]
