"""Ports, loopback and host name: what Ray's processes and learner ranks meet by."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path

from rayalign.doctor.finding import Finding

PORTS = {
    6379: "launch/ray_cluster.sh head; take another with RAYALIGN_RAY_PORT",
    8265: "Ray's dashboard and `rayalign submit`; take another with ray start --dashboard-port",
    10001: "ray:// clients; take another with ray start --ray-client-server-port",
    52365: "Ray's dashboard agent, through which jobs start on this node; launch/ray_cluster.sh takes a free one, "
    "else ray start --dashboard-agent-listen-port=52366",
}


def network_findings() -> list[Finding]:
    """Everything about this machine's own network."""
    rays = ray_processes()
    findings = port_findings({port: port_is_free(port) for port in PORTS}, ray_runs=bool(rays))
    findings += ray_findings(len(rays)) + loopback_findings(loopback_error())
    return findings + hostname_findings(socket.gethostname(), resolve(socket.gethostname()))


def port_findings(free: Mapping[int, bool], *, ray_runs: bool) -> list[Finding]:
    """`free`: by port. A port that a running Ray holds is as it should be; else a cluster cannot start with it."""
    taken = [port for port in free if not free[port]]
    if not taken:
        return [Finding("ok", "ports", f"{', '.join(map(str, free))} are free")]
    holder = "in use, while Ray runs here" if ray_runs else "in use by another program"
    return [Finding("note", f"port {port}", holder, f"only needed for {PORTS[port]}") for port in taken]


def ray_findings(nodes: int) -> list[Finding]:
    """`nodes`: raylet processes, one a Ray node."""
    if not nodes:
        return [Finding("ok", "Ray processes", "none are left from before")]
    found = f"{nodes} Ray node{'s' if nodes > 1 else ''} running here, which use cores and memory"
    remedy = "placement.address=auto joins a cluster started with ray start; `ray stop` ends what is left over"
    return [Finding("note", "Ray processes", found, remedy)]


def loopback_findings(error: str) -> list[Finding]:
    """`error`: empty when a connection to a port of our own worked."""
    if not error:
        return [Finding("ok", "loopback", "a port of 127.0.0.1 can be bound and reached")]
    remedy = "bring up the loopback interface (ip link set lo up), and let the sandbox or firewall pass it"
    return [Finding("problem", "loopback", f"127.0.0.1 cannot be used: {error}", remedy)]


def hostname_findings(name: str, address: str) -> list[Finding]:
    """`address`: empty when the name does not resolve."""
    if address:
        return [Finding("ok", "host name", f"{name} is {address}")]
    remedy = f"add '127.0.1.1 {name}' to /etc/hosts (on a cluster, the address that other nodes reach)"
    return [Finding("note", "host name", f"{name} does not resolve; learner ranks meet by it", remedy)]


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not held back by a connection just closed
        try:
            probe.bind(("", port))
            probe.listen(1)
        except OSError:
            return False
        return True


def loopback_error() -> str:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:
        return str(error)
    return ""


def resolve(name: str) -> str:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return ""


def ray_processes(proc: Path = Path("/proc")) -> list[int]:
    """Process ids of Ray's node managers."""
    found = []
    for path in proc.glob("[0-9]*/comm"):
        try:
            if path.read_text().strip() == "raylet":
                found.append(int(path.parent.name))
        except OSError:  # ended meanwhile, or another user's
            continue
    return sorted(found)
