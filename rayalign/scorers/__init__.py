"""Scorers by name: each is a record whose `start()` gives a function from groups to scores."""

SCORERS = {
    "rules": "rayalign.scorers.rules:Rules",
}
