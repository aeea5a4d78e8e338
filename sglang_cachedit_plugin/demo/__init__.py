"""The embedded demo models: where they are. Standard library only, so that asking costs nothing."""

from pathlib import Path

_HERE = Path(__file__).resolve().parent


def model_dir() -> Path:
    """The FLUX-shaped text-to-image model. The host resolves the family from the folder's name."""
    return _HERE / "FLUX.1-dev"


def video_model_dir() -> Path:
    """The Wan2.2-shaped text-to-video model with two experts."""
    return _HERE / "Wan2.2-T2V-A14B-Diffusers"
