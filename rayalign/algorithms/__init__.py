"""Algorithms by name. A new one is a file here, a line in this table, and a YAML in configs/."""

ALGORITHMS = {
    "cringe": "rayalign.algorithms.cringe:Cringe",
    "disagreement": "rayalign.algorithms.disagreement:Disagreement",
    "dpm_calibration": "rayalign.algorithms.dpm_calibration:Calibration",
    "generate": "rayalign.algorithms.generate:Generate",
    "kto": "rayalign.algorithms.kto:KTO",
    "label": "rayalign.algorithms.label:Label",
    "mdpo": "rayalign.algorithms.mdpo:MDPO",
    "online_preference": "rayalign.algorithms.online_preference:OnlinePreference",
    "policy_gradient": "rayalign.algorithms.policy_gradient:PolicyGradient",
    "ppo": "rayalign.algorithms.ppo:PPO",
    "preference": "rayalign.algorithms.preference:Preference",
    "rejection_sampling": "rayalign.algorithms.rejection_sampling:RejectionSampling",
    "reward_model": "rayalign.algorithms.reward_model:RewardModel",
    "sft": "rayalign.algorithms.sft:SFT",
    "spin": "rayalign.algorithms.spin:SPIN",
}
