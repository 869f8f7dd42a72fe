"""Connecting to a Ray cluster, or starting one on this machine, and leaving it."""

from __future__ import annotations

import logging
import os
import socket
from typing import Any

import ray

from rayalign.errors import ConfigError
from rayalign.runtime.placement import Node, RayPlacement

CONNECT_S = 10.0


def connect(placement: RayPlacement) -> bool:
    """Join the cluster at `placement.address`, or start one here; a connection that is there is used as it is.

    Returns:
        whether a connection was made, which `disconnect` then ends.

    Raises:
        ConfigError: no cluster answers.
    """
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = placement.address or os.environ.get("RAY_ADDRESS")
    own = {} if address else {"include_dashboard": False}
    if placement.object_store_gib and not address:
        own["object_store_memory"] = int(placement.object_store_gib * 2**30)
    try:
        _reach(address)
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
    except Exception as error:  # Ray raises many kinds, from ConnectionError to its own
        raise ConfigError(
            "the Ray cluster does not answer",
            where="key placement.address",
            value=f"{address or 'a cluster of this machine'}: {type(error).__name__}: {error}",
            rule="a running cluster (host:port, auto or ray://…), or none to start one here",
            remedy="start one with launch/ray_cluster.sh; one with a token needs RAY_AUTH_MODE=token and the "
            "same ~/.ray/auth_token",
        ) from error
    return True


def _reach(address: str | None) -> None:
    """Knock once where an address names a port: Ray itself tries for minutes. Raises OSError."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()


def nodes() -> list[Node]:
    """The living nodes, this one first, then by name."""
    here = ray.get_runtime_context().get_node_id()
    living = [_node(n) for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) >= 1]
    return sorted(living, key=lambda node: (node.id != here, node.name, node.id))


def _node(entry: dict[str, Any]) -> Node:
    """Ray's entry of a node. Its memory is what was free when Ray started there, the object store included."""
    resources = entry["Resources"]
    memory = resources.get("memory", 0) + resources.get("object_store_memory", 0)
    types = [name.removeprefix("accelerator_type:") for name in resources if name.startswith("accelerator_type:")]
    gpus = int(resources.get("GPU", 0))
    return Node(
        entry["NodeID"],
        int(resources.get("CPU", 0)),
        gpus,
        entry["NodeManagerHostname"],
        memory / 2**30,
        max(types, key=len) if gpus and types else "",  # A100-40G says more than the A100 beside it
    )


def disconnect() -> None:
    """Ends this driver's actors, and the cluster when it was started here."""
    ray.shutdown()
