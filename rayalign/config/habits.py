"""Keys that people bring from TRL, OpenRLHF and verl → what says the same here, and whose they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

TRL = {
    "model_name_or_path": "model.path",
    "torch_dtype": "model.dtype",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "dataset_name": "data.prompts",
    "dataset_train_split": "data.split",
    "num_generations": "algorithm.samples",
    "reward_funcs": "scorer",
    "reward_model_path": "scorer",
    "reward_model_name_or_path": "scorer",
    "max_completion_length": "sampling.max_tokens",
    "max_new_tokens": "sampling.max_tokens",
    "per_device_train_batch_size": "rollout.prompts",
    "gradient_accumulation_steps": "learner.micro_batch_tokens",
    "num_iterations": "train.epochs",
    "max_steps": "train.steps",
    "num_train_epochs": "train.steps",
    "learning_rate": "optimizer.lr",
    "lr_scheduler_type": "optimizer.schedule",
    "warmup_ratio": "optimizer.warmup_steps",
    "use_vllm": "engine.name",
    "vllm_mode": "placement.colocate",
    "vllm_tensor_parallel_size": "engine.tensor_parallel",
    "vllm_gpu_memory_utilization": "engine.gpu_memory",
    "vllm_max_model_length": "engine.max_context",
    "max_prompt_length": "engine.max_context",
    "eval_steps": "evaluation.every",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "report_to": "trackers",
    "output_dir": "run_dir",
    "resume_from_checkpoint": "resume",
    "max_length": "engine.max_context",
    "loss_type": "algorithm.loss",
    "loss_weights": "algorithm.loss",
    "rpo_alpha": "algorithm.nll_weight",
    "desirable_weight": "algorithm.weight_desirable",
    "undesirable_weight": "algorithm.weight_undesirable",
    "center_rewards_coefficient": "algorithm.center_weight",
    "precompute_ref_log_probs": "algorithm.reference.cached",
    "sync_ref_model": "algorithm.reference.update",
    "ref_model_sync_steps": "algorithm.reference.every",
    "padding_free": "learner.packing",
    "use_peft": "model.lora",
    "lora_r": "model.lora",
}
OPENRLHF = {
    "pretrain": "model.path",
    "prompt_data": "data.prompts",
    "prompt_dataset": "data.prompts",
    "input_key": "data.prompt_column",
    "apply_chat_template": "data.chat_template",
    "n_samples_per_prompt": "algorithm.samples",
    "init_kl_coef": "algorithm.loss.beta",
    "reward_pretrain": "scorer",
    "remote_rm_url": "scorer",
    "generate_max_len": "sampling.max_tokens",
    "max_new_tokens": "sampling.max_tokens",
    "train_batch_size": "rollout.prompts",
    "rollout_batch_size": "rollout.prompts",
    "micro_train_batch_size": "learner.micro_batch_tokens",
    "num_episodes": "train.steps",
    "actor_learning_rate": "optimizer.lr",
    "lr_warmup_ratio": "optimizer.warmup_steps",
    "adam_offload": "learner.offload",
    "vllm_num_engines": "engine.count",
    "vllm_tensor_parallel_size": "engine.tensor_parallel",
    "vllm_gpu_memory_utilization": "engine.gpu_memory",
    "colocate_all_models": "placement.colocate",
    "max_ckpt_num": "checkpoint.keep",
    "use_wandb": "trackers",
    "save_path": "run_dir",
    "load_checkpoint": "resume",
    "dataset": "data.examples",
    "chosen_key": "data.examples",
    "rejected_key": "data.examples",
    "max_len": "engine.max_context",
    "packing_samples": "learner.packing",
    "lora_rank": "model.lora",
}
VERL = {
    "train_files": "data.prompts",
    "prompt_key": "data.prompt_column",
    "kl_coef": "algorithm.loss.beta",
    "kl_loss_coef": "algorithm.loss.beta",
    "custom_reward_function": "scorer",
    "max_response_length": "sampling.max_tokens",
    "train_batch_size": "rollout.prompts",
    "ppo_micro_batch_size_per_gpu": "learner.micro_batch_tokens",
    "ppo_mini_batch_size": "train.minibatches",
    "ppo_epochs": "train.epochs",
    "total_epochs": "train.steps",
    "total_training_steps": "train.steps",
    "lr_warmup_ratio": "optimizer.warmup_steps",
    "tensor_model_parallel_size": "engine.tensor_parallel",
    "gpu_memory_utilization": "engine.gpu_memory",
    "max_prompt_length": "engine.max_context",
    "test_freq": "evaluation.every",
    "save_freq": "checkpoint.every",
    "default_local_dir": "run_dir",
}
VLLM = {"tensor_parallel_size": "engine.tensor_parallel", "max_model_len": "engine.max_context"} | {
    "gpu_memory_utilization": "engine.gpu_memory",
    "max_num_seqs": "engine.max_running",
}
LIBRARIES = {"TRL": TRL, "OpenRLHF": OPENRLHF, "verl": VERL, "vLLM": VLLM}
HABITS = VLLM | VERL | OPENRLHF | TRL

# Where rows of data are learned from, what their keys say is another of ours.
OFFLINE = {
    "data.prompts": "data.examples",
    "data.prompt_column": "data.examples",
    "engine.max_context": "data.max_tokens",
}

# With PPO and the group methods, which have a KL and a clip in the place of a loss with a strength.
GRADIENTS = {
    "TRL": {
        "beta": "algorithm.kl.coef",
        "kl_coef": "algorithm.kl.coef",
        "kl_estimator": "algorithm.kl.estimator",
        "loss_type": "algorithm.aggregate",
        "epsilon": "algorithm.clip_low",
        "epsilon_high": "algorithm.clip_high",
        "cliprange": "algorithm.clip_low",
        "importance_sampling_level": "algorithm.ratio",
        "mask_truncated_completions": "algorithm.overlong",
        "missing_eos_penalty": "algorithm.reward.no_end_penalty",
        "whiten_rewards": "algorithm.reward.normalise",
        "entropy_coef": "algorithm.entropy_weight",
        "num_ppo_epochs": "train.epochs",
        "num_mini_batches": "train.minibatches",
    },
    "OpenRLHF": {
        "init_kl_coef": "algorithm.kl.coef",
        "kl_estimator": "algorithm.kl.estimator",
        "kl_target": "algorithm.kl.adaptive",
        "kl_horizon": "algorithm.kl.adaptive",
        "advantage_estimator": "algorithm.advantage",
        "eps_clip": "algorithm.clip_low",
        "eps_clip_low_high": "algorithm.clip_high",
        "normalize_reward": "algorithm.reward.normalise",
        "reward_clip_range": "algorithm.reward.clip",
        "entropy_loss_coef": "algorithm.entropy_weight",
        "dynamic_filtering": "algorithm.equal_groups",
    },
    "verl": {
        "kl_coef": "algorithm.kl.coef",
        "kl_loss_coef": "algorithm.kl.coef",
        "kl_loss_type": "algorithm.kl.estimator",
        "use_kl_loss": "algorithm.kl",
        "use_kl_in_reward": "algorithm.kl",
        "loss_agg_mode": "algorithm.aggregate",
        "clip_ratio": "algorithm.clip_low",
        "clip_ratio_low": "algorithm.clip_low",
        "clip_ratio_high": "algorithm.clip_high",
        "clip_ratio_c": "algorithm.dual_clip",
        "entropy_coeff": "algorithm.entropy_weight",
        "filter_groups": "algorithm.equal_groups",
    },
}

# Sections of other libraries whose keys are spread over several of ours.
SECTIONS = {
    "TRL": ("script_args", "training_args", "model_args"),
    "OpenRLHF": ("actor", "ds", "vllm", "ckpt"),
    "verl": ("actor_rollout_ref", "trainer", "critic", "reward_model", "kl_ctrl", "adv_estimator"),
}


def habit(key: str, *, offline: bool = False, gradients: bool = False) -> str:
    """Our key that says the same; "" where there is none.

    Args:
        offline: in a config whose algorithm learns from rows of data.
        gradients: in one whose algorithm is a policy gradient.
    """
    plain = _plain(key)
    of_gradients = (own[plain] for own in GRADIENTS.values() if plain in own)
    ours = next(of_gradients, "") if gradients else ""
    ours = ours or HABITS.get(plain, "")
    return OFFLINE.get(ours, ours) if offline else ours


def libraries(key: str, beside: Iterable[str] = ()) -> list[str]:
    """Whose key this is: of several, those that most of the keys beside it are of as well."""
    own = _owners(key)
    votes = Counter(library for each in beside for library in _owners(each) if library in own)
    most = max(votes.values(), default=0)
    return [library for library in own if votes[library] == most]


def _owners(key: str) -> list[str]:
    plain, more = _plain(key), (GRADIENTS, SECTIONS)
    return [name for name, keys in LIBRARIES.items() if plain in keys or any(plain in of.get(name, ()) for of in more)]


def _plain(key: str) -> str:
    return key.strip().lower().replace("-", "_")
