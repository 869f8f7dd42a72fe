"""A frozen role that follows another: one in the same processes, or one in another group of actors, by a push."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rayalign.errors import ConfigError
from rayalign.protocols import WeightPush

if TYPE_CHECKING:
    from rayalign.learners.base import RankLearner


def refresh(learner: RankLearner, source: str, decay: float) -> None:
    """own ← decay·own + (1−decay)·source, where `source` names a role beside this one.

    Raises:
        ConfigError: no such role beside this one, or this role is trained.
        ValueError: decay outside [0, 1).
    """
    _check_decay(decay)
    role, spec = learner.spec.role, learner.spec
    if spec.shares is not None and next(learner.part.own(), None) is None:
        raise ConfigError(
            f"the {role} learner has no weights of its own",
            where=role,
            value=source,
            rule=f"a role that follows another has an adapter of its own in the model of the {spec.shares}",
            remedy=f"build the {spec.shares} with adapters=({role!r},)",
        )
    if source not in learner.peers or spec.trainable:
        raise ConfigError(
            f"the {role} learner cannot take over weights",
            where=role,
            value=source,
            rule="a frozen role follows a role that is built beside it: "
            + ", ".join(sorted(set(learner.peers) - {role})),
        )
    peer = learner.peers[source]
    # Of the same stage, shares match and nothing has to be gathered.
    alike = getattr(peer, "stage", None) == getattr(learner, "stage", None)
    learner._blend(peer.shares() if alike else learner.shares_of(peer.own_tensors()), decay)
    learner.refreshed = True


def take(learner: RankLearner, push: WeightPush, decay: float) -> None:
    """own ← decay·own + (1−decay)·what was pushed: of a role that follows one in another group of actors.

    Raises:
        ConfigError: this role is trained, or has no weights of its own.
        ValueError: decay outside [0, 1).
        SyncMismatch: a tensor is missing, or is not what was sent; nothing is changed then.
    """
    from rayalign.sync.flat import checksum, unpack, verify

    _check_decay(decay)
    role, spec = learner.spec.role, learner.spec
    if spec.trainable or spec.shares is not None:
        raise ConfigError(
            f"the {role} learner cannot take over weights",
            where=role,
            value="weights that were pushed",
            rule="a frozen role with a model of its own",
            remedy=f"take learner.roles.{role} out: it then follows in the same processes",
        )
    pushed = dict(each for chunk in push.chunks for each in unpack(chunk))
    verify(push.manifest, {name: checksum(tensor) for name, tensor in pushed.items()}, who=role)
    names = [name for name, _ in learner.part.own()]
    verify(dict.fromkeys(names, ""), dict.fromkeys(pushed, ""), who=role)
    learner._blend(learner.shares_of((name, pushed[name].to(learner.device)) for name in names), decay)
    learner.refreshed = True


def _check_decay(decay: float) -> None:
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"decay must be in [0, 1), got {decay}")
