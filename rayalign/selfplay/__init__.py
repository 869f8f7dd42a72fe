"""Self-play: the policy's own answers to the prompts of a data set, as opponents of the data's answers."""

from rayalign.selfplay.contest import Contest
from rayalign.selfplay.generations import Generations

__all__ = ["Contest", "Generations"]
