"""Memory of an engine: weights, keys and values, and what vLLM takes of a device."""

from __future__ import annotations

from rayalign.plan.records import GIB, Bytes, EngineCache, Problem, RoleMemory
from rayalign.plan.shapes import Shape
from rayalign.schema import Config

WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
BASE = 0.7 * GIB  # a vLLM process on a CPU before its model: measured, as for learners
BASE_TRANSFORMERS = 0.4 * GIB
PACKED = 1.75  # weights on a CPU: vLLM keeps repacked copies of linear layers and of a tied head (measured, as BASE)
GPU_BASE = 1.5 * GIB  # CUDA context, graphs and workspaces of vLLM on a GPU: a usual size, not measured here
BATCHED_TOKENS = 16384  # that vLLM profiles on its largest GPUs (8192 on others)
BATCHED_TOKENS_CPU = 4096


def token_bytes(shape: Shape, *, width: int) -> float:
    """Keys and values of one token in all layers: 2 · layers · kv heads · head size (Kwon et al. 2023)."""
    return 2.0 * shape.layers * shape.kv_heads * shape.head_dim * width


def engine_memory(
    config: Config, shape: Shape, *, gpu_gib: float, on_gpu: bool
) -> tuple[RoleMemory, EngineCache, list[Problem]]:
    """One engine: on each of its GPUs, or on a CPU in the host's memory; and what is wrong with it."""
    engine = config.engine
    width = WIDTH[getattr(engine, "dtype", None) or config.model.dtype]
    parallel = getattr(engine, "tensor_parallel", 1)
    replicas = max(1, parallel // shape.kv_heads)  # more GPUs than key-value heads: each head more than once
    each = token_bytes(shape, width=width) * replicas
    running, context = engine.max_running, engine.max_context + 1
    wanted = each * running * context
    weights = float(width * shape.parameters) / parallel
    working = _working(config, shape, width=width, parallel=parallel, on_gpu=on_gpu)
    problems = _heads(shape, parallel)
    device, host = Bytes(), Bytes()
    if engine.name != "vllm":  # keys and values grow with what is asked for
        held = Bytes(weights, activations=working, cache=wanted, other=GPU_BASE if on_gpu else 0.0)
        device, host = (held, Bytes(other=BASE_TRANSFORMERS)) if on_gpu else (device, held)
        host = host if on_gpu else host + Bytes(other=BASE_TRANSFORMERS)
        cache = wanted
    elif on_gpu:
        taken = engine.gpu_memory * gpu_gib * GIB
        cache = max(0.0, taken - weights - working - GPU_BASE) * parallel
        device = Bytes(weights, activations=working, cache=cache / parallel, other=GPU_BASE)
        sleeping = (
            weights * parallel if getattr(config.placement, "colocate", False) else 0.0
        )  # sleep moves weights to the host
        host = Bytes(other=BASE * parallel + sleeping)
    else:
        cache = engine.kv_cache_gib * GIB * parallel
        processes = parallel + (parallel > 1)
        host = Bytes(weights * parallel * PACKED, activations=working * parallel, cache=cache, other=BASE * processes)
    if cache < each * context:
        problems.append(_no_room(config, cache / GIB, each * context / GIB, on_gpu=on_gpu))
    found = EngineCache(each, cache / GIB, wanted / GIB, int(cache // (each * context)))
    return RoleMemory("engine", "engine", engine.count, device, host), found, problems


def _working(config: Config, shape: Shape, *, width: int, parallel: int, on_gpu: bool) -> float:
    """Of one step on one device: inner tensors of a layer for all batched tokens, and float32 logits, their
    log-softmax and its copy for the requests that run."""
    running = config.engine.max_running
    most = BATCHED_TOKENS if on_gpu else BATCHED_TOKENS_CPU * parallel
    tokens = min(most, running * config.engine.max_context)
    return layer_tensors(shape, tokens, width=width, parallel=parallel) + 3.0 * 4 * running * shape.vocabulary


def layer_tensors(shape: Shape, tokens: int, *, width: int, parallel: int = 1) -> float:
    """Bytes of the inner tensors of one layer in a forward pass that keeps none of the layers before."""
    return width * (3 * shape.intermediate / parallel + 6 * shape.hidden) * tokens


def _heads(shape: Shape, parallel: int) -> list[Problem]:
    """vLLM splits attention by heads."""
    whole_kv = shape.kv_heads % parallel == 0 or parallel % shape.kv_heads == 0
    if shape.heads % parallel == 0 and whole_kv:
        return []
    return [
        Problem(
            "the model's heads cannot be split so",
            "key engine.tensor_parallel",
            str(parallel),
            f"a divisor of {shape.heads} attention heads that fits {shape.kv_heads} key-value heads",
        )
    ]


def _no_room(config: Config, has: float, needs: float, *, on_gpu: bool) -> Problem:
    if config.engine.name == "vllm" and not on_gpu:
        key, value = "engine.kv_cache_gib", f"{config.engine.kv_cache_gib:g}"
    else:
        key, value = "engine.gpu_memory", f"{getattr(config.engine, 'gpu_memory', 1.0):g}"
    return Problem(
        "the engine has no room for the keys and values of one request",
        f"key {key}",
        f"{value}, which leaves {has:.2f} GiB",
        f"{needs:.2f} GiB for engine.max_context={config.engine.max_context}",
    )


def split_choices(shape: Shape, most: int) -> list[int]:
    """Values of engine.tensor_parallel that divide the head counts, up to the GPUs of a node."""
    return [n for n in range(1, most + 1) if not _heads(shape, n)]
