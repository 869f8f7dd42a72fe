"""A part of one's own that cannot be imported."""

raise FileNotFoundError("lexicon.txt")
