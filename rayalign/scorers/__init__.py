"""Scorers by name: each is a record whose `start()` gives a function from groups to scores."""

SCORERS = {
    "rules": "rayalign.scorers.rules:Rules",
    "ratings": "rayalign.scorers.ratings:Ratings",
    "judge": "rayalign.scorers.judge:Judge",
    "python": "rayalign.scorers.python:Python",
    "url": "rayalign.scorers.url:Url",
    "dpm": "rayalign.scorers.dpm:DpmScorer",
    "reward_model": "rayalign.scorers.reward_model:RewardModelScorer",
    "mix": "rayalign.scorers.mix:Mix",
}
