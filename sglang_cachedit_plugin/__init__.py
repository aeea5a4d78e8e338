"""Cache-DiT for SGLang Diffusion."""

__version__ = "0.1.0"
