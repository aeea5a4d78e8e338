"""Cache-DiT for SGLang Diffusion."""

__version__ = "0.2.0"
