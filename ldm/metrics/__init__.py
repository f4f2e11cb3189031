"""Metrics as small pure functions in float64. Inputs are (N, D) tensors or arrays unless said otherwise."""

from ldm.metrics.alignment import clip_score, cosine, retrieval
from ldm.metrics.distances import cmmd, frechet_distance, frechet_distance_infinite, kernel_distance
from ldm.metrics.diversity import inception_score, precision_recall
from ldm.metrics.reconstruction import bits_per_dimension, perceptual_distance, psnr, sharpness, ssim
from ldm.metrics.representation import cluster_scores, dci, linear_probe, mig

__all__ = [
    "bits_per_dimension",
    "clip_score",
    "cluster_scores",
    "cmmd",
    "cosine",
    "dci",
    "frechet_distance",
    "frechet_distance_infinite",
    "inception_score",
    "kernel_distance",
    "linear_probe",
    "mig",
    "perceptual_distance",
    "precision_recall",
    "psnr",
    "retrieval",
    "sharpness",
    "ssim",
]
