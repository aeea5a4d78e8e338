"""The scenes' training set and check: what a caption says is in the picture, and held-out sets stay apart."""

import numpy as np
import pytest
import torch

from tools.demo_models import scenes_check as check
from tools.demo_models import scenes_data as data
from tools.demo_models import text

NAMES = [f"{colour} {thing}" for colour in ("red", "blue") for thing in ("apple", "owl", "car", "book", "drum")]


@pytest.fixture(scope="module")
def composer(tmp_path_factory):
    """Sprites that are squares of one colour each."""
    sprites = np.full((len(data.STYLES), len(NAMES), 64, 64, 4), 255, dtype=np.uint8)
    sprites[..., :3] = np.random.default_rng(0).integers(0, 255, (len(data.STYLES), len(NAMES), 1, 1, 3))
    target = tmp_path_factory.mktemp("sprites") / "sprites.npz"
    np.savez_compressed(target, sprites=sprites, names=np.array(NAMES))
    return data.Composer(target, torch.device("cpu"))


def test_captions_name_every_object_of_their_scene():
    scenes, captions = data.draw_scenes(NAMES, 200, seed=1)
    for scene, caption in zip(scenes, captions, strict=True):
        held = [NAMES[index] for index in scene[3 : 3 + data.MOST] if index >= 0]
        assert 2 <= len(held) <= data.MOST
        assert all(name in caption for name in held), caption


def test_held_out_sets_are_never_trained_on():
    def sets(**kwargs):
        scenes, _ = data.draw_scenes(NAMES, 300, seed=2, **kwargs)
        return {frozenset(row[row >= 0]) for row in scenes[:, 3 : 3 + data.MOST].astype(int)}

    assert not sets() & sets(held_out=True)


def test_fast_encoding_equals_that_of_the_hosts():
    clip, t5 = data.make_tokenizers(NAMES)
    _, captions = data.draw_scenes(NAMES, 100, seed=3)
    for tokenizer, length in ((clip, 77), (t5, 512)):
        lines = [*captions, ""]
        assert np.array_equal(data.encode(tokenizer, lines, length), text.encode(tokenizer, lines, length))
    assert t5.unk_token_id not in data.encode(t5, [*captions, "any OTHER text: 3 zebras?"], 64)


def test_objects_stand_where_their_row_says(composer):
    torch.manual_seed(0)
    scene = torch.full((1, data.WIDTH), -1)
    scene[0, :3], scene[0, 3], scene[0, 3 + data.MOST] = 0, 4, 5  # one object at the front right
    picture = composer.compose(scene)[0]
    scene[0, 3] = -1
    torch.manual_seed(0)
    changed = (picture - composer.compose(scene)[0]).abs().amax(dim=0) > 0.2
    rows, columns = changed.nonzero().float().mean(dim=0).tolist()
    assert (rows, columns) == pytest.approx((118 - 24, 99), abs=8)


def test_named_marks_the_objects_of_each_scene():
    scenes, _ = data.draw_scenes(NAMES, 50, seed=4)
    marks = check.named(torch.from_numpy(scenes), len(NAMES))
    for scene, mark in zip(scenes, marks, strict=True):
        held = scene[3 : 3 + data.MOST]
        assert mark.nonzero().flatten().tolist() == sorted(held[held >= 0])


def test_found_counts_what_is_seen_and_what_is_not_named():
    scenes = torch.tensor([[0, 0, 0, 1, 2, -1, -1, 0, 2, -1, -1]])

    class Fixed(torch.nn.Module):
        def forward(self, pictures):
            return torch.tensor([[1.0, 1.0, -1.0, -1.0]])

    assert check.found(Fixed(), torch.zeros(1, 3, 8, 8), scenes) == (0.5, 1.0)
