"""Emoji of the tests' own: coarse random pictures of numbered things, of which no two are alike."""

import numpy as np

import emoji


def coarse_source(path, tags: list[list[str]], blocks: int, side: int, groups: int = 1) -> emoji.Emoji:
    """A concept for each list of tags, in so many groups, drawn by all makers in blocks x blocks colours."""
    shape, scale = (len(tags), len(emoji.MAKERS), blocks, blocks, 3), emoji.TILE // blocks
    pictures = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    words = [
        emoji.Concept(f"{i}", f"thing {i}", some, f"group {i % groups}", "animals-nature")
        for i, some in enumerate(tags)
    ]
    emoji.write(path, pictures.repeat(scale, 2).repeat(scale, 3), words)
    return emoji.Emoji(side, "emoji", path)
