"""Algorithms by name. A new one is a file here, a line in this table, and a YAML in configs/."""

ALGORITHMS = {
    "online_preference": "rayalign.algorithms.online_preference:OnlinePreference",
    "preference": "rayalign.algorithms.preference:Preference",
}
