"""All cases, by class name; a class may have several, told apart by what follows the hyphen."""

from __future__ import annotations

from tests.models.native import image, image_more, video, video_more
from tests.models.native.harness import Case

CASES: dict[str, Case] = {**image.CASES, **image_more.CASES, **video.CASES, **video_more.CASES}
